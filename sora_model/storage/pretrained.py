"""Models and tokenizers of transformers from a local folder, none of whose code runs: `open_pretrained`, `load_tokenizer`."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .tokenizer import check_tokenizer_file, is_librarys, known_entries
from .weights import built, built_without_memory, check_depth, check_kind, place, read_json, read_shapes, read_tensors, weight_files

# What a checkpoint's tokenizer may be; "TokenizersBackend" is what PreTrainedTokenizerFast is called since transformers 5.
TOKENIZERS = (
    "T5Tokenizer",
    "T5TokenizerFast",
    "CLIPTokenizer",
    "CLIPTokenizerFast",
    "PreTrainedTokenizerFast",
    "TokenizersBackend",
)
TOKENIZER_OF = {"t5": "T5Tokenizer", "umt5": "T5Tokenizer", "clip": "CLIPTokenizer", "clip_text_model": "CLIPTokenizer"}
TOKENIZER_FILES = (
    "tokenizer.json",
    "spiece.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
)
TOKENS = "special_tokens_map.json"  # which overrules tokenizer_config.json
# Entries of a config by which transformers would run code of a folder or of the hub, or open another folder; those of classifiers,
# of which it makes a name each; and those by which a model returns something else.
FOREIGN = (
    "auto_map",
    "quantization_config",
    "attn_implementation",
    "_attn_implementation",
    "experts_implementation",
    "_experts_implementation",
    "_name_or_path",
    "num_labels",
    "id2label",
    "label2id",
    "return_dict",
    "torchscript",
    "output_hidden_states",
    "output_attentions",
)


def open_pretrained(kind: Any, values: dict[str, Any], folder: Path, owner: str, dtype: torch.dtype | None = None) -> Any:
    """A model of transformers from its config and the safetensors of a folder, which transformers itself never opens.

    kind: a class of transformers. values: its config. dtype: of the weights, but for those that transformers keeps in float32, as
    of T5 in float16; default: that of most weights in the files.

    Raises:
        FileNotFoundError: no safetensors there. ValueError: weights that are broken, missing, of another shape or not finite.
    """
    files = weight_files(folder, "model", owner)
    shapes = read_shapes(files, owner)
    check_depth(values, shapes, f"{owner}: {folder / 'config.json'}")
    if values.get("quantization_config"):
        raise ValueError(f"{owner}: {folder / 'config.json'}: quantization_config: expected weights that are not quantized")
    values = _without_foreign(values)
    config = built(kind.config_class.from_dict, {"config_dict": values}, owner, folder / "config.json")
    outline = built_without_memory(kind, {"config": config}, shapes, owner, folder / "config.json")
    asked = sum(parameter.numel() for parameter in outline.parameters())
    held = sum(math.prod(shape) for shape in shapes.values())
    if asked > held:
        expected = f"a model of at most {held:,} weights, as many as lie beside it"
        raise ValueError(f"{owner}: {folder / 'config.json'}: expected {expected}, got one of {asked:,}")
    weights, where = read_tensors(files, owner), place(files, owner)
    dtypes = Counter(value.dtype for value in weights.values() if value.is_floating_point())
    own = dtypes.most_common(1)[0][0] if dtypes else torch.float32
    # Of names that transformers changes, as of published files, the last part stays: weight, bias, class_embedding.
    trained = {name.rpartition(".")[2] for name, _ in outline.named_parameters()}
    for name, value in weights.items():
        if name.rpartition(".")[2] in trained and not _is_mask(name, value):
            check_kind(value, own, f"{where}: {name}")
    options: dict[str, Any] = {"config": config, "state_dict": weights, "dtype": own if dtype is None else dtype}
    try:
        with _quiet():
            model, loading = kind.from_pretrained(None, output_loading_info=True, **options)
    except (RuntimeError, TypeError) as error:  # weights of another shape, or all of 8 bits
        raise ValueError(f"{where}: {error}") from None
    if loading["missing_keys"]:
        missing = ", ".join(sorted(loading["missing_keys"]))
        raise ValueError(f"{where}: expected the weights {missing}, which are not there")
    # Other parts of a larger model may be left over, but no layers of this one.
    kinds = {_without_numbers(name) for name in model.state_dict()}
    left = sorted(name for name in loading["unexpected_keys"] if _without_numbers(name) in kinds)
    if left:
        expected = f"all layers that there are weights for, got none for {left[0]}"
        raise ValueError(f"{owner}: {folder / 'config.json'}: expected {expected}")
    return model


def _is_mask(name: str, value: Tensor) -> bool:
    """Whether it is a causal mask [1, 1, n, n], which older files of GPT-2 and its kin have, and transformers drops."""
    return name.endswith(".bias") and value.dim() == 4 and value.shape[:2] == (1, 1)


def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _without_foreign(values: dict[str, Any]) -> dict[str, Any]:
    """A config without the entries of FOREIGN, those of its parts included."""
    return {
        key: _without_foreign(value) if isinstance(value, dict) else value for key, value in values.items() if key not in FOREIGN
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within it, transformers shows no bar of weights that are in memory already, and no names of a file as they are."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def most_positions(config: Any, owner: str) -> int | None:
    """Tokens that a model takes, by its config; None for any number. Raises ValueError for what is no number of tokens."""
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and (type(most) is not int or most < 1):
        raise ValueError(f"{owner}: config.json: max_position_embeddings: expected a whole number of at least 1, got {most!r}")
    return most


def load_tokenizer(folder: Path, owner: str, kind: str | None = None, *, any_class: bool = False) -> Any:
    """The tokenizer of a checkpoint.

    kind: of its model, where tokenizer_config.json does not name a class. any_class: read tokenizer.json, whatever class is named.

    transformers looks at a folder that has nothing but the files of `TOKENIZER_FILES` and what configs say of texts.

    Raises:
        ValueError: a class that is not in `TOKENIZERS`, or files that are broken or not there.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = folder / "tokenizer_config.json"
    config = read_json(path, owner) if path.is_file() else {}
    name = config.get("tokenizer_class") or TOKENIZER_OF.get(kind or "")
    name = "PreTrainedTokenizerFast" if any_class else name
    if name not in TOKENIZERS:
        raise ValueError(f"{owner}: {path}: expected tokenizer_class out of {', '.join(TOKENIZERS)}, got {name}")
    config = known_entries(config, f"{owner}: {path}")
    if not any_class:  # of a text encoder, which has no chats; a template that is none would fail when it is saved
        config.pop("chat_template", None)
    plain = name in ("PreTrainedTokenizerFast", "TokenizersBackend")
    with tempfile.TemporaryDirectory() as shown:
        for file in TOKENIZER_FILES:
            if (folder / file).is_file():
                check_tokenizer_file(folder / file, owner)
                shutil.copyfile(folder / file, Path(shown, file))
        if (path := folder / TOKENS).is_file():
            tokens = known_entries(read_json(path, owner), f"{owner}: {path}")
            Path(shown, TOKENS).write_text(json.dumps(tokens), encoding="utf-8")
        Path(shown, "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": name}), encoding="utf-8")
        if kind is not None:
            Path(shown, "config.json").write_text(json.dumps({"model_type": kind}), encoding="utf-8")
        reader = PreTrainedTokenizerFast if plain else AutoTokenizer
        try:
            return reader.from_pretrained(shown, local_files_only=True, trust_remote_code=False)
        except BaseException as error:
            if not is_librarys(error):
                raise
            raise ValueError(f"{owner}: {folder}: expected a tokenizer, got {error}") from None

"""Prompts made long by a chat model from a local folder: a small one that has learned one answer."""

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from command_line import sora
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from sora_model.caption.chat import INSTRUCTION, ChatExpander
from sora_model.data import read_comment
from sora_model.storage.pretrained import open_pretrained

PROMPT = "a red circle"
ANSWER = "a large red circle moves right , slowly"
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE


def words(template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    special = ["<pad>", "<end>", "<system>", "<user>", "<assistant>", "<think>", "</think>"]
    listed = [*special, *dict.fromkeys(f"{INSTRUCTION} {PROMPT} {ANSWER}".replace(",", " , ").replace(".", " . ").split())]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(listed)}, unk_token="a"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<end>")
    tokenizer.add_special_tokens({"additional_special_tokens": special[2:5]})
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers PROMPT with ANSWER after thinking, and ends, with a system message or with all in one."""
    torch.manual_seed(0)
    tokenizer = words()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        eos_token_id=1, pad_token_id=0, bos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    system = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": PROMPT}]
    batches = []
    for asked in (system, [{"role": "user", "content": f"{INSTRUCTION}\n\n{PROMPT}"}]):
        text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(f"{text}<think> a red </think> {ANSWER} <end>", return_tensors="pt").input_ids
        labels = ids.clone()
        labels[:, : len(tokenizer(text).input_ids)] = -100
        batches.append((ids, labels))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = sum(model(input_ids=ids, labels=labels).loss for ids, labels in batches)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("chat")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_prompts_are_answered(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What the model thinks is left out; answers that are too long are cut, which is said."""
    expander = ChatExpander.from_pretrained(folder)
    assert expander.expand([PROMPT, PROMPT]) == [ANSWER, ANSWER]
    assert not caplog.messages
    short = ChatExpander.from_pretrained(folder, longest=6)
    with caplog.at_level(logging.WARNING):
        assert short.expand([PROMPT]) == ["a large"]
    assert caplog.messages == ["the chat model's answer to 'a red circle' is cut at 6 tokens"]
    for length in (2, 4):  # within what it thinks, and at its end
        with pytest.raises(ValueError, match="expected an answer to 'a red circle', got none"):
            ChatExpander.from_pretrained(folder, longest=length).expand([PROMPT])
    with pytest.raises(TypeError, match=r"expand: prompts: expected a list of texts, got 'a red'"):
        expander.expand("a red")
    with pytest.raises(ValueError, match=r"prompts: expected at most 1792 tokens with its instruction, got \d+: 'a a"):
        expander.expand(["a " * 2048])
    assert ChatExpander.from_pretrained(folder, dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_a_model_that_cannot_answer_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some configs say only then what their model cannot do, such as more experts for a token than there are."""
    expander = ChatExpander.from_pretrained(folder)

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("selected index k out of range")

    monkeypatch.setattr(expander.model, "generate", fails)
    with pytest.raises(ValueError, match="ChatExpander: model: expected one that can answer, got selected index k out of range"):
        expander.expand([PROMPT])


def test_templates_without_a_system_role(folder: Path) -> None:
    expander = ChatExpander.from_pretrained(folder)
    expander.tokenizer.chat_template = STRICT
    assert expander.expand([PROMPT]) == [ANSWER]
    for template in ("{% if %}", "{{ raise_exception('never') }}"):
        expander.tokenizer.chat_template = template
        with pytest.raises(ValueError, match="expected a chat template that takes a prompt, got"):
            expander.expand([PROMPT])


def test_templates_see_lists_of_tokens(folder: Path) -> None:
    """As transformers before 5 has them."""

    class Older:
        special_tokens_map = {"eos_token": "<end>", "additional_special_tokens": ["<system>", "<user>"]}  # noqa: RUF012

        def __getattr__(self, name: str) -> object:
            return getattr(tokenizer, name)

    tokenizer = words("{{ eos_token }}{% for one in additional_special_tokens %} {{ one }}{% endfor %}")
    expander = ChatExpander.from_pretrained(folder)
    expander.tokenizer = Older()
    assert expander._rendered([]) == "<end> <system> <user>"


def test_commands(folder: Path, tmp_path: Path) -> None:
    assert sora("expand", PROMPT, "--chat-model", folder) == f"{ANSWER}\n"
    out = sora("generate", PROMPT, "--chat-model", folder, "--size", "1x32x32", "--steps", 1, "--out", tmp_path / "out")
    assert f"{PROMPT} -> {ANSWER}" in out
    settings = json.loads(read_comment(next((tmp_path / "out").glob("00*.png"))))
    assert (settings["prompt"], settings["asked"], settings["chat_model"]) == (ANSWER, PROMPT, str(folder))
    message = sora("expand", PROMPT, "--chat-model", tmp_path / "none", code=2)
    assert "error: --chat-model: expected a folder with config.json, got " in message
    message = sora("generate", PROMPT, "--chat-model", tmp_path / "none", "--out", tmp_path / "out", code=2)
    assert "error: --chat-model: expected a folder, got " in message


def edited(folder: Path, target: Path, **changes: object) -> Path:
    shutil.copytree(folder, target)
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return target


SIZE = {"vocab_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
GPT2 = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=16, n_layer=1, n_head=2)), "transformer.h.0.attn.bias"
GPT_J = GPTJForCausalLM(GPTJConfig(vocab_size=8, n_embd=16, n_layer=1, n_head=2, rotary_dim=4)), "transformer.h.0.attn.bias"
GPT_NEOX = GPTNeoXForCausalLM(GPTNeoXConfig(**SIZE, intermediate_size=32)), "gpt_neox.layers.0.attention.bias"


def config(folder: Path) -> dict[str, object]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(("model", "name"), [GPT2, GPT_J, GPT_NEOX], ids=["GPT-2", "GPT-J", "GPT-NeoX"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_older_files_have_causal_masks(model: PreTrainedModel, name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {name: torch.ones(1, 1, 32, 32).tril().to(dtype)}, path, {"format": "pt"})
    opened = open_pretrained(type(model), config(tmp_path), tmp_path, "test")
    ids = torch.arange(8)[None]
    torch.testing.assert_close(opened(ids).logits, model.eval()(ids).logits)


def test_whole_numbers_in_one_of_several_files(tmp_path: Path) -> None:
    model, name = GPT2[0], "transformer.h.0.mlp.c_fc.weight"
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    path = tmp_path / json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"][name]
    weights = load_file(path)
    save_file(weights | {name: weights[name].to(torch.int8)}, path, {"format": "pt"})
    with pytest.raises(
        ValueError, match=f"^test: {re.escape(str(tmp_path))}: {name}: expected float32, or numbers of that kind, got int8"
    ):
        open_pretrained(GPT2LMHeadModel, config(tmp_path), tmp_path, "test")


def test_what_is_refused(folder: Path, tmp_path: Path) -> None:
    for i, (changes, message) in enumerate(
        (
            ({"model_type": "clip"}, "expected model_type of a causal language model of transformers, got clip"),
            ({"model_type": "no such"}, "got no such"),
            ({"model_type": None}, "got None"),
            ({"quantization_config": {"bits": 4}}, "got a quantized llama"),
            ({"num_hidden_layers": 10**6}, "num_hidden_layers: expected at most"),
            ({"model_type": "gpt2", "n_layer": 10**6}, "n_layer: expected at most"),
            ({"num_hidden_layers": 1}, r"expected all layers that there are weights for, got none for model\.layers\.1\."),
        )
    ):
        with pytest.raises(ValueError, match=message):
            ChatExpander.from_pretrained(edited(folder, tmp_path / str(i), **changes))
    plain = tmp_path / "plain"
    shutil.copytree(folder, plain)
    (plain / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="tokenizer: expected one with a chat template"):
        ChatExpander.from_pretrained(plain)
    ids = edited(folder, tmp_path / "ids")
    (ids / "generation_config.json").write_text('{"eos_token_id": [1, "x"]}')
    with pytest.raises(ValueError, match=r"eos_token_id: expected ids of tokens, from 0 to \d+, got \[1, 'x'\]"):
        ChatExpander.from_pretrained(ids)
    (ids / "generation_config.json").write_text('{"eos_token_id": 1000000000000000000000000000000}')
    with pytest.raises(ValueError, match="eos_token_id: expected ids of tokens, from 0 to"):
        ChatExpander.from_pretrained(ids)
    with pytest.raises(ValueError, match="longest: expected a number of tokens of at least 1, got 0"):
        ChatExpander.from_pretrained(folder, longest=0)
    tokenizer = words()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="end: expected a token that ends an answer, got none"):
        ChatExpander(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=8)), tokenizer)

"""Detailed prompts from short ones by a chat model of transformers: `ChatExpander`.

Sora's report has prompts written at length before videos are made of them, as in DALL-E 3 (Betker et al., 2023), whose captions of
training say all that is to be seen. The captioner of a checkpoint does so for its own world; a chat model, for any.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..limits import check_text, limits
from ..storage.pretrained import load_tokenizer, most_positions, open_pretrained
from ..storage.tokenizer import IDS, detokenize, tokenize
from ..storage.weights import read_json
from .template import TemplateRefused, render

INSTRUCTION = (
    "You write captions for a video generator. For each request, write one caption of 60 to 100 words that describes the finished "
    "video: who or what is seen and how it looks, what it does from beginning to end, the place and its light, the style, and how "
    "the camera moves. Keep everything that the request says, and add only what fits it. Write in English, in the present tense, "
    "one paragraph, and nothing but the caption."
)
LONGEST = 256  # tokens of an answer
logger = logging.getLogger(__name__)


class ChatExpander:
    """A chat model that makes prompts long, most likely word after most likely word.

    >>> expander = ChatExpander.from_pretrained("checkpoints/qwen")                    # doctest: +SKIP
    >>> expander.expand(["a cat walks through snow"])                                  # doctest: +SKIP
    ['A grey cat with a thick coat walks through deep snow ...']

    Args:
        model: a causal language model of transformers, on any device.
        tokenizer: its tokenizer, with a chat template.
        longest: tokens of an answer, behind which it is cut, which is said.
        instruction: the system message before each prompt.
        end: ids of tokens that end an answer; default: the tokenizer's end.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, longest: int = LONGEST, instruction: str = INSTRUCTION, end: Sequence[int] = ()
    ) -> None:
        if not tokenizer.chat_template:
            raise ValueError("ChatExpander: tokenizer: expected one with a chat template, as models that answer have, got none")
        if type(longest) is not int or longest < 1:
            raise ValueError(f"ChatExpander: longest: expected a number of tokens of at least 1, got {longest!r}")
        self.model: Any = model.eval().requires_grad_(False)
        self.tokenizer, self.longest, self.instruction = tokenizer, longest, instruction
        own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.end = sorted({*own, *end})
        if not self.end:
            raise ValueError("ChatExpander: end: expected a token that ends an answer, got none")

    @torch.no_grad()
    def expand(self, prompts: Sequence[str]) -> list[str]:
        """A long and detailed prompt for each short one.

        Raises:
            TypeError: one text in place of several. ValueError: a prompt longer than the model takes; the model answered nothing.
        """
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise TypeError(f"ChatExpander.expand: prompts: expected a list of texts, got {prompts!r}")
        return [self._answer(prompt) for prompt in prompts]  # one by one: padding in front is not the same to all models

    def _answer(self, prompt: str) -> str:
        check_text(prompt, "ChatExpander.expand: prompts")
        asked = [{"role": "system", "content": self.instruction}, {"role": "user", "content": prompt}]
        try:
            text = self._rendered(asked)
        except TemplateRefused:  # templates refuse roles that they do not know
            both = [{"role": "user", "content": f"{self.instruction}\n\n{prompt}"}]
            try:
                text = self._rendered(both)
            except TemplateRefused as error:
                raise ValueError(f"ChatExpander: tokenizer: expected a chat template that takes a prompt, got {error}") from None
        rows = self.model.get_input_embeddings().num_embeddings
        batch = tokenize(self.tokenizer, text, rows, "ChatExpander", add_special_tokens=False, return_tensors="pt")
        ids = batch["input_ids"].to(self.model.device)
        if not ids.shape[1]:
            raise ValueError("ChatExpander: tokenizer: expected a chat template that takes a prompt, got one that writes nothing")
        most = most_positions(self.model.config, "ChatExpander")
        if most is not None and ids.shape[1] + self.longest > most:
            expected = f"at most {most - self.longest} tokens with its instruction"
            raise ValueError(f"ChatExpander: prompts: expected {expected}, got {ids.shape[1]}: {prompt!r}")
        options = {"max_new_tokens": self.longest, "do_sample": False, "eos_token_id": self.end, "pad_token_id": self.end[0]}
        try:
            made = self.model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :]
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of any kind, as a config may say what its model cannot do
            raise ValueError(
                f"ChatExpander: model: expected one that can answer, got {str(error) or type(error).__name__}"
            ) from None
        if made[-1].item() not in self.end:
            logger.warning("the chat model's answer to %r is cut at %d tokens", prompt, self.longest)
        answer = re.sub(r"(?s)^.*</think>|<think>.*", "", detokenize(self.tokenizer, made, "ChatExpander"))
        answer = re.sub(r"\s+", " ", answer).strip().strip('"“”').strip()
        if not answer:
            raise ValueError(f"ChatExpander: expected an answer to {prompt!r}, got none")
        return answer

    def _rendered(self, messages: list[dict[str, str]]) -> str:
        special: dict[str, Any] = {  # transformers before 5 has lists of others among them, and gives templates these, too
            name: [str(one) for one in token] if isinstance(token, list | tuple) else str(token)
            for name, token in self.tokenizer.special_tokens_map.items()
        }
        variables = {**special, "add_generation_prompt": True, "tools": None, "documents": None}
        variables["enable_thinking"] = False  # of Qwen3's template
        longest = 4 * (limits().text + len(self.instruction))
        return render(self.tokenizer.get_chat_template(), messages, variables, longest)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, **options: Any
    ) -> ChatExpander:
        """Reads any causal language model of transformers with tokenizer.json and safetensors from a local folder.

        dtype: of the weights; default: that of the files. options: see `ChatExpander`.

        Raises:
            FileNotFoundError: no config.json or no safetensors there.
            ValueError: another kind of model, a tokenizer without a chat template; weights that are broken or not finite.
        """
        from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

        folder, owner = Path(folder), "ChatExpander.from_pretrained"
        config = read_json(folder / "config.json", owner, constants=True)
        name = str(config.get("model_type"))
        kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(CONFIG_MAPPING[name], None) if name in CONFIG_MAPPING else None
        if kind is None or config.get("quantization_config"):
            got = name if kind is None else f"a quantized {name}"
            expected = "expected model_type of a causal language model of transformers"
            raise ValueError(f"{owner}: {folder / 'config.json'}: {expected}, got {got}")
        tokenizer = load_tokenizer(folder, owner, any_class=True)
        model = open_pretrained(kind, config, folder, owner, dtype).to(device)
        path = folder / "generation_config.json"
        end = (read_json(path, owner) if path.is_file() else config).get("eos_token_id")
        listed = end if isinstance(end, list) else [] if end is None else [end]
        if not all(type(one) is int and 0 <= one < IDS for one in listed):
            raise ValueError(f"{owner}: {folder}: eos_token_id: expected ids of tokens, from 0 to {IDS - 1}, got {end!r}")
        return cls(model, tokenizer, end=listed, **options)

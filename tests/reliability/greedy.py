"""Entries of a checkpoint's files that are sound by themselves and ask for much time, memory or other files: `asked`."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np

MANY = [f"<{i}>" for i in range(20_000)]
PIECE = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(b"\4\0\0\0" + bytes(4) + b"x" * 2**20).decode()}
TEXT_TWICE = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 2, "special_tokens": {}}
# Entries that are sound by themselves and ask for much, by the file that may have them.
ASKED: dict[str, list[dict[str, Any]]] = {
    "config.json": [
        {"_class_name": "AutoencoderKLWan", "num_res_blocks": 10**6},
        {"_class_name": "AutoencoderKLWan", "dim_mult": [1] * 10**5, "temperal_downsample": [False] * 10**5},
        {"_class_name": "AutoencoderKLCogVideoX", "block_out_channels": [32] * 10**5},
        {"model_type": "gpt_neo", "attention_types": [[["global"], 10**9]]},
        {
            "model_type": "gpt_neo",
            "hidden_size": 2,
            "num_heads": 1,
            "num_layers": 1,
            "attention_types": [[["global"], 1]],
            "vocab_size": 8,
            "max_position_embeddings": 200_000,
        },
        {"max_position_embeddings": "512"},
        {"relative_attention_max_distance": 8},
        {"timestep_shift": "x", "rope_theta": "x", "num_frames": "x"},
        {"model_type": []},
    ],
    "scheduler_config.json": [
        {"solver_order": 2**40},
        {"_class_name": "UniPCMultistepScheduler", "solver_order": 2**40},
        {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 2**31, "trained_betas": [0.1]},
        {"_class_name": "UniPCMultistepScheduler", "solver_p": {"a": 1}},
        {"_class_name": "UniPCMultistepScheduler", "disable_corrector": 3},
        {"_class_name": "EulerDiscreteScheduler", "trained_betas": [0.1] * 10**6, "timestep_type": "continuous"},
        {"shift": 1e308, "flow_shift": 1e308},
    ],
    "tokenizer_config.json": [
        {"tokenizer_class": "T5Tokenizer", "extra_ids": 10**6},
        {"extra_special_tokens": MANY},
        {"additional_special_tokens": MANY},
        {"added_tokens_decoder": {str(2**31): {"content": "x"}}},
        {"unk_token": "x" * 10**6},
        {"model_max_length": "512"},
        {"added_tokens_decoder": [5]},
        {"gguf_file": "x", "vocab": {"a": 0}, "init_inputs": [1], "model_input_names": []},
    ],
    "tokenizer.json": [
        {"decoder": {"type": "Strip", "content": "a", "start": 1, "stop": 1}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKD"}] * 3}},
        {"normalizer": {"type": "Prepend", "prepend": "x" * 2**18}},
        {"normalizer": PIECE},
        {"post_processor": {"type": "Sequence", "processors": [TEXT_TWICE] * 30}},
        {"model": {"type": "WordLevel", "vocab": {"x" * 2**22: 0}, "unk_token": "x" * 2**22}},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "continuing_subword_prefix": "x" * 2**22}},
        {"model": {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "a", "max_input_chars_per_word": 10**9}},
        {"added_tokens": [{"id": i, "content": one, "special": True} for i, one in enumerate(MANY)]},
        {"values": [[]] * 10**7},
    ],
}


def asked(path: Path, rng: np.random.Generator) -> str:
    """One of ASKED, in the file or in one that overrules it."""
    values = ASKED[path.name][int(rng.integers(len(ASKED[path.name])))]
    if path.name == "tokenizer_config.json" and rng.random() < 0.4:
        path.write_text(
            json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name == "tokenizer_class"})
        )
        path = path.with_name("special_tokens_map.json")
        values = {**values, "tokenizer_file": "/etc/passwd"}
    there = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**there, **values}))
    return f"{path.name}: {json.dumps(values)[:80]}"

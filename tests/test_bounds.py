"""What a checkpoint may ask for by its configs and tokenizers: all else is refused, before it takes time or memory."""

import base64
import json
import threading
import time
from pathlib import Path

import pytest
import torch
from command_line import refused
from diffusers import UniPCMultistepScheduler
from safetensors.torch import save_file
from small_pipeline import small_pipeline
from test_pretrained_text import MODELS, tokenizer
from transformers import GPTNeoForCausalLM

from sora_model.codec.vae import VideoVAE
from sora_model.diffusion.sampling import sample
from sora_model.diffusion.schedulers import CLASSES, FLOW, load_scheduler
from sora_model.pipeline.parts import Defaults
from sora_model.storage.pretrained import load_tokenizer, open_pretrained
from sora_model.storage.tokenizer import tokenize
from sora_model.storage.weights import built_without_memory, read_index
from sora_model.text.pretrained import PretrainedEncoder
from sora_model.text.words import Vocabulary
from sora_model.training.resume import read_state


@pytest.fixture(autouse=True)
def _quick():
    """Of a processor: the promise is 10 s for a whole command."""
    before = time.process_time()
    yield
    assert time.process_time() - before < 5


@pytest.fixture
def folder(tmp_path) -> Path:
    """A config that is to be written, beside one tensor under both names of weights."""
    for name in ("diffusion_pytorch_model", "model"):
        save_file({"weight": torch.zeros(1)}, tmp_path / f"{name}.safetensors", {"format": "pt"})
    return tmp_path


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("AutoencoderKLWan", {"num_res_blocks": 10**6}),
        ("AutoencoderKLWan", {"dim_mult": [1] * 10**5, "temperal_downsample": [False] * 10**5}),
        (
            "AutoencoderKLHunyuanVideo",
            {"block_out_channels": [32] * 10**5, "down_block_types": ["HunyuanVideoDownBlock3D"] * 10**5},
        ),
        ("AutoencoderKLCogVideoX", {"block_out_channels": [32] * 10**5, "down_block_types": ["CogVideoXDownBlock3D"] * 10**5}),
        ("AutoencoderKLCosmos", {"encoder_block_out_channels": [32] * 10**5}),
    ],
)
def test_a_model_has_few_parts_for_each_tensor(kind, values, folder) -> None:
    (folder / "config.json").write_text(json.dumps({"_class_name": kind, **values}))
    for read in (VideoVAE.read_compression, VideoVAE.from_pretrained):
        with pytest.raises(ValueError, match=r"config\.json: "):
            read(folder)


def test_parts_are_counted_in_the_thread_that_builds(folder) -> None:
    def build() -> torch.nn.Module:
        other = threading.Thread(target=lambda: [torch.nn.Linear(1, 1) for _ in range(1000)])
        other.start()
        other.join()
        return torch.nn.Linear(1, 1)

    built_without_memory(build, {}, {"weight": (1, 1)}, "owner", "config.json")
    many = {"kind": lambda: torch.nn.ModuleList(torch.nn.ReLU() for _ in range(2000)), "config": {}, "shapes": {}}
    with pytest.raises(
        ValueError, match=r"owner: config\.json: expected a model for the 0 tensors beside it, got one of more than 1,000"
    ):
        built_without_memory(**many, owner="owner", file="config.json")
    assert len(many["kind"]()) == 2000  # outside, nobody counts


def test_buffers_are_bounded(folder) -> None:
    """GPT-Neo's layers have a mask each, of the square of the longest text, which no file has."""
    sizes = {"vocab_size": 8, "hidden_size": 2, "num_heads": 1, "num_layers": 1, "attention_types": [[["global"], 1]]}
    values = {**sizes, "bos_token_id": 0, "eos_token_id": 1}
    save_file({"weight": torch.zeros(500_000)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"config\.json: expected a model with buffers of at most 268,435,456 bytes, got 40,000,000,"
    ):
        open_pretrained(GPTNeoForCausalLM, {**values, "max_position_embeddings": 200_000}, folder, "owner")
    with pytest.raises(ValueError, match=r"config\.json: attention_types: expected at most"):
        open_pretrained(GPTNeoForCausalLM, {**values, "attention_types": [[["global"], 10**9]]}, folder, "owner")


@pytest.fixture
def words(tmp_path) -> Path:
    """A tokenizer of transformers, and one of T5, whose class takes more from its config."""
    tokenizer().save_pretrained(tmp_path)
    return tmp_path


def rewrite(path: Path, **values: object) -> None:
    there = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**there, **values}))


def as_t5(folder: Path) -> None:
    model = {"type": "Unigram", "unk_id": 2, "vocab": [["<pad>", 0], ["</s>", 0], ["<unk>", 0], ["a", -1]]}
    rewrite(folder / "tokenizer.json", model=model, added_tokens=[], post_processor=None)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)


MANY = [f"<{i}>" for i in range(40_000)]


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("tokenizer_config", {"extra_ids": 10**6}, "extra_ids: expected a whole number from 0 to 8192, got 1000000"),
        ("tokenizer_config", {"extra_ids": "x"}, "extra_ids: expected a whole number from 0 to 8192, got 'x'"),
        ("special_tokens_map", {"extra_ids": 10**6}, "extra_ids: expected a whole number from 0 to 8192"),
        ("tokenizer_config", {"extra_special_tokens": MANY}, "extra_special_tokens: expected at most 8192 added tokens, got 40000"),
        ("special_tokens_map", {"additional_special_tokens": MANY}, "expected at most 8192 added tokens, got 40000"),
        ("tokenizer_config", {f"{one}_token": one for one in MANY}, "expected at most 8192 added tokens, got"),
        ("tokenizer_config", {"added_tokens_decoder": {"1000000000": {"content": "x"}}}, "expected ids below 4194304"),
        ("tokenizer_config", {"added_tokens_decoder": [5]}, "added_tokens_decoder: expected an object, got list"),
        ("tokenizer_config", {"added_tokens_decoder": True}, "added_tokens_decoder: expected an object, got bool"),
        ("added_tokens", {one: i for i, one in enumerate(MANY)}, "expected at most 8192 added tokens, got 40000"),
        ("tokenizer", {"added_tokens": [{"id": i, "content": one} for i, one in enumerate(MANY)]}, "at most 8192 added tokens"),
        ("tokenizer_config", {"unk_token": "x" * 10**6}, "expected texts of at most 1024 bytes, got 'xxx"),
        ("tokenizer_config", {"model_max_length": "512"}, "model_max_length: expected a whole number of at least 1, got '512'"),
        ("tokenizer_config", {"model_max_length": 0}, "model_max_length: expected a whole number of at least 1, got 0"),
        ("tokenizer_config", {"model_max_length": 1.5}, "model_max_length: expected a whole number of at least 1, got 1.5"),
    ],
)
def test_tokens_are_bounded(file, values, message, words) -> None:
    as_t5(words)
    load_tokenizer(words, "owner")
    rewrite(words / f"{file}.json", **values)
    with pytest.raises(ValueError, match=rf"owner: .*{file}\.json: .*{message}"):
        load_tokenizer(words, "owner")


def test_limits_that_tokenizers_have_are_read(words) -> None:
    for limit, length in ((512, 512), (1e30, 10**30), (10**30, 10**30), (None, 10**30)):
        rewrite(words / "tokenizer_config.json", model_max_length=limit)
        assert load_tokenizer(words, "owner").model_max_length == pytest.approx(length)


def test_no_entry_names_another_file(words, tmp_path) -> None:
    """Entries of special_tokens_map.json would overrule the folder's own files."""
    before = load_tokenizer(words, "owner")("a red circle").input_ids
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        rewrite(words / file, tokenizer_file="/nowhere.json", gguf_file="x", vocab={"a": 0}, init_inputs=[1], model_input_names=[])
        (words / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
        batch = load_tokenizer(words, "owner")("a red circle")
        assert batch.input_ids == before
        assert batch.attention_mask


def charsmap(text: bytes) -> str:
    return base64.b64encode(bytes([4, 0, 0, 0]) + bytes(4) + text + b"\0").decode()


PREPEND = {"type": "Prepend", "prepend": "x" * 300}
COPIES = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 2, "special_tokens": {}}
SPECIAL = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x"}}] * 9, "special_tokens": {"x": {"ids": [0] * 99}}}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"model": {"type": "BPE", "vocab": [0] * (2**20 + 1)}}, "model: expected a vocabulary of at most 1048576 tokens, got"),
        ({"model": {"type": "BPE", "vocab": {"a": 10**9}}}, "model: expected ids from 0 to 4194303, got 1000000000"),
        ({"added_tokens": [{"id": 10**9, "content": "x"}]}, "added_tokens: expected ids from 0 to 4194303, got 1000000000"),
        ({"normalizer": PREPEND}, "expected rules that make a text at most 160 times as long"),
        ({"normalizer": {"normalizers": [{"prepend": "x" * 40}] * 2}}, "expected rules that make a text at most 160 times"),
        ({"normalizer": {"normalizers": [{"type": "NFKD"}, {"prepend": "x" * 20}]}}, "expected rules that make a text at most 160"),
        (
            {"normalizer": {"prepend": "x" * 40}, "pre_tokenizer": {"content": "x" * 40}},
            "expected rules that make a text at most 160",
        ),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap(b"x" * 300)}}, "expected rules that make a text"),
        ({"model": {"type": "BPE", "continuing_subword_prefix": "x" * 2000}}, "model: expected texts of at most 1024 bytes"),
        ({"model": {"type": "BPE", "end_of_word_suffix": "x" * 2000}}, "model: expected texts of at most 1024 bytes"),
        (
            {"model": {"type": "WordLevel", "vocab": {"x" * 2000: 0}, "unk_token": "x" * 2000}},
            "expected texts of at most 1024 bytes",
        ),
        (
            {"model": {"type": "WordPiece", "max_input_chars_per_word": 10**9}},
            "max_input_chars_per_word: expected a whole number from",
        ),
        ({"post_processor": {"processors": [COPIES] * 9}}, "post_processor: expected templates that have a text at most twice"),
        ({"post_processor": {"processors": [SPECIAL] * 9}}, "post_processor: expected templates that have a text at most twice"),
        (
            {"post_processor": {"special_tokens": {"x": {"ids": [0], "tokens": ["x" * 2000]}}}},
            "expected texts of at most 1024 bytes",
        ),
    ],
)
def test_rules_of_tokenizers_are_bounded(section, message, words) -> None:
    rewrite(words / "tokenizer.json", **section)
    with pytest.raises(ValueError, match=rf"owner: .*tokenizer\.json: .*{message}"):
        load_tokenizer(words, "owner")


def field(number: int, value: bytes) -> bytes:
    size, length = b"", len(value)
    while length > 127:
        size, length = size + bytes([length & 127 | 128]), length >> 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + value


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (field(1, field(1, b"x" * 2000)), "expected pieces of at most 1024 bytes"),
        (field(3, field(2, base64.b64decode(charsmap(b"x" * 300)))), "expected rules that make a text at most 160 times as long"),
        (b"\x0a" * 2**22, r"expected at most 4194304 lines or pieces, got 4194305; 'sora --limit json-items=4194305 "),
        (b"\x10\0" * (2**20 + 300), "expected a vocabulary of at most 1048576 tokens, got more"),
        (field(3, b"\x10\0" * (2**20 + 300)), "expected a vocabulary of at most 1048576 tokens, got more"),
        (b"\xff" * 20, "expected a model of SentencePiece"),
        (field(1, b"x")[:-1], "expected a model of SentencePiece"),
    ],
)
def test_models_of_sentencepiece_are_bounded(data, message, words) -> None:
    (words / "spiece.model").write_bytes(field(1, field(1, b"a")) + field(3, field(2, base64.b64decode(charsmap(b"a")))))
    load_tokenizer(words, "owner")
    (words / "spiece.model").write_bytes(data)
    with pytest.raises(ValueError, match=rf"owner: .*spiece\.model: {message}"):
        load_tokenizer(words, "owner")


def test_values_of_json_are_counted_before_they_are_read(words) -> None:
    text = '{"a": [' + "[]," * 2**21 + "[]]}"
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"):
        path = words / file
        before = path.read_bytes() if path.is_file() else None
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"owner: .*{file}: expected at most 4194304 lists, objects and values, got"):
            load_tokenizer(words, "owner")
        path.unlink() if before is None else path.write_bytes(before)
    save_file({"weight": torch.zeros(1)}, words / "training.safetensors", {"state": text})
    with pytest.raises(
        ValueError, match=r"Trainer: .*training\.safetensors: expected at most 4194304 lists, objects and values, got"
    ):
        read_state(words / "training.safetensors")
    (words / "vocab.txt").write_text("ab " * 2**22)
    with pytest.raises(ValueError, match=r"vocab\.txt: expected at most 1048576 words"):
        Vocabulary.read(words)


def test_the_wrong_id_is_named() -> None:
    with pytest.raises(ValueError, match="owner: tokenizer: expected ids from 0 to 7, got -1"):
        tokenize(lambda texts: {"input_ids": [[3, -1]]}, ["a"], 8, "owner")


def test_no_memory_is_no_fault_of_a_tokenizer() -> None:
    def full(texts: list[str]) -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        tokenize(full, ["a"], 8, "owner")


def test_positions_are_a_number(tmp_path) -> None:
    model = MODELS["t5"]()
    model.config.max_position_embeddings = "512"
    with pytest.raises(
        ValueError, match=r"PretrainedEncoder: config\.json: max_position_embeddings: expected a whole number of at"
    ):
        PretrainedEncoder(model, tokenizer())


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"solver_order": 2**40}, "solver_order: expected a whole number from 1 to 3, got 1099511627776"),
        ({"solver_order": 0}, "solver_order: expected a whole number from 1 to 3, got 0"),
        ({"num_train_timesteps": 10**9}, "num_train_timesteps: expected a whole number from 1 to 100000"),
        ({"trained_betas": [0.1] * 200_000}, "trained_betas: expected at most 100000 numbers, got 200000"),
        ({"trained_betas": [0.1] * 9}, "trained_betas: expected 1000 numbers, as num_train_timesteps says, got 9"),
        ({"shift": -0.5}, "shift: expected a number above 0, got -0.5"),
        ({"flow_shift": 0}, "flow_shift: expected a number above 0, got 0"),
        ({"solver_p": 3}, "expected a scheduler that can make 4 steps, got 'int' object has no attribute 'set_timesteps'"),
        ({"shift": 1e308, "flow_shift": 1e308, "trained_betas": [2.0] * 1000}, "expected a scheduler that can make 4 steps, got"),
        ({"steps_offset": "x", "shift": "x", "flow_shift": "x", "timestep_spacing": "leading"}, ""),
    ],
)
def test_schedulers_make_steps_before_they_are_taken(name, values, message, tmp_path) -> None:
    flow = dict(FLOW.values()).get(name, {})
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": name, **flow}))
    before = torch.random.get_rng_state()
    load_scheduler(tmp_path, "owner")
    assert torch.equal(before, torch.random.get_rng_state())
    path.write_text(json.dumps({"_class_name": name, **flow, **values}))
    if "solver_p" in values and name != "UniPCMultistepScheduler":
        return
    with pytest.raises(ValueError, match=rf"owner: .*scheduler_config\.json: {message}"):
        load_scheduler(tmp_path, "owner")


def test_flow_matching_predicts_velocities(tmp_path) -> None:
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "prediction_type": "epsilon"}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="prediction_type: expected flow_prediction for FlowMatchEulerDiscreteScheduler, got 'eps"):
        load_scheduler(tmp_path, "owner")


def test_a_number_of_steps_that_a_scheduler_cannot_make_is_named() -> None:
    scheduler = UniPCMultistepScheduler(num_train_timesteps=3, **FLOW["unipc"][1])
    with pytest.raises(ValueError, match="sample: scheduler: expected one that can make 4 steps, got AssertionError"):
        sample(lambda latents, *_: latents, scheduler, [torch.zeros(1, 1, 2, 2)], num_inference_steps=4)


@pytest.mark.parametrize(
    "values", [{"num_labels": 10**7}, {"return_dict": False}, {"torchscript": True}, {"output_attentions": True}]
)
def test_what_configs_of_other_tasks_say_is_left_out(values, tmp_path) -> None:
    PretrainedEncoder(MODELS["t5"](), tokenizer()).save_pretrained(tmp_path)
    before = PretrainedEncoder.from_pretrained(tmp_path)(["a red circle"])
    rewrite(tmp_path / "config.json", **values)
    assert torch.equal(PretrainedEncoder.from_pretrained(tmp_path)(["a red circle"]).tokens, before.tokens)


def test_tables_that_are_no_buffers_are_bounded() -> None:
    class Table(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.zeros(2**27)

    with pytest.raises(
        ValueError, match=r"owner: config\.json: expected a model with buffers of at most 268,435,456 bytes, got 536,870,912"
    ):
        built_without_memory(Table, {}, {}, "owner", "config.json")


@pytest.mark.parametrize(
    "values",
    [{"num_inference_steps": 10**9}, {"num_inference_steps": 2.5}, {"guidance_scale": -1}, {"guidance_from": 2}, {"fps": 0}],
)
def test_a_checkpoint_recommends_little(values, tmp_path) -> None:
    (name,) = values
    index = {"_class_name": "SoraPipeline", "size": [1, 16, 16], "vae": False, "captioner": False}
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "defaults": {name: 1}}))
    read_index(tmp_path, "owner")
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "defaults": values}))
    with pytest.raises(ValueError, match=rf"owner: model_index\.json: defaults: {name}: expected a .*number from"):
        read_index(tmp_path, "owner")
    pipeline = small_pipeline().replaced(defaults=Defaults(**values))
    with pytest.raises(ValueError, match=rf"SoraPipeline\.save_pretrained: defaults: {name}: expected a .*number from"):
        pipeline.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_lead_to_nan_are_the_checkpoints(tmp_path) -> None:
    pipeline = small_pipeline()
    for value in pipeline.text_encoder.parameters():
        value.data.fill_(torch.finfo(value.dtype).max)
    pipeline.save_pretrained(tmp_path / "large")
    command = ["generate", "a cat", "--checkpoint", tmp_path / "large", "--steps", 1, "--out", tmp_path / "out"]
    assert f"error: --checkpoint: {tmp_path / 'large'}: got NaN in the video of 'a cat'" in refused(*command)
    assert not (tmp_path / "out").exists()

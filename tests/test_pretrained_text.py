"""Text encoders of transformers from a local folder: packed as they are alone, frozen, saved with a pipeline and loaded again."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from sora_model import SoraPipeline
from sora_model.data import Batch
from sora_model.text.pretrained import MOST_TOKENS, PretrainedEncoder, load_text_encoder
from sora_model.training.dit import DiffusionObjective
from sora_model.world.config import WorldConfig
from sora_model.world.source import WorldSource
from sora_model.world.world import World

WORDS = ["<pad>", "<end>", "a", "red", "blue", "circle", "moves", "right"]
SIZES = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 16, "dropout_rate": 0.5}
CAPTIONS = ["a red circle moves right", "", "blue"]


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")


def clip() -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=6, eos_token_id=1, pad_token_id=0, bos_token_id=2,
    )  # fmt: skip
    return CLIPTextModel(config)


MODELS = {"t5": lambda: T5EncoderModel(T5Config(**SIZES)), "umt5": lambda: UMT5EncoderModel(UMT5Config(**SIZES)), "clip": clip}


@pytest.fixture(params=MODELS)
def folder(request, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    MODELS[request.param]().save_pretrained(tmp_path / "encoder")
    tokenizer().save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_captions_are_packed_as_they_are_alone(folder: Path) -> None:
    encoder = PretrainedEncoder.from_pretrained(folder).train()
    text = encoder(CAPTIONS)
    assert (encoder.dim, text.cu_seqlens.tolist(), tuple(text.pooled.shape)) == (16, [0, 6, 7, 9], (3, 16))
    assert not text.tokens.requires_grad
    for i, caption in enumerate(CAPTIONS):
        alone = encoder([caption])
        start, end = text.cu_seqlens[i : i + 2].tolist()
        torch.testing.assert_close(text.tokens[start:end], alone.tokens, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(text.pooled[i], alone.pooled[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(TypeError, match="captions: expected a list of strings, got one string"):
        encoder("a red circle")


def test_a_caption_too_long_for_clip_is_cut(tmp_path: Path) -> None:
    encoder = PretrainedEncoder(clip(), tokenizer())
    assert encoder(["a red circle moves right right right"]).cu_seqlens.tolist() == [0, 6]
    assert PretrainedEncoder(MODELS["t5"](), tokenizer())(["a " * 90]).cu_seqlens.tolist() == [0, 91]


def test_a_pipeline_trains_beside_it_and_keeps_it(folder: Path, tmp_path: Path) -> None:
    encoder = PretrainedEncoder.from_pretrained(folder)
    pipeline = SoraPipeline.from_preset("tiny", patch=(1, 8, 8), text_encoder=encoder)
    objective = DiffusionObjective(pipeline)
    assert list(dict(objective.model.named_children())) == ["dit"], "the encoder is not trained"
    source = WorldSource(World(WorldConfig.simple()), [(2, 16, 16)])
    batch = Batch([source.load(i) for i in range(2)], [0, 1], 16)
    objective.loss(batch, torch.Generator().manual_seed(0)).backward()
    assert pipeline.dit.text_embed[0].weight.grad is not None
    pipeline.save_pretrained(tmp_path / "model")
    loaded = SoraPipeline.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(loaded.text_encoder(CAPTIONS).tokens, encoder(CAPTIONS).tokens)
    (video,) = loaded(["a red circle"], (2, 16, 16), num_inference_steps=1, generator=0)
    assert video.isfinite().all()


def test_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected a folder with config\.json"):
        PretrainedEncoder.from_pretrained(tmp_path)
    bert = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=16))
    bert.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected model_type out of t5, umt5, clip, clip_text_model, got bert"):
        load_text_encoder(tmp_path)
    with pytest.raises(ValueError, match="model: expected one of t5, umt5, clip, clip_text_model, got bert"):
        PretrainedEncoder(bert, tokenizer())
    (tmp_path / "config.json").write_text('{"model_type": []}')
    with pytest.raises(ValueError, match=r"expected model_type out of t5, umt5, clip, clip_text_model, got \[\]"):
        PretrainedEncoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("distance", [0, 8, -1, "x", True])
def test_distances_that_t5_cannot_count(distance: object, tmp_path: Path) -> None:
    """Its buckets would be numbers that no table has."""
    PretrainedEncoder(MODELS["t5"](), tokenizer()).save_pretrained(tmp_path)
    PretrainedEncoder.from_pretrained(tmp_path)(["a red circle moves right " * 9])
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "relative_attention_max_distance": distance}))
    with pytest.raises(ValueError, match=r"config\.json: relative_attention_max_distance: expected a distance above a quarter of"):
        PretrainedEncoder.from_pretrained(tmp_path)


def test_captions_are_bounded_whatever_a_tokenizer_says() -> None:
    reader = tokenizer()
    reader.model_max_length = 10**30
    encoder = PretrainedEncoder(MODELS["t5"](), reader)
    assert encoder.longest == MOST_TOKENS
    assert len(encoder(["a " * 9000]).tokens) == MOST_TOKENS
    with pytest.raises(ValueError, match=f"longest: expected 1 to {MOST_TOKENS} tokens, got 10000"):
        PretrainedEncoder(MODELS["t5"](), reader, longest=10_000)

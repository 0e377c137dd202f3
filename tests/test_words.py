"""Which words an encoder has learned: those it saw while it was trained, kept with its weights."""

import copy
from pathlib import Path

import pytest
from command_line import sora

from sora_model import SoraPipeline
from sora_model.pipeline.parts import EMBEDDED
from sora_model.sizes import Timing
from sora_model.text.pretrained import load_text_encoder
from sora_model.text.words import Vocabulary, WordEncoder
from sora_model.world.config import WorldConfig
from sora_model.world.source import WorldSource
from sora_model.world.world import World


def test_words_are_learned_in_training_only(tmp_path: Path) -> None:
    encoder = WordEncoder(8, num_heads=2, buckets=8)
    average = copy.deepcopy(encoder)
    encoder(["A red circle.", ""])
    encoder.eval()(["a blue star"])
    assert encoder.vocabulary == {"a", "red", "circle", "."}
    average.save_pretrained(tmp_path)
    assert (tmp_path / "vocab.txt").read_text() == ".\na\ncircle\nred\n", "averages of the weights are saved, with all words"
    loaded = load_text_encoder(tmp_path)
    assert loaded.vocabulary == encoder.vocabulary
    assert loaded.vocabulary.unknown(["A Kätzchen, a red dog", "dog!"]) == ["kätzchen", "dog"]


def test_words_of_an_older_checkpoint_are_not_known(tmp_path: Path) -> None:
    """Its encoder has learned words that no file lists, so that a list of the new ones alone would be wrong."""
    WordEncoder(8, num_heads=2, buckets=8).save_pretrained(tmp_path)
    assert load_text_encoder(tmp_path).vocabulary == set()
    (tmp_path / "vocab.txt").unlink()
    encoder = load_text_encoder(tmp_path).train()
    encoder(["a red circle"])
    encoder.save_pretrained(tmp_path)
    assert encoder.vocabulary is None
    assert not (tmp_path / "vocab.txt").exists()


def test_training_writes_the_words_of_its_captions(small: Path, tmp_path: Path) -> None:
    """Through averages, and on when the run goes on."""
    common = [tmp_path / "run", "--start", small, "--size", "2x16x16", "--tokens", 64]
    found = []
    for more in (["--steps", 1], ["--steps", 2, "--resume"]):
        sora("train", *common, *more)
        found.append(load_text_encoder(tmp_path / "run" / "checkpoint" / "text_encoder").vocabulary)
    assert {"a", "moves"} <= found[0] <= found[1]
    assert found[1] <= words_of(WorldConfig.simple())


def test_the_package_knows_the_words_of_its_world() -> None:
    encoder = SoraPipeline.from_pretrained().text_encoder
    assert encoder.vocabulary == Vocabulary.read(EMBEDDED / "text_encoder")
    assert words_of(WorldConfig.studio(5)) <= encoder.vocabulary


@pytest.mark.parametrize("word", ["astronaut", "digit", "spinning"])
def test_the_package_does_not_know_other_words(word: str) -> None:
    assert Vocabulary.read(EMBEDDED / "text_encoder").unknown([f"a {word}"]) == [word]


def words_of(config: WorldConfig) -> Vocabulary:
    from sora_model.world.training_data import LESSON_SHARES

    source = WorldSource(World(config), [(13, 8, 8), (1, 8, 8)], lessons=LESSON_SHARES, timing=Timing(1, 4))
    words = Vocabulary()
    for index in range(1500):
        sample = source.load(index)
        words.learn([sample.caption, sample.detailed or ""])
    return words

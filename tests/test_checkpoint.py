"""What is written whole or not at all: checkpoints and files, whenever a process is killed; see test_runs.py for training."""

import contextlib
import shutil
from itertools import count

import pytest
import torch
from dying import Dying, Killed

from sora_model import SoraPipeline
from sora_model.caption.captioner import Captioner, CaptionerConfig, train_tokenizer
from sora_model.codec.vae import VideoVAE
from sora_model.storage.files import check_replaceable, save_whole, settle, whole_file, whole_folder


def module(kind: str, seed: int):
    """A part that is saved as a folder; the seed says its weights."""
    torch.manual_seed(seed)
    if kind == "vae":
        return VideoVAE.small(latent_channels=4, channels=(8, 8, 8))
    tokenizer = train_tokenizer(["a red circle"], 280)
    return Captioner(
        CaptionerConfig(in_channels=3, hidden_size=16, num_heads=2, depth=1, decoder_depth=1, vocabulary=280), tokenizer
    )


@pytest.mark.parametrize(("kind", "fresh"), [("vae", False), ("vae", True), ("captioner", False)])
def test_a_folder_is_the_old_or_the_new_one_at_every_instant(kind, fresh, tmp_path) -> None:
    """What `train-vae` and `train-captioner` save. Read after a kill, it is whole."""
    old, new = module(kind, 0), module(kind, 1)
    first, second = (next(p for p in m.parameters() if p.ndim > 2).detach() for m in (old, new))
    folder, seen = tmp_path / "model", set()
    for at in count(1):
        if not fresh:
            save_whole(old, folder)
        with contextlib.suppress(Killed), Dying(tmp_path, at) as dying:
            save_whole(new, folder)
        settle(folder)
        if folder.exists():
            read = type(new).from_pretrained(folder)
            value = next(p for p in read.parameters() if p.ndim > 2)
            assert torch.equal(value, second if torch.equal(value, second) else first)
            seen.add("new" if torch.equal(value, second) else "old")
        else:
            assert fresh
            seen.add("none")
        assert not list(tmp_path.glob(".*"))
        shutil.rmtree(folder, ignore_errors=True)
        if not dying.reached:
            break
    print(f"folder of a {kind}: {at - 1} points")
    assert seen == ({"none", "new"} if fresh else {"old", "new"})


def test_a_captioner_is_put_into_a_checkpoint_or_not(small, tmp_path) -> None:
    """Whenever it is killed, what was a pipeline opens as one."""
    pipeline = SoraPipeline.from_pretrained(small)
    with_captioner = pipeline.replaced(captioner=module("captioner", 0))
    folder, seen = tmp_path / "pipeline", set()
    for at in count(1):
        pipeline.save_pretrained(folder)
        with contextlib.suppress(Killed), Dying(tmp_path, at) as dying:
            with_captioner.save_pretrained(folder)
        opened = SoraPipeline.from_pretrained(folder)  # which brings it back
        assert torch.equal(opened.dit.final.weight, pipeline.dit.final.weight)
        seen.add(opened.captioner is not None)
        if not dying.reached:
            break
    print(f"captioner into a checkpoint: {at - 1} points")
    assert seen == {True, False}


def test_only_what_a_dead_process_left_is_removed(tmp_path) -> None:
    target = tmp_path / "notes.txt"
    theirs = [
        tmp_path / name for name in (".notes.txt.part", ".notes.txt.backup.part", ".notes.txt.old", ".notes.txt.1234567.part")
    ]
    for path in theirs:
        path.mkdir()
    with whole_file(target) as alive:
        alive.write_text("of a process that lives")
        with whole_file(target) as other:
            other.write_text("of another")
        assert alive.exists()
        assert target.read_text() == "of another"
    assert target.read_text() == "of a process that lives"
    dead = tmp_path / ".notes.txt.abcd1234.part" / "new"
    dead.mkdir(parents=True)
    (dead / "notes.txt").write_text("ha")
    also = tmp_path / ".notes.txt.my_notes.part"
    also.mkdir()
    (also / "thesis.txt").write_text("years of work")
    settle(target)
    assert not dead.parent.exists()
    assert (also / "thesis.txt").exists()
    assert all(path.is_dir() for path in theirs)


def test_writing_through_a_link_keeps_it(tmp_path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "here").mkdir()
    file, folder, nowhere = (tmp_path / "here" / name for name in ("captions.txt", "checkpoint", "new.txt"))
    (tmp_path / "disk" / "captions.txt").write_text("old")
    (tmp_path / "disk" / "checkpoint").mkdir()
    file.symlink_to("../disk/captions.txt")
    folder.symlink_to(tmp_path / "disk" / "checkpoint")
    nowhere.symlink_to(tmp_path / "disk" / "new.txt")
    for path in (file, nowhere):
        with whole_file(path) as partial:
            partial.write_text("new")
    with whole_folder(folder) as partial:
        (partial / "config.json").write_text("{}")
    assert all(path.is_symlink() for path in (file, folder, nowhere))
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["captions.txt", "checkpoint", "new.txt"]
    assert (tmp_path / "disk" / "captions.txt").read_text() == (tmp_path / "disk" / "new.txt").read_text() == "new"
    assert (tmp_path / "disk" / "checkpoint" / "config.json").read_text() == "{}"


def test_others_may_read_what_was_saved(small, tmp_path) -> None:
    """As they may read any file that this user makes; safetensors makes private ones."""
    plain = tmp_path / "plain"
    plain.write_text("")
    assert {path.stat().st_mode & 0o777 for path in small.rglob("*") if path.is_file()} == {plain.stat().st_mode & 0o777}


@pytest.mark.parametrize("length", [240, 241, 255])
def test_names_may_be_as_long_as_the_file_system_lets_them(length, tmp_path) -> None:
    for write, name in ((whole_file, "a" * (length - 4) + ".mp4"), (whole_folder, "b" * length)):
        for _ in range(2):
            with write(tmp_path / name) as partial:
                (partial / "config.json" if write is whole_folder else partial).write_text("{}")
        with contextlib.suppress(Killed), Dying(tmp_path, 3) as dying, write(tmp_path / name):
            pass
        assert dying.reached
        assert list(tmp_path.glob(".*.part"))
        settle(tmp_path / name)
        assert (tmp_path / name).exists()
        assert not list(tmp_path.glob(".*"))


def test_what_file_managers_leave_behind_is_no_loss(tmp_path) -> None:
    (tmp_path / ".DS_Store").write_bytes(b"")
    check_replaceable(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    check_replaceable(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ValueError, match=r"checkpoint: expected .*, which holds README\.md"):
        check_replaceable(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"checkpoint: expected an empty folder .*, which holds README\.md"):
        check_replaceable(tmp_path)

"""What is written whole or not at all: checkpoints and files, whenever a process is killed; see test_crashes.py."""

import pytest
from reliability.interposed import Fault, Interposed, in_child

from sora_model.storage.files import check_replaceable, settle, whole_file, whole_folder


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
def test_names_may_be_as_long_as_the_file_system_lets_them(length, tmp_path, tmp_path_factory) -> None:
    for write, name in ((whole_file, "a" * (length - 4) + ".mp4"), (whole_folder, "b" * length)):
        for _ in range(2):
            with write(tmp_path / name) as partial:
                (partial / "config.json" if write is whole_folder else partial).write_text("{}")
        spare = tmp_path_factory.mktemp("spare")

        def killed(write=write, path=tmp_path / name, spare=spare) -> None:
            Interposed().arm(tmp_path, spare, 3, Fault.killed)
            with write(path):
                pass

        assert in_child(killed, spare.with_suffix(".log")).status == -9
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

"""The files that commands write: names that are not taken, inputs that stay, and what each says about itself."""

import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from command_line import sora
from PIL import Image

from sora_model import SoraPipeline
from sora_model.cli import call
from sora_model.cli.app import OneLine, say
from sora_model.cli.files import free_paths, is_contact_sheet, write_files
from sora_model.data import contact_sheet, read_comment, read_video, write_video
from sora_model.storage.files import lock_file
from sora_model.training.resume import only_run

ROOT = Path(__file__).parent.parent
CLIP = torch.zeros(3, 2, 16, 16)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("suffix", ["mp4", "gif", "png"])
@pytest.mark.parametrize("text", ["a cat", '{"prompt": "K\\u00e4tzchen"}', 700 * "long "])
def test_a_comment_comes_back(suffix, text, tmp_path) -> None:
    video = torch.rand(3, 1 if suffix == "png" else 5, 16, 24)
    plain = write_video(tmp_path / f"plain.{suffix}", video)
    commented = write_video(tmp_path / f"commented.{suffix}", video, comment=text)
    assert read_comment(commented) == text
    assert read_comment(plain) is None
    assert torch.equal(read_video(commented)[0], read_video(plain)[0]), "pixels are as without"
    assert read_video(commented)[1] == read_video(plain)[1]


def test_a_comment_of_a_gif_is_in_ascii(tmp_path) -> None:
    with Image.open(write_video(tmp_path / "a.gif", CLIP, comment="Kätzchen")) as image:
        assert image.info["comment"] == b"K\\xe4tzchen"
        assert image.n_frames == 2


def test_a_name_writes_no_line(capsys) -> None:
    record = logging.LogRecord("sora_model", logging.WARNING, "", 0, "left out: %s", ("a\nerror: b\r\u2028c.png",), None)
    OneLine().emit(record)
    assert capsys.readouterr().err == "warning: left out: a error: b c.png\n"
    say("a\nb.mp4")
    assert capsys.readouterr().out == "a b.mp4\n"


def test_names_go_on_from_those_there(tmp_path) -> None:
    assert [path.name for path in free_paths(tmp_path, ["a.mp4", "b.png"])] == ["00-a.mp4", "01-b.png", "contact_sheet.png"]
    (tmp_path / "07-other.gif").touch()
    assert [path.name for path in free_paths(tmp_path, ["a.mp4"])] == ["08-a.mp4", "contact_sheet-08.png"]
    (tmp_path / "08-a.mp4").symlink_to("nowhere")
    assert free_paths(tmp_path, ["a.mp4"])[0].name == "09-a.mp4", "a broken link is a name, too"
    (tmp_path / "notes.txt").touch()
    assert free_paths(tmp_path, ["a.mp4"], overwrite=True)[0].name == "00-a.mp4"


def test_numbers_beyond_all_counting_are_not_counted(tmp_path) -> None:
    """Or the next file would have a name that no file system takes."""
    (tmp_path / f"{240 * '9'}-a.mp4").touch()
    assert [path.name for path in free_paths(tmp_path, ["a.mp4"])] == ["00-a.mp4", "contact_sheet.png"]


def test_requests_are_not_replaced(small, tmp_path) -> None:
    """By --overwrite, even if they have the name of what is made."""
    requests = tmp_path / "00-a-seed0.png"
    requests.write_text(text := '[{"prompt": "a", "size": "1x16x16"}]')
    sora("batch", requests, "--checkpoint", small, "--out", tmp_path, "--steps", 1, "--overwrite")
    assert requests.read_text() == text
    assert (tmp_path / "01-a-seed0.png").exists()


def test_a_contact_sheet_alone_is_not_replaced(tmp_path) -> None:
    (tmp_path / "contact_sheet.png").touch()
    assert [path.name for path in free_paths(tmp_path, ["a.mp4"])] == ["01-a.mp4", "contact_sheet-01.png"]


@pytest.mark.parametrize("link", ["itself", "symbolic", "hard", "folder"])
def test_an_input_is_never_replaced(link, tmp_path) -> None:
    """Not by --overwrite, and not by another name of it."""
    source, out = tmp_path / "source.mp4", tmp_path / "out"
    out.mkdir()
    source.write_bytes(b"mine")
    target, asked, given = out / "00-a-seed0.mp4", out, source
    if link == "itself":
        source.rename(target)
        given = target
    elif link == "symbolic":
        target.symlink_to(source)
    elif link == "hard":
        os.link(source, target)
    else:
        source.rename(target)
        asked, given = tmp_path / "link", target
        asked.symlink_to(out)
    made = write_files([CLIP], ["a"], asked, [8.0], 1, "mp4", seeds=[0], overwrite=True, inputs=[given])
    assert [path.name for path in made] == ["01-a-seed0.mp4", "contact_sheet-01.png"]
    assert target.read_bytes() == b"mine"
    assert given.read_bytes() == b"mine"
    again = write_files([CLIP], ["a"], asked, [8.0], 1, "mp4", seeds=[0], overwrite=True)
    assert [path.name for path in again] == ["00-a-seed0.mp4", "contact_sheet.png"], "what is no input is"


def test_commands_keep_what_is_there(small, tmp_path) -> None:
    """Another seed, the same again, and a command whose input is the file that it would have been."""
    common = ["--checkpoint", small, "--steps", 1, "--out", tmp_path]
    kept: dict[str, bytes] = {}
    first = tmp_path / "00-a-cat-seed0.mp4"
    for args in (
        ["generate", "a cat"],
        ["generate", "a cat"],
        ["generate", "a cat", "--seed", 7],
        ["extend", first, "a cat", "--frames", 2],
        ["animate", tmp_path / "contact_sheet.png", "a cat"],
        ["extend", first, "a cat", "--frames", 2, "--overwrite"],
    ):
        said, before = sora(*args, *common), dict(kept)
        kept = contents(tmp_path)
        assert {name: data for name, data in kept.items() if name in before} == before
        assert len(kept) == len(before) + 2
        assert all(str(tmp_path / name) in said for name in kept if name not in before)
    assert (tmp_path / "02-a-cat-seed7.mp4").is_file()
    sora("generate", "a cat", *common, "--overwrite", "--size", "3x16x16")
    assert len(contents(tmp_path)) == len(kept)
    assert contents(tmp_path)[first.name] != kept[first.name], "--overwrite replaces"


def test_files_say_what_they_were_made_with(small, tmp_path) -> None:
    options = ["--checkpoint", small, "--steps", 1, "--out", tmp_path, "--seed", 5, "--count", 2, "--negative", "a dog"]
    said = sora("generate", "ein Kätzchen", "--guidance", 2, "--size", "1x16x16", *options)
    paths = [tmp_path / "00-ein-kätzchen-seed5.png", tmp_path / "01-ein-kätzchen-seed6.png"]
    for path, seed in zip(paths, (5, 6), strict=True):
        assert f"{path} (seed {seed})" in said
        comment = json.loads(read_comment(path))
        expected = {"prompt": "ein Kätzchen", "seed": seed, "size": "1x16x16", "command": "generate", "negative": "a dog"}
        assert {name: comment[name] for name in expected} == expected
        assert (comment["guidance"], comment["steps"], comment["sora"]) == (2.0, 1, sora("--version").split()[1])
    sora("animate", paths[0], "a cat", "--format", "gif", "--frames", 3, *options[:6])
    comment = json.loads(read_comment(tmp_path / "02-a-cat-seed0.gif"))
    assert (comment["command"], comment["image"]) == ("animate", str(paths[0]))
    assert "negative" not in comment, "what is not set is left out"
    clip = write_video(tmp_path / "clip.mp4", torch.zeros(3, 6, 16, 16))
    sora("extend", clip, "a cat", "--overlap", 0, "--frames", 2, "--guidance-from", 0, *options[:6])
    comment = json.loads(read_comment(tmp_path / "03-a-cat-seed0.mp4"))
    expected = {"video": str(clip), "overlap": 0, "backward": False, "guidance_from": 0, "seed": 0}
    assert {name: comment[name] for name in expected} == expected


def test_seeds_of_a_count_are_those_of_the_videos(tmp_path, monkeypatch) -> None:
    """--seed 6 alone makes the second of --seed 5 --count 2, of every command that has a count."""
    # A model that predicts noise and has learned nothing gives the noise that it started from.
    SoraPipeline.from_preset("tiny", patch=(1, 8, 8), prediction="epsilon", size=(2, 16, 16)).save_pretrained(tmp_path / "model")
    clip = write_video(tmp_path / "clip.mp4", CLIP)
    common = ["--checkpoint", tmp_path / "model", "--steps", 1]
    written: dict[str, torch.Tensor] = {}  # before H.264, which may make another block of a pixel that rounds the other way

    def watched(videos, *args, **options) -> list[Path]:
        paths = write_files(videos, *args, **options)
        written.update(zip((f"{path.parent.name}/{path.name}" for path in paths), videos, strict=False))  # and a contact sheet
        return paths

    monkeypatch.setattr(call, "write_files", watched)
    for args in (
        ["generate", "x"],
        ["animate", clip, "x"],
        ["restyle", clip, "x"],
        ["extend", clip, "x"],
        ["join", clip, clip, "x"],
    ):
        two, one = f"{args[0]}2", f"{args[0]}1"
        sora(*args, *common, "--out", tmp_path / two, "--seed", 5, "--count", 2)
        sora(*args, *common, "--out", tmp_path / one, "--seed", 6)
        videos = [written[name] for name in (f"{two}/01-x-seed6.mp4", f"{one}/00-x-seed6.mp4", f"{two}/00-x-seed5.mp4")]
        torch.testing.assert_close(videos[0], videos[1], atol=1e-4, rtol=0)
        assert (videos[0] - videos[2]).abs().max() > 0.25


def test_a_contact_sheet_is_recognised(tmp_path) -> None:
    *_, sheet = write_files([CLIP], ["a"], tmp_path, [8.0], 1, "mp4")
    assert is_contact_sheet(sheet)
    assert is_contact_sheet(sheet.rename(tmp_path / "renamed.png"))
    assert not is_contact_sheet(contact_sheet(tmp_path / "contact_sheet.png", [CLIP], ["a"])), "without its comment"
    (tmp_path / "broken.png").write_bytes(b"no picture")
    assert not is_contact_sheet(tmp_path / "broken.png")


def test_files_go_beside_a_run_that_is_training(tmp_path) -> None:
    """Without waiting for it, and without leaving anything that is no video."""
    with only_run(tmp_path, fresh=True):
        writer = threading.Thread(target=write_files, args=([CLIP], ["a"], tmp_path, [8.0], 1, "mp4"), daemon=True)
        writer.start()
        writer.join(60)
        assert not writer.is_alive(), "it waits for the run"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00-a.mp4", "contact_sheet.png"]
    with lock_file(tmp_path / ".files.lock"), only_run(tmp_path, fresh=True):
        pass


def test_processes_write_into_one_folder_in_turn(tmp_path) -> None:
    """Names never collide, whoever creates and removes the lock file meanwhile; a killed process's lock file locks nothing."""
    (tmp_path / ".files.lock").touch()
    code = "import sys, time\nfrom pathlib import Path\nfrom sora_model.storage.files import lock_file\n"
    code += "out = Path(sys.argv[1])\nfor i in range(50):\n    with lock_file(out / '.files.lock'):\n"
    code += "        name = out / f'{len(list(out.glob(\"*.t\")))}.t'\n"
    code += "        time.sleep(0.001)\n        name.touch(exist_ok=False)\n"
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT) for _ in range(3)]
    assert [process.wait(300) for process in processes] == [0, 0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{i}.t" for i in range(150))

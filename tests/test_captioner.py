"""The captioner: packed latents of any sizes to text, prompts made longer, saved and loaded, and a tiny one that learns."""

import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from command_line import invoke
from reliability.interposed import in_child

from sora_model import SoraPipeline
from sora_model.caption.captioner import DETAILED, END, PAD, SHORT, Captioner, CaptionerConfig, train_tokenizer
from sora_model.cli.files import write_files
from sora_model.codec.codec import PixelCodec
from sora_model.data import Batch, Sample, write_video
from sora_model.model.patches import embed_patches, uniform_frames
from sora_model.storage.files import whole_folder
from sora_model.storage.tokenizer import save_tokenizer
from sora_model.training.captioner import CaptionObjective
from sora_model.world.config import WorldConfig
from sora_model.world.source import WorldSource
from sora_model.world.world import World

SOURCE = WorldSource(World(WorldConfig.simple()), [(6, 24, 24), (6, 16, 32), (1, 24, 24)])
CAPTIONS = [text for i in range(200) for text in SOURCE.load(i)[1:3] if text]


def small(num_frames: int | None = 3) -> Captioner:
    torch.manual_seed(0)
    tokenizer = train_tokenizer(CAPTIONS, 320)
    config = CaptionerConfig(
        in_channels=3, patch_size=(1, 8, 8), num_frames=num_frames, hidden_size=32, depth=1, decoder_depth=1, num_heads=2,
        vocabulary=len(tokenizer), longest=96,
    )  # fmt: skip
    return Captioner(config, tokenizer).eval()


def test_uniform_frames_reach_from_first_to_last() -> None:
    clip = torch.arange(9.0)[None, :, None, None].expand(2, 9, 4, 4)
    frames, step = uniform_frames(clip, 3)
    assert frames[0, :, 0, 0].tolist() == [0, 4, 8]
    assert step == 4.0
    assert uniform_frames(clip, 20)[0] is clip
    assert uniform_frames(clip, 1)[0][0, :, 0, 0].tolist() == [0]
    with pytest.raises(ValueError, match="num_frames: expected at least 1, got 0"):
        uniform_frames(clip, 0)


def test_uniform_frames_are_embedded_as_images_at_their_times() -> None:
    torch.manual_seed(0)
    clips = [torch.randn(4, 9, 4, 6), torch.randn(4, 1, 8, 4)]
    weight, bias = torch.randn(16, 4, 1, 2, 2), torch.randn(16)
    tokens, layout = embed_patches(clips, weight, bias, patch_size=(1, 2, 2), num_frames=3)
    assert layout.cu_seqlens.tolist() == [0, 18, 26]
    assert layout.positions()[:18, 0].unique().tolist() == [0, 4, 8]
    for i, t in enumerate((0, 4, 8)):
        image, _ = embed_patches([clips[0][:, t : t + 1]], weight, bias, patch_size=(1, 2, 2))
        torch.testing.assert_close(tokens[6 * i : 6 * i + 6], image)
    tubelets, _ = embed_patches(clips[:1], torch.randn(16, 4, 3, 2, 2), bias, patch_size=(3, 2, 2))
    assert tubelets.shape == (18, 16)
    with pytest.raises(ValueError, match=r"patch_size: expected \(1, ph, pw\) with num_frames, got \(3, 2, 2\)"):
        embed_patches(clips, weight, bias, patch_size=(3, 2, 2), num_frames=3)


@pytest.mark.parametrize("number", ["x", 0, 1.5, True])
def test_frames_are_a_number(number: object) -> None:
    with pytest.raises(ValueError, match="num_frames: expected a number of at least 1 or None, got"):
        CaptionerConfig(num_frames=number)  # type: ignore[arg-type]


@pytest.mark.parametrize("number", ["x", 1, 200_000, True])
def test_captions_end(number: object) -> None:
    with pytest.raises(ValueError, match="longest: expected a number of tokens from 2 to 4096, got"):
        CaptionerConfig(longest=number)  # type: ignore[arg-type]


def test_the_tokenizer_writes_any_text() -> None:
    tokenizer = train_tokenizer(CAPTIONS, 320)
    assert len(tokenizer) <= 320
    for text in (CAPTIONS[0], "Ein Käse über Ω, 3.5 %!"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    kinds = tokenizer.convert_tokens_to_ids([PAD, END, SHORT, DETAILED])
    assert tokenizer(SHORT + "a" + END).input_ids[0] == kinds[2]
    assert tokenizer.decode(tokenizer(SHORT + "a" + END).input_ids, skip_special_tokens=True) == "a"


@pytest.mark.parametrize("num_frames", [None, 3])
def test_a_caption_depends_on_its_own_clip_alone(num_frames: int | None) -> None:
    captioner = small(num_frames)
    clips = [SOURCE.load(i).video for i in range(3)]
    together = captioner.see(clips)
    for i, clip in enumerate(clips):
        alone = captioner.see([clip])
        start, end = together.cu_seqlens[i : i + 2].tolist()
        torch.testing.assert_close(together.tokens[start:end], alone.tokens, atol=1e-5, rtol=1e-5)
    captions = captioner.caption(clips, detailed=True)
    assert captions[1] == captioner.caption(clips[1:2], detailed=True)[0]
    assert len(captioner.expand(["a red circle", ""])) == 2


def test_it_learns_to_tell_colours_apart(tmp_path: Path) -> None:
    """Two kinds of clips, told apart after some steps; saved and loaded, it says the same."""
    captioner = small()
    samples = []
    for i in range(16):
        color = ("red", "blue")[i % 2]
        scene = World(WorldConfig.simple()).sample(i, color=color, shape="circle", motion="up")
        samples.append(Sample(scene.render(6, 24, 24), f"a {color} circle moves up", f"A large {color} circle moves up, slowly."))
    objective, generator = CaptionObjective(captioner, PixelCodec()), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(captioner.parameters(), 3e-3)
    for _ in range(120):
        loss = objective.loss(Batch(samples, list(range(16)), 0), generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    clips = [sample.video for sample in samples[:2]]
    assert captioner.eval().caption(clips) == ["a red circle moves up", "a blue circle moves up"]
    assert captioner.caption(clips, detailed=True)[1] == "A large blue circle moves up, slowly."
    assert captioner.expand(["a blue circle moves up"]) == ["A large blue circle moves up, slowly."]
    captioner.save_pretrained(tmp_path)
    assert Captioner.from_pretrained(tmp_path).caption(clips) == ["a red circle moves up", "a blue circle moves up"]


def check_names_of_captions(image: Path, folder: Path, checkpoint: Path) -> None:
    """No file's caption becomes another's, and one name that leaves no room for `.detailed.txt` ends nothing."""
    folder.mkdir()
    for name in ("a.jpg", "a.png", "a.detailed.png", "b.png", f"{'x' * 248}.png"):
        shutil.copy(image, folder / name)
    result = invoke("recaption", folder, "--checkpoint", checkpoint)
    assert result.exit_code == 0, result.output
    assert "4 captions written for 5 files" in result.output
    output = result.output.replace("\n", "")
    assert f"left out: {folder / 'a.png'}: a.txt has the caption of a.jpg" in output
    assert f"left out: {folder / 'a.detailed.png'}: a.detailed.txt has the caption of a.jpg" in output
    assert ".detailed.txt would be longer than 255 bytes" in output
    assert sorted(path.name for path in folder.glob("*.txt")) == ["a.detailed.txt", "a.txt", "b.detailed.txt", "b.txt"]


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train a captioner into a checkpoint, caption files, caption a folder, and expand prompts before generating."""
    checkpoint, clips = tmp_path / "model", tmp_path / "clips"
    SoraPipeline.from_preset("tiny", patch=(1, 8, 8)).save_pretrained(checkpoint)
    world = ["--data", "world:simple", "--size", "6x24x24", "--tokens", 128, "--steps", 2]
    result = invoke("train-captioner", tmp_path / "run", "--checkpoint", checkpoint, *world)
    assert result.exit_code == 0, result.output
    assert SoraPipeline.from_pretrained(checkpoint).captioner is not None
    files = [write_video(clips / "deep" / f"{i}.mp4", SOURCE.load(i).video) for i in range(2)]
    files.append(write_video(clips / "image.png", SOURCE.load(0).video[:, :1]))
    (clips / "image.txt").write_text("my own words")
    (clips / "broken.mp4").write_bytes(b"no video")
    result = invoke("caption", *files, "--checkpoint", checkpoint)
    assert result.exit_code == 0, result.output
    assert all(f"{file}: " in result.output for file in files)
    monkeypatch.setattr(SoraPipeline, "caption", lambda *_, **__: [""])
    result = invoke("recaption", clips, "--checkpoint", checkpoint)
    assert "0 captions written for 3 files" in result.output
    assert "the captioner found nothing to say" in result.output
    monkeypatch.setattr(SoraPipeline, "caption", lambda *_, detailed: ["A long caption." if detailed else "a caption"])
    result = invoke("recaption", clips, "--checkpoint", checkpoint)
    assert result.exit_code == 0, result.output
    assert "5 captions written for 3 files" in result.output
    assert "broken.mp4" in result.output
    assert (clips / "image.txt").read_text() == "my own words"
    assert (clips / "deep" / "0.detailed.txt").read_text() == "A long caption.\n"
    assert (clips / "deep" / "0.txt").read_text() == "a caption\n"
    assert not list(clips.rglob(".*")), "nothing half-written"
    assert "0 captions written" in invoke("recaption", clips, "--checkpoint", checkpoint).output
    (tmp_path / "mine").write_text("something else")
    write_video(clips / "linked.png", SOURCE.load(0).video[:, :1])
    (clips / "linked.txt").symlink_to(tmp_path / "mine")
    linked = invoke("recaption", clips, "--checkpoint", checkpoint, "--overwrite").output
    assert "linked.txt is a link, and what it leads to would be written" in linked.replace("\n", " ")
    assert (tmp_path / "mine").read_text() == "something else"
    for path in clips.glob("linked.*"):
        path.unlink()
    assert "6 captions written" in invoke("recaption", clips, "--checkpoint", checkpoint, "--overwrite").output
    *_, sheet = write_files([SOURCE.load(0).video], ["a circle"], clips / "made", [8.0], 1, "mp4")
    result = invoke("recaption", clips, "--checkpoint", checkpoint)
    assert f"left out: {sheet}: a contact sheet" in result.output
    assert "2 captions written for 4 files" in result.output, "the video is a file like others"
    assert not list(clips.rglob("contact_sheet*.txt"))
    check_names_of_captions(files[-1], tmp_path / "names", checkpoint)
    out = ["--size", "2x16x16", "--steps", 1, "--out", tmp_path / "out"]
    result = invoke("generate", "a red circle", "--expand", "--checkpoint", checkpoint, *out)
    assert result.exit_code == 0, result.output
    assert "a red circle -> " in result.output
    assert invoke("expand", "a red circle", "--checkpoint", checkpoint).exit_code == 0


def test_a_checkpoint_that_was_being_replaced_is_put_back(tmp_path: Path) -> None:
    """By a process that was killed between two renames."""
    checkpoint = tmp_path / "model"
    SoraPipeline.from_preset("tiny", patch=(1, 8, 8)).save_pretrained(checkpoint)

    def killed() -> None:
        with whole_folder(checkpoint) as folder:
            checkpoint.rename(folder.parent / "old")
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(killed, tmp_path / "log").status == -signal.SIGKILL
    assert not checkpoint.exists()
    world = ["--data", "world:simple", "--size", "6x24x24", "--tokens", 128, "--steps", 1]
    result = invoke("train-captioner", tmp_path / "run", "--checkpoint", checkpoint, *world)
    assert result.exit_code == 0, result.output


def test_a_tokenizer_on_a_full_disk_is_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["a red circle"], 280)
    with pytest.raises(OSError, match="No such file"):
        save_tokenizer(SimpleNamespace(save_pretrained=lambda _: tokenizer.backend_tokenizer.save("/none/a.json")), tmp_path)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["caption", "{tmp}/none.mp4"], "none.mp4: it does not exist"),
        (["recaption", "{tmp}/none"], "(there is no such folder)"),
        (["train-captioner", "{tmp}/run", "--checkpoint", "{tmp}/none"], "expected a folder with model_index.json"),
        (
            ["train-captioner", "{tmp}/run", "--checkpoint", "{tmp}/none", "--vocabulary", "259"],
            "--vocabulary: expected at least 260",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(args, message, tmp_path: Path) -> None:
    SoraPipeline.from_preset("tiny", patch=(1, 8, 8)).save_pretrained(tmp_path / "model")
    options = [] if args[0] == "train-captioner" else ["--checkpoint", tmp_path / "model"]
    result = invoke(*(arg.format(tmp=tmp_path) for arg in args), *options)
    assert result.exit_code == 2
    assert message in result.output.replace("\n", "")
    assert not (tmp_path / "run").exists()

"""The commands that generate: what they say before and while they work, sizes, words, actions, requests; errors of any depth."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from sora_model import SoraPipeline
from sora_model.cli import app, call, estimate, terminal
from sora_model.cli.actions import about
from sora_model.cli.app import read_clip
from sora_model.cli.requests import ALIASES, COMMON, TASKS
from sora_model.cli.run import errors_by_option
from sora_model.data import probe, read_comment, read_video, write_video
from sora_model.pipeline import clips
from sora_model.pipeline.checkpoint import read_outline
from sora_model.pipeline.parts import EMBEDDED, Outline, Weights
from sora_model.sizes import Timing

ROOT = Path(__file__).parent.parent


def sora(*args, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    torch.manual_seed(0)
    for name, size in {"a.mp4": (4, 16, 16), "b.mp4": (4, 16, 24), "large.png": (1, 120, 90), "fast.mp4": (4, 16, 16)}.items():
        write_video(folder / name, torch.rand(3, *size), fps=60 if name == "fast.mp4" else 8)
    return folder


@pytest.fixture
def unloaded(monkeypatch) -> None:
    def loaded(*_, **__):
        raise AssertionError("a model was loaded before everything was checked")

    monkeypatch.setattr(SoraPipeline, "from_pretrained", loaded)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["generate", "x", "--size", "2000001x4096x4096"], "--size: expected videos that the memory of"),
        (["generate", "x", "--size", "999999999x999999999x999999999"], "--size: expected videos that the memory of"),
        (["generate", "x", "--format", "gif", "--fps", "60"], "--fps: expected at most 50 for gif, got 60"),
        (["generate", "x", "--fps", "1001"], "--fps: expected at most 1000 for mp4, got 1001"),
        (["restyle", "{media}/fast.mp4", "x", "--format", "gif"], "--fps: expected at most 50 for gif, got 60"),
        (["generate", "x", "--scale", "1000"], "--scale: expected frames of at most 16384 pixels along a side, got 48000"),
        (
            ["generate", "x", "--checkpoint", "{media}/none"],
            "--checkpoint: expected a folder with model_index.json, got {media}/none",
        ),
        (
            ["caption", "{media}/a.mp4", "--checkpoint", "{media}"],
            "--checkpoint: expected a folder with model_index.json, got {media}",
        ),
        (["animate", "{media}/large.png", "x", "--size", "5x16x16"], "--size: expected HxW, such as 48x80, each at least 1"),
        (["animate", "{media}/large.png", "x", "--size", "0x16"], "--size: expected HxW, such as 48x80, each at least 1"),
        (
            ["animate", "{media}/large.png", "x", "--size", "16x16", "--max-pixels", "9"],
            "--max-pixels: expected none with --size, which says the size, got 9",
        ),
        (["animate", "{media}/large.png", "x", "--frames", "9" * 400], "--frames: expected videos that the memory of"),
        (["restyle", "{media}/a.mp4", "x", "--strength", "7"], "--strength: expected a number above 0 and up to 1, got 7"),
        (["extend", "{media}/large.png", "x", "--backward"], "VIDEO: expected at least 4 frames, got 1"),
        (["join", "{media}/a.mp4", "{media}/a.mp4", "--frames", "6"], "--frames: expected a multiple of 4, got 6"),
        (["join", "{media}/large.png", "{media}/large.png"], "LAST: expected at least 4 frames, got 1"),
        (["loop", "x", "--passage", "1"], "--passage: expected a multiple of 4, the frames of a latent frame, got 1"),
        (["long", "x", "--seconds", "-3"], "--seconds: expected at least one frame, which is 0.125, got -3"),
        (["long", "x", "--seconds", "1e9"], "--seconds: expected videos that the memory of"),
        (["long", "x", "--overlap", "3"], "--overlap: expected more than the 13 frames that a chunk sees, got 13"),
        (["simulate", "x", "--size", "5x16x16"], "--size: expected more than the 5 frames that a chunk sees, got 5"),
    ],
)
def test_the_option_that_is_wrong_is_named_before_a_model_is_loaded(args, message, media, unloaded, tmp_path) -> None:
    out = [] if args[0] == "caption" else ["--out", tmp_path / "new"]
    said = sora(*(arg.replace("{media}", str(media)) for arg in args), *out, code=2)
    assert f"error: {message.replace('{media}', str(media))}" in said
    assert "Traceback" not in said
    assert len([line for line in said.splitlines() if not line.startswith("warning: ")]) == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("Storage size calculation overflowed with sizes=[3, 1, 2]"),
        RuntimeError("numel: integer multiplication overflow"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 37.69 GiB.\nGPU 0 has"),
        MemoryError(),
    ],
)
def test_memory_that_cannot_be_had_is_one_line(error, small, tmp_path, monkeypatch) -> None:
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(SoraPipeline, "__call__", fails)
    said = sora("generate", "x", "--checkpoint", small, "--out", tmp_path, code=2).splitlines()[-1]
    assert said.startswith("error: not enough memory for videos of this size and number: ")
    with pytest.raises(ValueError, match="out of memory: expected a smaller model or batch"), errors_by_option():
        fails()


@pytest.mark.parametrize("fault", ["shapes do not fit", "value cannot be converted to type int without overflow"])
def test_other_faults_of_a_program_are_not_hidden(fault, small, tmp_path, monkeypatch) -> None:
    def fails(*_, **__):
        raise RuntimeError(fault)

    monkeypatch.setattr(SoraPipeline, "__call__", fails)
    with pytest.raises(RuntimeError, match=fault):
        sora("generate", "x", "--checkpoint", small, "--out", tmp_path)
    with pytest.raises(RuntimeError, match=fault), errors_by_option():
        fails()


@pytest.mark.parametrize("package", ["typer", "rich", "av", "diffusers"])
def test_without_the_extra_it_says_what_to_install(package, tmp_path) -> None:
    code = f"import sys\nsys.modules[{package!r}] = None\nsys.argv = ['sora', 'generate', 'x']\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}from sora_model.cli import app\napp()"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: {package}")
    assert done.stderr.endswith(" is not installed, which commands need: pip install 'sora_kernels[model]'\n")


def test_sizes_of_inputs(small, media, tmp_path) -> None:
    """Scaled down to what the checkpoint is for, or as asked; nothing of it in silence."""
    common = ["x", "--checkpoint", small, "--steps", 1, "--out", tmp_path]
    said = sora("animate", media / "large.png", *common, "--frames", 2)
    assert "large.png: frames of 120x90 are scaled down to 36x27, --max-pixels takes more" in said
    assert probe(tmp_path / "00-x-seed0.mp4") == (2, 36, 28)
    assert read_outline(small).enlarged * 16 * 16 >= 36 * 27
    said = sora("animate", media / "large.png", *common, "--frames", 2, "--size", "16x40")
    assert "scaled down" not in said
    assert probe(tmp_path / "01-x-seed0.mp4") == (2, 16, 40)
    sora("restyle", media / "b.mp4", *common, "--size", "24x24")
    assert probe(tmp_path / "02-x-seed0.mp4") == (4, 24, 24)
    sora("animate", media / "large.png", *common, "--frames", 1, "--max-pixels", 99999)
    assert probe(tmp_path / "03-x-seed0.png") == (1, 120, 90)


def test_a_joined_video_has_the_size_of_the_first(small, media, tmp_path) -> None:
    common = ["x", "--checkpoint", small, "--steps", 1, "--out", tmp_path, "--frames", 2]
    said = sora("join", media / "a.mp4", media / "b.mp4", *common)
    assert f"b.mp4: frames of 16x24 are resized to 16x16, as {media}/a.mp4 has them" in said
    assert probe(tmp_path / "00-x-seed0.mp4") == (10, 16, 16)
    made, last = read_video(tmp_path / "00-x-seed0.mp4")[0], read_video(media / "b.mp4")[0]
    assert (made[:, -1].int() - last[:, -1, :, 4:20].int()).abs().float().mean() < 12, "cut, not pressed together"
    assert "resized" not in sora("join", media / "a.mp4", media / "a.mp4", *common)
    requests = tmp_path / "requests.json"
    requests.write_text(
        json.dumps([{"task": "join", "prompt": "", "first": str(media / "b.mp4"), "last": str(media / "a.mp4"), "frames": 2}])
    )
    assert "a.mp4: frames of 16x16 are resized to 16x24" in sora("batch", requests, *common[1:-2])


def test_what_is_to_be_made_is_said_first(small, tmp_path) -> None:
    said = sora("generate", "x", "y", "--checkpoint", small, "--steps", 1, "--out", tmp_path, "--seed", 3, "--size", "3x16x17")
    assert said.splitlines()[0] == "2 videos of 3x16x17, seed 3: 36 tokens at once, about 0.5 GB of memory"


def test_memory_grows_with_what_is_asked() -> None:
    """As measured with the checkpoint of the package: 1.28 GB and 0.83 GB at the most."""
    outline = read_outline(EMBEDDED)
    assert estimate.tokens(outline, [(13, 48, 48), (1, 60, 64)]) == 36 + 16
    assert 1.28e9 < estimate.memory(outline, [(13, 512, 512)]) < 1.6e9
    assert 0.83e9 < estimate.memory(outline, [(49, 256, 256)]) < 1.4e9
    assert estimate.memory(outline, [(1, 2048, 2048)]) > estimate.memory(outline, [(1, 1024, 1024)])


GB = 10**9
LARGE = Outline(  # as of Wan 2.1 14B
    (81, 480, 832), (4, 16, 16), Timing(1, 4), 5120, Weights(11 * GB, (57 * GB,), GB / 2),
    Weights(11 * GB, (29 * GB,), GB / 2), "AutoencoderKLWan",
)  # fmt: skip


def test_memory_of_files(monkeypatch, unloaded, tmp_path) -> None:
    """Enlarged frames wait for H.264 alone; weights that go to a GPU are not in the host's memory."""
    made, plain = [(61, 100, 200)], estimate.How()
    one, large = (estimate.written(LARGE, made, plain, scale, "mp4", "cuda") for scale in (1, 100))
    assert large - one == pytest.approx((30 + 4.5 * 40) * (100**2 - 1) * 100 * 200)
    assert estimate.written(LARGE, made, plain, 100, "gif", "cuda") < large / 5
    assert estimate.written(LARGE, made, plain, 1, "mp4", "cpu") - one == 68.5 * GB
    assert estimate.written(LARGE, made, plain._replace(offload=True), 1, "mp4", "cuda") - one == 68.5 * GB
    monkeypatch.setattr(estimate, "installed", lambda _: 24 * GB)
    said = sora("generate", "x", "--size", "60x24x24", "--scale", 600, "--out", tmp_path / "out", code=2)
    assert (
        "error: --scale: expected files that the memory of 24 GB can hold while they are written, got ones that take about" in said
    )


def test_memory_of_large_checkpoints(monkeypatch) -> None:
    """bfloat16 halves weights and more than halves the work; offloading leaves the largest part."""
    size, plain, bf16 = [LARGE.size], estimate.How(), estimate.How(bf16=True)
    assert estimate.working(LARGE, size, bf16).transformer < estimate.working(LARGE, size).transformer / 2
    whole, half, cut = (estimate.memory(LARGE, size, how=how) / 1e9 for how in (plain, bf16, bf16._replace(offload=True)))
    assert (round(whole), round(half), round(cut)) == (105, 57, 45)

    def refused(there: float, size: tuple[int, int, int] = LARGE.size, how: estimate.How = plain, device: str = "cuda") -> str:
        monkeypatch.setattr(estimate, "installed", lambda _: there)
        with pytest.raises(ValueError) as caught:  # noqa: PT011 (its message is what is tested)
            estimate.check_memory("--size", LARGE, [size], (), how, device)
        return str(caught.value)

    assert "; --precision bf16 --offload --size 81x720x1280 takes about " in refused(80e9, (161, 720, 1280))
    assert refused(60e9).startswith(
        "--checkpoint: expected weights that cuda of 60 GB can hold, got 68.5 GB, and 105 GB with the work"
    )
    assert "--precision bf16 takes about 56.9 GB; --precision bf16 --offload takes about 45.4 GB" in refused(60e9)
    assert refused(40e9, how=bf16, device="cpu").startswith("--checkpoint: expected weights that the memory of 40 GB can hold")
    assert "got ones that take about 56.9 GB; --precision bf16 --offload takes about 45.4 GB" in refused(48e9, how=bf16)
    assert ";" not in refused(1e9, how=bf16), "nothing is enough"
    monkeypatch.setattr(estimate, "installed", lambda device: 30e9 if device == "cpu" else 80e9)
    with pytest.raises(ValueError, match="--offload: expected weights that the memory of the CPU can hold, 30 GB, got 41 GB"):
        estimate.check_memory("--size", LARGE, size, (), bf16._replace(offload=True), "cuda")
    monkeypatch.setattr(estimate, "installed", lambda _: 58e9)
    estimate.check_memory("--size", LARGE, size, (), bf16, "cpu")


def test_the_time_of_long_work_is_estimated_after_two_steps(monkeypatch, capsys) -> None:
    from rich.console import Console

    clock = iter([10.0, 14.0, 18.0])
    console = Console(width=200, force_terminal=False)
    with terminal.denoising(console, 100) as bars:
        monkeypatch.setattr(terminal.time, "perf_counter", lambda: next(clock))
        for _ in range(3):
            bars(1)
        monkeypatch.undo()
        bars.coded("decoding", 5, 20)
    said = capsys.readouterr().out
    assert said.count("up to 7 min left") == 1
    assert "decoding" in said
    assert [terminal.duration(s) for s in (3, 89, 600, 7200)] == ["3 s", "89 s", "10 min", "2.0 h"]


def test_unknown_words_are_named(tmp_path, monkeypatch) -> None:
    """One line, of any prompt; words that were learned, marks and other checkpoints are not complained of."""
    monkeypatch.setattr(SoraPipeline, "__call__", lambda self, requests, **_: [torch.zeros(3, *one.size) for one in requests])
    common = ["--out", tmp_path, "--size", "5x16x16"]
    said = sora("generate", "an astronaut, in red", "a purple Astronaut", *common, "--negative", "blurry")
    assert "warning: words that the checkpoint has not learned: astronaut, blurry; 'sora vocabulary' lists what it has\n" in said
    assert "warning" not in sora("generate", "A red circle moves right.", *common)


def test_an_unknown_word_is_named_once(tmp_path, monkeypatch) -> None:
    """Not again at every action of a simulation."""
    monkeypatch.setattr(SoraPipeline, "__call__", lambda self, requests, **_: [torch.zeros(3, *one.size) for one in requests])
    actions = [word for action in ("flies", "sits", "flies") for word in ("--action", action)]
    options = ["--out", tmp_path, "--negative", "blurry", "--size", "9x16x16"]
    said = sora("simulate", "an astronaut moves right", *actions, *options)
    named = [line.partition("learned: ")[2].partition(";")[0] for line in said.splitlines() if line.startswith("warning: words")]
    assert named == ["astronaut, blurry", "flies", "sits"]


def test_the_vocabulary_is_listed(small) -> None:
    words = sora("vocabulary").split()
    assert {"red", "circle", "moves", "background"} <= set(words)
    assert "astronaut" not in words
    assert words == sorted(words)
    assert "--checkpoint: expected one with text_encoder/vocab.txt, got " in sora("vocabulary", "--checkpoint", small, code=2)


def test_a_vae_that_cannot_code_the_input_is_said(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(SoraPipeline, "__call__", lambda self, requests, **_: [torch.zeros(3, *one.size) for one in requests])
    torch.manual_seed(0)
    noise = write_video(tmp_path / "noise.png", 2 * torch.rand(3, 1, 48, 48) - 1)
    plain = write_video(tmp_path / "plain.png", torch.full((3, 1, 48, 48), -0.5))
    said = sora("animate", noise, "a red circle", "--out", tmp_path / "out")
    assert "noise.png: the checkpoint's VAE gives back its first frame with a PSNR of" in said
    assert "PSNR" not in sora("animate", plain, "a red circle", "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("present", "action", "prompt"),
    [
        ("a red circle moves right", "moves up", "a red circle moves up"),
        ("a red cross moves right", "stays still", "a red cross stays still"),
        ("a red circle moves right", "it moves up", "a red circle moves up"),
        ("a red circle moves right", "a blue star moves up", "a blue star moves up"),
        ("a red circle moves right", "The circle grows", "The circle grows"),
        ("a cat", "sits", "a cat sits"),
        ("red circle moves", "red circle stays", "red circle stays"),
        ("a cat is asleep", "jumps.", "a cat jumps."),
    ],
)
def test_an_action_keeps_the_present_object(present, action, prompt) -> None:
    assert about(present, action) == prompt


def test_a_simulation_shows_what_an_action_looks_like(small, tmp_path) -> None:
    args = ["simulate", "a cat moves left", "--checkpoint", str(small), "--out", str(tmp_path), "--steps", "1", "--size", "4x16x16"]
    result = CliRunner().invoke(app, args, input="moves up\na dog sits\nit sleeps\n\n", catch_exceptions=False)
    assert "'moves up' is about the present object, as in 'a cat moves up'" in result.output
    actions = ["a cat moves up", "a dog sits", "a dog sleeps"]
    assert [line for line in result.output.splitlines() if line.startswith("action: ")] == [f"action: {one}" for one in actions]
    (made,) = tmp_path.glob("*.mp4")
    assert json.loads(read_comment(made))["actions"] == actions


def test_the_help_of_batch_names_every_field() -> None:
    said = sora("batch", "--help")
    for name in [*TASKS, *ALIASES, *COMMON, *(field for fields in TASKS.values() for field in fields)]:
        assert f" {name}" in said, name
    assert "a whole number of at least 1" in said


def test_requests_have_the_names_of_commands(small, media, tmp_path) -> None:
    wanted = [
        {"task": "generate", "prompt": "a", "size": "2x16x16"},
        {"task": "animate", "prompt": "b", "image": str(media / "large.png"), "frames": 3, "seed": 9},
        {"task": "restyle", "prompt": "c", "video": str(media / "a.mp4")},
    ]
    (tmp_path / "requests.json").write_text(json.dumps(wanted))
    sora("batch", tmp_path / "requests.json", "--checkpoint", small, "--steps", 1, "--out", tmp_path / "out")
    made = sorted(path.name for path in (tmp_path / "out").glob("*.mp4"))
    assert made == ["00-a-seed0.mp4", "01-b-seed9.mp4", "02-c-seed2.mp4"]
    assert [json.loads(read_comment(tmp_path / "out" / name))["seed"] for name in made] == [0, 9, 2]


def test_each_file_of_a_batch_says_what_its_request_was(small, media, tmp_path) -> None:
    wanted = [
        {"prompt": "a", "size": "2x16x16", "negative_prompt": "b"},
        {"task": "restyle", "prompt": "c", "video": str(media / "a.mp4"), "strength": 0.5},
        {"task": "extend", "prompt": "d", "video": str(media / "a.mp4"), "frames": 2, "overlap": 0},
        {"task": "join", "prompt": "e", "first": "a.mp4", "last": str(media / "a.mp4"), "frames": 2},
    ]
    write_video(tmp_path / "a.mp4", torch.zeros(3, 4, 16, 16))
    (tmp_path / "requests.json").write_text(json.dumps(wanted))
    options = ["--checkpoint", small, "--steps", 1, "--out", tmp_path / "out", "--negative", "z"]
    sora("batch", tmp_path / "requests.json", *options)
    comments = [json.loads(read_comment(path)) for path in sorted((tmp_path / "out").glob("*.mp4"))]
    clip = {"negative": "z", "video": str(media / "a.mp4")}
    passage = {"first": str(tmp_path / "a.mp4"), "last": str(media / "a.mp4"), "overlap": 1, "frames": 2}
    expected = [
        {"task": "text_to_video", "negative": "b", "size": "2x16x16"},
        {"task": "video_to_video", **clip, "strength": 0.5},
        {"task": "extend", **clip, "frames": 2, "overlap": 0, "backward": False},
        {"task": "join", "negative": "z", **passage},
    ]
    for comment, settings in zip(comments, expected, strict=True):
        assert {name: comment[name] for name in settings} == settings
        assert comment["command"] == "batch"
    assert not {"strength", "overlap", "video"} & set(comments[0])


def test_a_file_that_many_requests_name_is_read_once(small, media, tmp_path, monkeypatch) -> None:
    read = []
    monkeypatch.setattr(call, "read_clip", lambda path, *rest: read.append(path) or read_clip(path, *rest))
    (tmp_path / "link.mp4").symlink_to(media / "a.mp4")
    names = [media / "a.mp4", media / "b.mp4", media / ".." / media.name / "a.mp4", "link.mp4", media / "b.mp4"]
    wanted = [{"task": "restyle", "prompt": "x", "video": str(name), "strength": 0.5} for name in names]
    (tmp_path / "requests.json").write_text(json.dumps(wanted))
    options = ["batch", tmp_path / "requests.json", "--checkpoint", small, "--steps", 1, "--out", tmp_path / "out"]
    sora("--limit", "clip-pixels=2560", *options)
    assert read == names[:2]
    said = sora("--limit", "clip-pixels=2559", *options, code=2)
    assert "error: batch: request 1: video: with the files before it: expected at most 2559 pixels, got 2560; " in said


def test_all_texts_of_a_batch_have_a_limit(unloaded, tmp_path) -> None:
    path = tmp_path / "requests.json"
    path.write_text(json.dumps([{"prompt": "x" * 7}, {"prompt": "x", "negative_prompt": "y" * 2}]))
    said = sora("--limit", "batch-text=9", "batch", path, "--out", tmp_path / "out", code=2)
    assert f"error: batch: {path}: prompts: expected at most 9 characters, got 10; 'sora --limit batch-text=10 " in said


def test_frames_that_are_enlarged_count_as_they_become(small, media, tmp_path) -> None:
    options = ["extend", media / "a.mp4", "x", "--frames", 2, "--size", "160x160", "--checkpoint", small, "--out", tmp_path / "out"]
    said = sora("--limit", "clip-pixels=50000", *options, code=2)
    assert "a.mp4: with frames of 160x160: expected at most 50000 pixels, got 102400; " in said


def test_a_file_that_is_too_slow_is_refused_before_the_work(unloaded, tmp_path) -> None:
    frames = [Image.new("RGB", (16, 16), (i, 0, 0)) for i in (0, 200)]
    frames[0].save(tmp_path / "slow.gif", save_all=True, append_images=frames[1:], duration=655_350)
    said = sora("restyle", tmp_path / "slow.gif", "x", "--out", tmp_path / "out", code=2)
    assert "error: --fps: expected at least 0.01, got 0.0015" in said


def test_a_request_that_joins_other_speeds_is_named(media, unloaded, tmp_path) -> None:
    join = {"task": "join", "prompt": "", "first": str(media / "a.mp4"), "last": str(media / "fast.mp4"), "frames": 4}
    (tmp_path / "requests.json").write_text(json.dumps([{"prompt": "x"}, join]))
    said = sora("batch", tmp_path / "requests.json", "--out", tmp_path / "out", code=2)
    assert "error: batch: request 1: last: expected the frames per second of first, got 8 and 60; --fps sets one for both" in said


def test_a_strip_is_scaled_without_what_is_cut_off() -> None:
    """Of a square frame brought to a strip, its middle is shown; whole it would have 16384 x 16384 pixels."""
    video = torch.linspace(-1, 1, 64).expand(3, 8, 64, 64)
    made = clips.fitted(video.mT, 1, 16384)
    assert made.shape == (3, 8, 1, 16384)
    torch.testing.assert_close(made, torch.zeros_like(made), rtol=0, atol=1e-6)
    made = clips.fitted(video, 16384, 4096)
    torch.testing.assert_close(made[:, 0, 5, ::256], video[:, 0, 0, 24:40], rtol=0, atol=0.02)
    assert torch.equal(clips.fitted(video, 64, 64), video)


def test_frames_of_one_row_are_scaled_within_max_pixels(tmp_path) -> None:
    """A file of a few hundred bytes, whose longer side is nearly all pixels that it has."""
    Image.new("RGB", (65535, 1)).save(tmp_path / "row.png")
    assert read_video(tmp_path / "row.png", max_pixels=2304)[0].shape == (3, 1, 1, 2304)
    Image.new("RGB", (1, 9)).save(tmp_path / "column.png")
    assert read_video(tmp_path / "column.png", max_pixels=5)[0].shape == (3, 1, 5, 1)


def test_a_side_that_no_file_can_have(media, unloaded, tmp_path) -> None:
    said = sora("animate", media / "a.mp4", "a", "--size", "99999999x1", "--out", tmp_path / "out", code=2)
    assert "a.mp4: with frames of 99999999x1: expected at most 16384 pixels along a side" in said


def test_windows_and_step_cache(tmp_path: Path) -> None:
    """Files carry them, and what the cache left out is said."""
    fast = ["--window", "1x2x2", "--step-cache", "0.3", "--out", tmp_path / "fast"]
    out = sora("generate", "a red circle", "--size", "5x32x32", *fast)
    assert " passes of samples without most blocks; when they ran again, what they add had changed by " in out
    (path,) = (tmp_path / "fast").glob("00*.mp4")
    settings = json.loads(read_comment(path))
    assert (settings["window"], settings["step_cache"]) == ("1x2x2", 0.3)
    sora("generate", "a red circle", "--size", "5x32x32", "--out", tmp_path / "whole")
    fast_one, whole = (read_video(next((tmp_path / name).glob("00*.mp4")))[0] for name in ("fast", "whole"))
    assert not torch.equal(fast_one, whole)
    assert "--window: expected TxHxW, such as 5x9x9, got '5x9'" in sora("generate", "a", "--window", "5x9", code=2)
    assert "--offload: expected a GPU as --device" in sora("generate", "a", "--offload", code=2)
    with pytest.raises(ValueError, match="SoraPipeline: window: expected three numbers of tokens"):
        SoraPipeline.from_pretrained()("a red circle", window=(5, 0, 9))

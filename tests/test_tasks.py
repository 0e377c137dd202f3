"""Loops, long videos and simulated worlds, with a stand-in for a pipeline that draws what it is asked; and every task's command."""

import io
import json
from pathlib import Path

import pytest
import torch
from command_line import invoke
from rich.console import Console
from torch import Tensor

from sora_model import SoraPipeline
from sora_model.cli.terminal import show_video
from sora_model.data import read_video, write_video
from sora_model.pipeline.request import Request
from sora_model.pipeline.tasks import Simulation, close, long_video, loop, refined
from sora_model.sizes import Timing


class Counting:
    """Generates frames of one number each: given frames come back, so much off, and the others count on from the frame before.

    In hundredths, as videos are from -1 to 1.
    """

    timing, size = Timing(1, 4), (13, 4, 4)

    def __init__(self, off: float = 0.0) -> None:
        self.requests: list[Request] = []
        self.off = off

    def check_any_keyframes(self) -> None:
        """It knows them."""

    def __call__(self, requests: list[Request], **options: object) -> list[Tensor]:
        self.requests += requests
        return [self.draw(request) for request in requests]

    def draw(self, request: Request) -> Tensor:
        frames = request.size[0]
        video = torch.full((3, *request.size), torch.nan)
        for at, clip in request.keyframes.items():
            video[:, at : at + clip.shape[1]] = clip + self.off / 100
        for t in range(frames):
            if video[:, t].isnan().any():
                video[:, t] = video[:, t - 1] + 0.01 if t else 0
        return request.finish(video)


def numbers(video: Tensor) -> list[float]:
    return [round(100 * number, 2) for number in video[0, :, 0, 0].tolist()]


def test_a_simulation_goes_on_from_its_last_frames() -> None:
    pipeline = Counting()
    world = Simulation(pipeline, "a", overlap=1)  # type: ignore[arg-type]
    assert numbers(world.video) == list(range(13))
    assert numbers(world.act("b")) == list(range(13, 21))
    assert numbers(world.act("c")) == list(range(21, 29))
    assert numbers(world.video) == list(range(29))
    assert [request.prompt for request in pipeline.requests] == ["a", "b", "c"]
    assert [request.seed for request in pipeline.requests] == [0, 1, 2]
    assert {tuple(request.size) for request in pipeline.requests} == {(13, 4, 4)}
    short = Simulation(pipeline, "a", first=torch.zeros(3, 3, 4, 4))  # type: ignore[arg-type]
    seen = [next(iter(pipeline.requests[-1].keyframes.values())).shape[1] for _ in range(3) if short.act("b") is not None]
    assert seen == [1, 5, 5], "as soon as there is enough, a chunk sees all it can"
    assert numbers(short.video) == [0, 0, 0, *range(1, 27)]
    begun = Simulation(pipeline, "a", first=torch.full((3, 3, 4, 4), 0.07))  # type: ignore[arg-type]
    assert numbers(begun.act("b"))[0] == 8
    with pytest.raises(ValueError, match="size: expected more than the 13 frames that a chunk sees, got 13"):
        Simulation(pipeline, "a", overlap=3)  # type: ignore[arg-type]


def test_chunks_fade_into_each_other() -> None:
    """What a chunk sees comes back a little different: nowhere is there a cut."""
    world = Simulation(Counting(off=6.0), "a", overlap=1)  # type: ignore[arg-type]
    assert numbers(world.act("b")) == list(range(19, 27)), "the new frames alone, as they are"
    assert numbers(world.video) == [*range(8), 9, 11, 13, 15, 17, *range(19, 27)]
    world.act("c")
    assert numbers(world.video) == [*range(8), 9, 11, 13, 15, 17, 19, 20, 21, 23, 25, 27, 29, 31, *range(33, 41)]


def test_a_long_video_is_extended_until_it_is_long_enough() -> None:
    pipeline, reported = Counting(), []
    video = long_video(pipeline, ["a", "b"], 50, overlap=2, progress=reported.append)  # type: ignore[arg-type]
    assert numbers(video) == list(range(50))
    assert reported == [13, *[4] * 9, 1], "the first chunk counts, and of the last one what is kept"
    assert [request.prompt for request in pipeline.requests] == ["a", *["b"] * (len(reported) - 1)]
    reported.clear()
    assert numbers(long_video(pipeline, "a", 5, progress=reported.append)) == list(range(5))  # type: ignore[arg-type]
    assert reported == [5]
    with pytest.raises(ValueError, match="expected at least one prompt and one frame, got 0 and 5"):
        long_video(pipeline, [], 5)  # type: ignore[arg-type]


def test_a_loop_comes_back_to_its_beginning() -> None:
    pipeline = Counting()
    video = loop(pipeline, "a", passage=8, passage_prompt="b")  # type: ignore[arg-type]
    assert [request.prompt for request in pipeline.requests] == ["a", "b"]
    passage = pipeline.requests[1]
    assert numbers(passage.keyframes[0]) == [8, 9, 10, 11, 12]
    assert numbers(passage.keyframes[13]) == [0, 1, 2, 3]
    assert sorted(numbers(video)) == list(range(21))
    # Counting up, the way from 20 to 0 is the only jump; every other place is as good to begin.
    assert numbers(video) != list(range(21))
    video = loop(Counting(off=6.0), "a", passage=8)  # type: ignore[arg-type]
    faded = [4.6, 4.4, 4.2, 4, 5, 6, 7, 9, 11, 13, 15, 17, *range(19, 27), 4.8]
    assert numbers(video) == faded, "both ends of the clip fade into the passage"
    assert len(numbers(loop(pipeline, "a"))) == 25  # type: ignore[arg-type]


@pytest.mark.parametrize(("frames", "overlap"), [(13, 1), (13, 2), (5, 1)])
def test_fades_of_a_loop_may_overlap(frames: int, overlap: int) -> None:
    """A clip of zeros, some of which come back as 0.6: it changes by small steps all around."""

    class Still(Counting):
        def draw(self, request: Request) -> Tensor:
            made = torch.full((3, *request.size), 0.6 if request.keyframes else 0.0)
            return request.finish(made)

    video = close(Still(), "a", (frames, 4, 4), passage=8, overlap=overlap)  # type: ignore[arg-type]
    assert video.shape[1] == frames + 8
    assert (video - video.roll(1, dims=1)).abs().max() < 0.31


def test_large_frames_are_refined_from_small_drafts() -> None:
    pipeline = Counting()
    tall, wide = refined(pipeline, ["a", "b"], [(5, 30, 20), (1, 16, 24)], draft=8)  # type: ignore[arg-type]
    drafts, again = pipeline.requests[:2], pipeline.requests[2:]
    assert [request.size for request in drafts] == [(5, 12, 8), (1, 8, 12)]
    assert [request.size for request in again] == [(5, 30, 20), (1, 16, 24)]
    assert [request.prompt for request in again] == ["a", "b"]
    assert all(request.init_video is not None and request.strength == 0.25 for request in again)
    assert again[0].init_video[0, :2, 15, 10].tolist() == pytest.approx([0, 0.01]), "frame by frame"
    assert [tuple(video.shape) for video in (tall, wide)] == [(3, 5, 30, 20), (3, 1, 16, 24)]
    with pytest.raises(ValueError, match="draft: expected from 1 to 15 pixels, as the shorter side has 16, got 16"):
        refined(pipeline, ["a"], [(1, 16, 24)], draft=16)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "untrained"
    SoraPipeline.from_preset("tiny", patch=(1, 8, 8), size=(6, 16, 16)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    return {
        "image": write_video(folder / "image.png", torch.rand(3, 1, 16, 24)),
        "video": write_video(folder / "video.mp4", torch.rand(3, 7, 16, 24)),
        "other": write_video(folder / "other.mp4", torch.rand(3, 5, 16, 24)),
        "fast": write_video(folder / "fast.mp4", torch.rand(3, 5, 16, 24), fps=24),
        "narrow": write_video(folder / "narrow.mp4", torch.rand(3, 5, 16, 16)),
    }


COMMANDS = {
    "generate": (["a cat", "--size", "4x16x16"], (4, 16, 16)),
    "generate large": (["a cat", "--size", "4x40x24", "--draft", 16], (4, 40, 24)),
    "animate": (["{image}", "it moves", "--frames", 5], (5, 16, 24)),
    "restyle": (["{video}", "in red", "--strength", 0.5], (7, 16, 24)),
    "extend": (["{video}", "it goes on", "--frames", 3], (10, 16, 24)),
    "extend backward": (["{video}", "it began", "--frames", 3, "--backward"], (10, 16, 24)),
    "join": (["{video}", "{other}", "--frames", 2], (14, 16, 24)),
    "loop": (["a cat", "--passage", 4], (10, 16, 16)),
    "long": (["a cat", "a dog", "--seconds", 2], (16, 16, 16)),
    "simulate": (["a cat", "--action", "it jumps", "--action", "it sits"], (14, 16, 16)),
}


def test_a_file_keeps_its_frames_per_second(checkpoint, files, tmp_path) -> None:
    common = ["--checkpoint", checkpoint, "--steps", 1]
    for args, rate in (
        (["extend", files["fast"], "it goes on", "--frames", 3], 24),
        (["restyle", files["fast"], "in red"], 24),
        (["restyle", files["fast"], "in red", "--fps", 12], 12),
        (["join", files["video"], files["fast"], "--frames", 2, "--fps", 10], 10),
        (["animate", files["image"], "it moves"], 8),
        (["join", files["image"], files["fast"], "--frames", 2], 24),
    ):
        out = tmp_path / f"{args[0]}-{rate}"
        result = invoke(*args, *common, "--out", out)
        assert result.exit_code == 0, result.output
        (video,) = out.glob("*.mp4")
        assert read_video(video)[1] == rate


def test_an_interrupted_world_is_kept(checkpoint, tmp_path, monkeypatch) -> None:
    def interrupted(self, prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr(Simulation, "act", interrupted)
    result = invoke("simulate", "a cat", "--action", "it jumps", "--checkpoint", checkpoint, "--out", tmp_path, "--steps", 1)
    assert result.exit_code == 0, result.output
    assert "interrupted: what was made until then is kept" in result.output
    assert tuple(read_video(next(tmp_path.glob("*.mp4")))[0].shape[1:]) == (6, 16, 16)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_task_has_a_command(name, checkpoint, files, tmp_path) -> None:
    args, size = COMMANDS[name]
    args = [files[arg[1:-1]] if str(arg).startswith("{") else arg for arg in args]
    result = invoke(name.split()[0], *args, "--checkpoint", checkpoint, "--out", tmp_path, "--steps", 2)
    assert result.exit_code == 0, result.output
    made = sorted(tmp_path.iterdir())
    assert [path.suffix for path in made] == [".mp4", ".png"]
    assert all(str(path) in result.output.replace("\n", "") for path in made)
    assert tuple(read_video(made[0])[0].shape[1:]) == size


def test_tasks_and_sizes_are_mixed_in_one_batch(checkpoint, files, tmp_path) -> None:
    wanted = [
        {"prompt": "a cat", "size": "3x24x16"},
        {"task": "text_to_image", "prompt": "a dog", "height": 16, "width": 40},
        {"task": "image_to_video", "prompt": "it moves", "image": "image.png", "frames": 4},
        {"task": "video_to_video", "prompt": "in red", "video": "video.mp4", "strength": 0.5},
        {"task": "extend", "prompt": "on", "video": "video.mp4", "frames": 2, "backward": True},
        {"task": "join", "prompt": "", "first": "video.mp4", "last": "other.mp4", "frames": 3},
    ]
    path = files["image"].parent / "requests.json"
    path.write_text(json.dumps(wanted))
    result = invoke("batch", path, "--checkpoint", checkpoint, "--out", tmp_path, "--steps", 2)
    assert result.exit_code == 0, result.output
    made = sorted(tmp_path.iterdir())[:-1]
    sizes = [tuple(read_video(file)[0].shape[1:]) for file in made]
    assert sizes == [(3, 24, 16), (1, 16, 40), (4, 16, 24), (7, 16, 24), (9, 16, 24), (15, 16, 24)]


def test_a_simulation_asks_for_actions(checkpoint, tmp_path) -> None:
    args = ["simulate", "a cat", "--checkpoint", str(checkpoint), "--out", str(tmp_path), "--steps", "1"]
    result = invoke(*args, typed="it jumps\n\n")
    assert result.exit_code == 0, result.output
    assert "action (empty ends)" in result.output
    assert read_video(tmp_path / "00-a-cat-seed0.mp4")[0].shape[1] == 10


def test_a_terminal_shows_two_pixels_a_letter() -> None:
    console = Console(force_terminal=True, color_system="truecolor", width=40, file=io.StringIO())
    video = torch.full((3, 2, 4, 6), -1.0)
    video[0, 1, 0] = 1.0  # the upper row of the second frame is red
    show_video(video, console, fps=1000.0)
    text = console.file.getvalue()
    assert "▀" in text
    assert "255;0;0" in text, "red letters on a black ground"
    quiet = Console(file=io.StringIO())
    show_video(video, quiet, fps=8.0)
    assert quiet.file.getvalue() == "2 frames\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["animate", "{tmp}/none.png", "x"], "none.png: it does not exist"),
        (["restyle", "{video}", "x", "--strength", "1.5"], "strength: expected a number above 0 and up to 1, got 1.5"),
        (["extend", "{video}", "x", "--frames", "-1"], "--frames.*1"),
        (["extend", "{video}", "x", "--overlap", "-1"], "--overlap.*0"),
        (["generate", "x", "--device", "gpu"], "--device: expected cpu, cuda or cuda:N, got 'gpu'"),
        (["generate", "x", "--device", "cuda:9"], "--device: expected one of the 0 GPUs that this torch sees or cpu, got 'cuda:9'"),
        (["generate", "x", "--out", "{video}"], "--out: expected a folder, got the file {video}"),
        (["join", "{video}", "{fast}"], "LAST: expected the frames per second of first, got 8 and 24; --fps sets one for both"),
        (["generate", "x", "--scheduler", "magic"], "expected one of euler, heun, unipc, dpm++, got 'magic'"),
        (["animate", "{tmp}/none[/x].png", "x"], "none[/x].png: it does not exist"),
        (["batch", "{tmp}/types.json"], "request 0: size: expected TxHxW, such as 8x32x48, or [T, H, W], each at least 1, got 5"),
        (["batch", "{tmp}/path.json"], "request 0: image: expected the name of a file, got 5"),
        (["loop", "x", "--size", "6x16"], "expected TxHxW, such as 8x32x48, got '6x16'"),
        (["long", "x", "--seconds", "0"], "--seconds: expected at least one frame, which is 0.125, got 0"),
        (["simulate", "x", "--overlap", "9"], "expected more than the 10 frames that a chunk sees, got 6"),
        (["batch", "{tmp}/none.json"], "expected a JSON file, got"),
        (["batch", "{tmp}/text.json"], "expected JSON, got"),
        (["batch", "{tmp}/task.json"], "request 0: task: expected one of text_to_video, .*got 'dance'"),
        (["batch", "{tmp}/field.json"], "request 0: expected negative_prompt, prompt, seed, size for text_to_video, got sise"),
        (["batch", "{tmp}/object.json"], "expected a list of objects with a task each"),
        (["generate", "x", "--expand"], "captioner: expected a checkpoint with a captioner, got one without"),
        (["caption", "{video}"], "captioner: expected a checkpoint with a captioner, got one without"),
        (["expand", "x"], "captioner: expected a checkpoint with a captioner, got one without"),
        (["generate", "x", "--size", "0x16x16"], "size: expected (T, H, W), each at least 1, got (0, 16, 16)"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(args, message, checkpoint, files, tmp_path) -> None:
    import re

    (tmp_path / "text.json").write_text("[")
    (tmp_path / "task.json").write_text('[{"task": "dance", "prompt": "x"}]')
    (tmp_path / "field.json").write_text('[{"prompt": "x", "sise": "1x8x8"}]')
    (tmp_path / "object.json").write_text('{"prompt": "x"}')
    (tmp_path / "types.json").write_text('[{"prompt": "x", "size": 5}]')
    (tmp_path / "path.json").write_text('[{"task": "image_to_video", "prompt": "x", "image": 5, "frames": 3}]')
    before = sorted(tmp_path.iterdir())
    args = [arg.format(tmp=tmp_path, **files) for arg in args]
    options = [] if args[0] in ("caption", "expand") else ["--out", tmp_path / "out", "--steps", 1]
    result = invoke(args[0], "--checkpoint", checkpoint, *options, *args[1:])
    assert result.exit_code == 2, result.output
    text = result.output.replace("\n", "")
    message = message.format(tmp=tmp_path, **files)
    assert re.search(message if ".*" in message else re.escape(message), text), text
    assert "Traceback" not in text
    assert sorted(tmp_path.iterdir()) == before, "nothing half-written"

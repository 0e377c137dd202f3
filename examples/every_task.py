"""Every task with the checkpoint of the package: python examples/every_task.py [STEPS]

Requests of different tasks and sizes share one packed batch. Tasks of several passes are functions. Files go to outputs/every_task.
"""

import sys
from pathlib import Path

from sora_model import (
    Simulation,
    SoraPipeline,
    extend,
    image_to_video,
    join,
    long_video,
    loop,
    refined,
    text_to_image,
    text_to_video,
    video_to_video,
)
from sora_model.data import write_video

OUT = Path("outputs/every_task")


def main(steps: int = 8) -> None:
    pipeline = SoraPipeline.from_pretrained()
    timing, quick = pipeline.timing, {"num_inference_steps": steps}
    red, star = pipeline(
        [text_to_video("a red circle moves right", (13, 48, 80)), text_to_image("a blue star", 64, 64)], generator=0, **quick
    )
    one_pass = {
        "image_to_video": image_to_video("a blue star moves up", star, 13, timing),
        "video_to_video": video_to_video("a yellow circle moves right", red, strength=0.85),
        "extend": extend("a red circle moves down", red, 8, timing),
        "extend_backward": extend("a red circle moves right", red, 8, timing, backward=True),
        "join": join("a red circle", red, red.flip(1), 8, timing),
    }
    made = dict(zip(one_pass, pipeline(list(one_pass.values()), generator=1, **quick), strict=True))

    world = Simulation(pipeline, "a white ring moves right", **quick)
    world.act("a white ring moves up")
    made |= {
        "text_to_video": red,
        "text_to_image": star,
        "loop": loop(pipeline, "a green square moves up", (13, 48, 48), passage=12, **quick),
        "long_video": long_video(pipeline, "a red circle moves left", frames=29, **quick),
        "simulation": world.video,
        "large_image": refined(pipeline, ["a blue star"], [(1, 192, 256)], draft=64, **quick)[0],
    }
    for name, video in made.items():
        path = write_video(OUT / f"{name}.{'png' if video.shape[1] == 1 else 'mp4'}", video, scale=2)
        print(f"{path!s:44} {'x'.join(map(str, video.shape[1:]))}")
    print(pipeline.caption([red])[0])
    print(pipeline.expand(["a red circle moves right"])[0])


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))

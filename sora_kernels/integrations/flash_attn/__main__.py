"""python -m sora_kernels.integrations.flash_attn build-stub [--out DIR]"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from .stub import build


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage."""
        self.exit(2, f"{self.prog}: {message.removeprefix('argument ')}\n")


def main(words: list[str]) -> int:
    parser = _Parser(prog="python -m sora_kernels.integrations.flash_attn", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="build-stub")
    about = "writes a wheel of a distribution flash_attn that has the stand-in"
    command = commands.add_parser("build-stub", help=about, description=about, allow_abbrev=False)
    command.add_argument("--out", type=_folder, default=Path("dist"), metavar="DIR", help="the folder to write it to (dist)")
    arguments = parser.parse_args(words)
    try:
        wheel = build(arguments.out)
    except OSError as error:
        command.error(f"--out: {arguments.out}: {error.strerror}")
    print(f"{wheel}: install it by pip install --no-deps {wheel}")
    return 0


def _folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("expected a folder, got nothing")
    return Path(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

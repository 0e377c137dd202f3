"""What is said where a package of the extra `model` is not installed: `not_installed`, `app_without`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn


def not_installed(package: str | None, needs: str = "commands need") -> str:
    return f"{package} is not installed, which {needs}: pip install 'sora_kernels[model]'"


def app_without(package: str | None) -> Callable[[], NoReturn]:
    """In place of the command line's app: a line and exit code 2."""

    def app() -> NoReturn:
        print(f"error: {not_installed(package)}", file=sys.stderr)
        sys.exit(2)

    return app

"""The command line: `sora --help`."""

# isort: off
from ..rooms import module_of, rooms_with
from .app import app

# Each adds its commands to the app; the help lists them in this order.
from . import generate, data, train  # noqa: F401

for room in rooms_with("commands"):  # those of other rooms come last
    module_of(room, "commands")

__all__ = ["app"]

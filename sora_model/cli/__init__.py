"""The command line: `sora --help`."""

from . import data, evaluate, generate, train  # noqa: F401 (they add their commands to the app, in this order)
from .app import app

__all__ = ["app"]

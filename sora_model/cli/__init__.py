"""The command line: `sora --help`."""

# isort: off
from .app import app

# Each adds its commands to the app; the help lists them in this order.
from . import generate, data, train  # noqa: F401
from ..world import commands  # noqa: F401

__all__ = ["app"]

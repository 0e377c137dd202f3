"""The command line: `sora --help`."""

# isort: off
from .app import app

# Each adds its commands to the app; the help lists them in this order.
from . import generate, data, train, evaluate  # noqa: F401

__all__ = ["app"]

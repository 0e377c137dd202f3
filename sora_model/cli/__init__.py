"""The command line: `sora --help`."""

from ..rooms import module_of, rooms_with

# isort: off
try:
    from .app import app

    # Each adds its commands to the app; the help lists them in this order.
    from . import generate, data, train, info  # noqa: F401

    for room in rooms_with("commands"):  # those of other rooms come last
        module_of(room, "commands")
except ModuleNotFoundError as error:  # without the extra, in which typer and rich come
    if (error.name or "").startswith("sora_"):
        raise
    from ..missing import app_without

    app = app_without(error.name)  # type: ignore[assignment]

__all__ = ["app"]

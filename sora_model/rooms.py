"""What rooms of the package bring along, found by the name of a module in them: no room has to import another for it.

A room that is taken out of the package takes its commands and its training data with it, and nothing else breaks.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

import sora_model


def rooms_with(module: str) -> list[str]:
    """Names of the rooms that have a module of that name, in order. Imports none of them.

    >>> rooms_with("commands")
    ['world']
    """
    rooms = [(place, room.name) for place in sora_model.__path__ for room in pkgutil.iter_modules([place]) if room.ispkg]
    return sorted(room for place, room in rooms if any(m.name == module for m in pkgutil.iter_modules([f"{place}/{room}"])))


def module_of(room: str, module: str) -> ModuleType:
    """A module of a room."""
    return importlib.import_module(f"sora_model.{room}.{module}")

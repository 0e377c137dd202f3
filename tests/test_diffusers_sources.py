"""diffusers' forwards that ours replace are those that ours were written against.

A change of one fails here by name. Compare it with ours, then write the table anew: `python tests/test_diffusers_sources.py`.
"""

import hashlib
import importlib
import inspect
import json
from pathlib import Path

from sora_kernels.integrations.diffusers.patching import MODELS

TABLE = Path(__file__).with_name("diffusers_sources.json")


def sources() -> dict[str, str]:
    """The SHA-256 of the source of each replaced forward and processor, and of the model that calls them, by name."""
    functions = {}
    for file in sorted(set(MODELS.values())):
        family = importlib.import_module(f"sora_kernels.integrations.diffusers.{file}").FAMILY
        functions |= {f"{kind.__module__}.{kind.__qualname__}": kind.forward for kind in family.forwards}
        functions |= {f"{kind.__module__}.{kind.__qualname__}": kind.__call__ for kind in family.processors}
        modules = {inspect.getmodule(kind) for kind in (*family.forwards, *family.processors)}
        for module in modules:
            functions |= {f"{module.__name__}.{name}": getattr(module, name).forward for name in MODELS if hasattr(module, name)}
    hashes = {name: hashlib.sha256(inspect.getsource(inspect.unwrap(f)).encode()).hexdigest() for name, f in functions.items()}
    return dict(sorted(hashes.items()))


def test_replaced_forwards_have_not_changed() -> None:
    known, found = json.loads(TABLE.read_text()), sources()
    changed = [name for name in known | found if known.get(name) != found.get(name)]
    assert not changed, f"compare with ours: {', '.join(changed)}"


if __name__ == "__main__":
    TABLE.write_text(json.dumps(sources(), indent=2) + "\n")

"""A wheel of a distribution flash_attn that has the stand-in and nothing else; `build-stub` of `__main__.py` builds it.

transformers and diffusers ask for an installed distribution flash_attn, by its metadata, before they import the package. The wheel
has no code of its own: each of its modules imports from sora_kernels. It is for environments without flash_attn, whose place it
would take.
"""

from __future__ import annotations

import base64
import hashlib
import zipfile
from pathlib import Path

from . import CONTENTS, PACKAGES, VERSION

_METADATA = f"""\
Metadata-Version: 2.1
Name: flash_attn
Version: {VERSION}
Summary: A stand-in for FlashAttention: the functions of sora_kernels, which has to be installed beside it
"""
_WHEEL = "Wheel-Version: 1.0\nGenerator: sora_kernels\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def files() -> dict[str, str]:
    """The files of the wheel, but for its record."""
    info = f"flash_attn-{VERSION}.dist-info"
    found = {_path(name): _module(name) for name in CONTENTS}
    return {**found, f"{info}/METADATA": _METADATA, f"{info}/WHEEL": _WHEEL, f"{info}/top_level.txt": "flash_attn\n"}


def build(folder: Path) -> Path:
    """Writes the wheel into a folder, which is made, and returns its path. The same version gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"flash_attn-{VERSION}-py3-none-any.whl"
    record = f"flash_attn-{VERSION}.dist-info/RECORD"
    contents = {name: text.encode() for name, text in files().items()}
    lines = [f"{name},sha256={_digest(data)},{len(data)}" for name, data in contents.items()]
    contents[record] = "\n".join([*lines, f"{record},,", ""]).encode()
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in contents.items():
            member = zipfile.ZipInfo(name)  # of 1980, and readable by all
            member.external_attr = 0o644 << 16
            archive.writestr(member, data)
    return wheel


def _path(name: str) -> str:
    return f"{name.replace('.', '/')}{'/__init__' if name in PACKAGES else ''}.py"


def _module(name: str) -> str:
    source, names = CONTENTS[name]
    lines = [f'"""{name}, as sora_kernels stands in for it."""', ""]
    if name in PACKAGES:  # what else is installed of flash_attn, such as flash_attn.cute, can be imported beside it
        lines += ["from pkgutil import extend_path", ""]
    if source is not None:
        lines += [f"from {source.__name__} import (", *(f"    {key}," for key in names), ")", ""]
    if name in PACKAGES:
        lines += ["__path__ = extend_path(__path__, __name__)"]
    if "." not in name:
        lines += [f'__version__ = "{VERSION}"']
    return "\n".join([*lines, ""])


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()

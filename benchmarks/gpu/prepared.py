"""What was compiled ahead of time: modules and kernels in a folder, with the hashes of all that they depend on.

    manifest.json       what the rest was made from and for
    modules/*.so        _cpu and _cuda
    kernels.tar.xz      Triton's cache: binaries and what Triton must know of them

Whoever takes them compares the hashes first; a reason is returned where they do not fit.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

MANIFEST, MODULES, KERNELS = "manifest.json", "modules", "kernels.tar.xz"
GROUP = "__grp__"  # the file in which Triton lists, by absolute paths, what belongs to a kernel


def sha256(chunks: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def sources(root: Path) -> str:
    """The hash of all that modules are built from."""
    paths = [root / "setup.py", *sorted(path for path in (root / "csrc").rglob("*") if path.is_file())]
    return sha256(part for path in paths for part in (str(path.relative_to(root)).encode(), path.read_bytes()))


def suffix() -> str:
    """Of modules that this Python imports."""
    return str(sysconfig.get_config_var("EXT_SUFFIX"))


def triton_hash() -> str:
    """The hash of the sources and libraries of Triton that affect compilation."""
    from triton.runtime.cache import triton_key

    return sha256([triton_key().encode()])


def capability() -> str | None:
    """Of the GPU that is there."""
    import torch  # which the driver, who reads a manifest, does without

    return "{}{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else None


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text())


def first_error(text: str) -> str:
    """What a build complains of first."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if re.search(r"\berror\b|not found", line)), lines[-1] if lines else "no output")


def build(root: Path, environment: Mapping[str, str]) -> str:
    """Builds the modules in place, or finds them up to date; what was left out of them. RuntimeError with the first error."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    lines: list[str] = []
    with subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        raise RuntimeError(f"the modules were not built: {first_error(''.join(lines))}")
    return next((line.strip() for line in lines if "without the CUDA kernels" in line), "built here")


def place_modules(folder: Path, root: Path) -> str | None:
    """Copies the modules into the package; why not, if they do not fit."""
    known = manifest(folder)
    if not known["modules"]:
        return "prepared without modules"
    if known["suffix"] != suffix():
        return f"prepared for {known['suffix']}, this Python wants {suffix()}"
    if known["sources"] != sources(root):
        return "prepared from other sources"
    if capability() not in (None, known["capability"]):
        return f"prepared for capability {known['capability']}, this GPU has {capability()}"
    for name, expected in known["modules"].items():
        if sha256([(folder / MODULES / name).read_bytes()]) != expected:
            return f"{name} is not what was prepared"
    for name in known["modules"]:
        target = root / "sora_kernels" / name
        part = target.with_suffix(".new")  # a process that runs may have it mapped
        shutil.copyfile(folder / MODULES / name, part)
        part.chmod(0o755)
        part.replace(target)
    return _import_error(list(known["modules"]), root)


def _import_error(names: list[str], root: Path) -> str | None:
    """Why one of the modules cannot be imported here, built elsewhere as it was; those are removed then."""
    modules = [f"sora_kernels.{name.partition('.')[0]}" for name in names]
    command = [sys.executable, "-c", f"import torch, {', '.join(modules)}"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode == 0:
        return None
    for name in names:
        (root / "sora_kernels" / name).unlink(missing_ok=True)
    return f"cannot be imported: {first_error(done.stderr)}"


def place_kernels(folder: Path) -> str | None:
    """Unpacks the kernels to where TRITON_CACHE_DIR says; why not, if they do not fit."""
    known = manifest(folder)
    if known["triton"] != triton_hash():
        return f"prepared by Triton {known['triton_version']}, and this is another"
    if capability() not in (None, known["capability"]):
        return f"prepared for capability {known['capability']}, this GPU has {capability()}"
    if sha256([(folder / KERNELS).read_bytes()]) != known["kernels"]:
        return f"{KERNELS} is not what was prepared"
    unpack(folder / KERNELS, Path(os.environ["TRITON_CACHE_DIR"]))
    return None


def pack(cache: Path, archive: Path) -> None:
    """Writes Triton's cache, without what was only in use while it compiled."""
    with tarfile.open(archive, "w:xz", preset=1) as tar:
        for path in sorted(path for path in cache.rglob("*") if path.is_file() and "tmp.pid" not in str(path)):
            if path.name != "lock":
                tar.add(path, path.relative_to(cache))


def unpack(archive: Path, cache: Path) -> None:
    """The paths in groups become those of this folder. What is there already stays: it may be in use."""
    cache.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        members = [member for member in tar if not (cache / member.name).exists()]
        tar.extractall(cache, members, filter="data")
    for path in (cache / member.name for member in members if GROUP in member.name):
        group = json.loads(path.read_text())
        group["child_paths"] = {name: str(path.parent / name) for name in group["child_paths"]}
        path.write_text(json.dumps(group))

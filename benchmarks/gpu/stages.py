"""What the driver runs, in the order in which it is wanted should time run out: right first, then fast, then everything else."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.gpu.driver import Stage, Task

# Tests of module _cuda's kernels, one of each way they touch memory: rows of a wider buffer, odd widths, long rows, large sums.
MEMCHECK = [
    "test_adaln.py::TestContract::test_any_strides[cuda-cuda-bfloat16-both-rows]",
    "test_adaln.py::test_gate_residual_layer_norm_modulate[cuda-cuda-float32-D37]",
    "test_adaln.py::test_gate_residual_layer_norm_modulate[cuda-cuda-bfloat16-long_rows]",
    "test_norm_gate_residual.py::test_norm_gate_residual[cuda-cuda-bfloat16-slack]",
    "test_rope.py::TestContract::test_any_strides[cuda-cuda-bfloat16-rope-rows]",
    "test_rope.py::TestContract::test_any_strides[cuda-cuda-bfloat16-per_head-rows]",
    "test_bias_gelu.py::test_bias_gelu[cuda-cuda-bfloat16-D37-bias]",
    "test_patchify.py::TestContract::test_any_strides[cuda-cuda-bfloat16-patchify-rows]",
    "test_patchify.py::TestContract::test_any_strides[cuda-cuda-bfloat16-unpatchify-rows]",
]
# Those that share memory between threads.
RACECHECK = [
    "test_adaln.py::test_gate_residual_layer_norm_modulate[cuda-cuda-bfloat16-D1152]",
    "test_adaln.py::test_gate_residual_layer_norm_modulate[cuda-cuda-bfloat16-long_rows]",
    "test_rope.py::TestContract::test_any_strides[cuda-cuda-bfloat16-per_head-rows]",
    "test_bias_gelu.py::test_bias_gelu[cuda-cuda-bfloat16-D1152-bias]",
]
PROFILED = ["SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats", "WarpStateStats"]  # Nsight Compute's sections


def child(family: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu.child", family]


def tests(*arguments: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-m", "gpu"]
    return [*command, "-p", "benchmarks.gpu.plugin", "-p", "no:cacheprovider", *arguments]


def files(*names: str) -> list[str]:
    return [f"tests/test_{name}.py" for name in names]


def sanitizer(tool: str, cases: Sequence[str], seconds: float) -> Task:
    """Of the CUDA kernels; without torch's cache of memory, which would hide what lies outside a tensor."""
    command = ["compute-sanitizer", "--tool", tool, "--kernel-name", "kernel_substring=sora", "--error-exitcode", "9"]
    command += tests(*(f"tests/{case}" for case in cases))
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Task(tool, command, seconds, environment=environment, needs=["compute-sanitizer"])


def tasks_of_tests(words: str, seconds: float, float32: bool = True) -> list[Task]:
    """Processes of about the same length: most of it is Python's and Triton's, so that a GPU serves many.

    Args:
        float32: whether there are tests of it, which some files have enough of for a process of their own.
    """
    shares = {
        "attention": ("not float32", ["attention"]),
        "edges": ("", ["attention_edges"]),
        "windows": ("", ["spatiotemporal_attention"]),
        "rope": ("", ["rope"]),
        "adaln": ("not float32", ["adaln", "norm_gate_residual"]),
        "patches and GELU": ("", ["patchify", "patch_embed", "bias_gelu"]),
    }
    if float32:
        shares |= {"attention, float32": ("float32", ["attention"]), "adaln, float32": ("float32", ["adaln"])}
    return [
        Task(name, tests("-k", " and ".join(filter(None, (share, words))), *files(*names)), seconds, 40, {"OMP_NUM_THREADS": "1"})
        for name, (share, names) in shares.items()
    ]


def stages(prepared: str = "") -> list[Stage]:
    """All of them; `prepared` is the folder that prepare.py filled, if there is one."""
    # ncu leaves the clocks as they are: they belong to the machine.
    ncu = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--target-processes", "all"]
    ncu += [word for section in PROFILED for word in ("--section", section)]
    setup = Task("setup", [sys.executable, "-m", "benchmarks.gpu.environment", prepared], 240)
    sanitizers = [sanitizer("memcheck", MEMCHECK, 45), sanitizer("racecheck", RACECHECK, 45)]
    usual = "not reference and not compiled"
    return [
        Stage("setup", 240, "checks.log", [setup]),
        Stage("smoke", 35, "checks.log", [Task("smoke", child("smoke"), 35, item_seconds=15)]),
        Stage("capture", 20, "checks.log", [Task("capture", tests(*files("gpu", "boundaries")), 20)]),
        Stage("attention", 75, "speed.log", [Task("attention", child("attention"), 75, item_seconds=20)]),
        Stage("memory", 50, "speed.log", [Task("memory", child("memory"), 50, item_seconds=15)]),
        Stage("promises", 40, "checks.log", [Task("promises", child("promises"), 40, item_seconds=20)]),
        Stage("tests", 70, "tests.log", tasks_of_tests(f"{usual} and (bfloat16 or not float16)", 70)),
        Stage("sanitizer", 45, "sanitizer.log", sanitizers),
        Stage("tuning", 80, "tuning.log", [Task("tuning", child("tuning"), 80, item_seconds=20)]),
        Stage("profile", 40, "more.log", [Task("ncu", [*ncu, *child("profiled")], 40, needs=["ncu"])]),
        Stage("peers", 120, "speed.log", [Task("peers", child("peers"), 120, item_seconds=60)]),
        Stage("float16", 70, "tests.log", tasks_of_tests(f"{usual} and float16 and not bfloat16", 70, float32=False)),
        Stage("reference", 120, "tests.log", tasks_of_tests("(reference or compiled)", 120)),
    ]

"""A child of fork() computes as its parent does, whatever the parent's other threads were in the middle of."""

import os
import subprocess
import sys

import pytest
import torch

from sora_kernels import backends, memory
from sora_kernels.bias_gelu import bias_gelu

START = """
import os, threading, time, torch
from sora_kernels import backends, memory
from sora_kernels.bias_gelu import bias_gelu

def ended(child, seconds=60):
    # The exit status, or minus the number of a signal: 9 if it hangs.
    for _ in range(100 * seconds):
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, 9)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork()")


def in_a_process(code: str, **environment: str) -> str:
    """What it prints; such a process is none with the threads of other tests."""
    env = {**os.environ, "OMP_WAIT_POLICY": "passive", **environment}
    done = subprocess.run([sys.executable, "-c", START + code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_module_that_is_loaded_twice_forks():
    """The pool's lock, which is not recursive, is taken once."""
    code = """
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from sora_kernels import _cpu
loader = ExtensionFileLoader("other._cpu", _cpu.__file__)
loader.exec_module(module_from_spec(spec_from_loader("other._cpu", loader)))
child = os.fork()
if child == 0:
    os._exit(0)
print(ended(child))
"""
    assert in_a_process(code) == "0\n"


def test_kernels_of_several_threads_run_in_a_child_and_in_its_child():
    """GCC's OpenMP runtime would wait there for threads that only the parent has."""
    code = """
torch.set_num_threads(4)
x = torch.randn(3000, 512)
expected = bias_gelu(x, None)
def check():
    assert torch.equal(bias_gelu(x, None), expected)
    assert torch.equal(torch.sin(x)[5], torch.sin(x[5]))  # torch's own threads are the same ones
child = os.fork()
if child == 0:
    check()
    grandchild = os.fork()
    check()
    if grandchild:
        assert ended(grandchild) == 0
        print("children")
    os._exit(0) if grandchild == 0 else exit()
assert ended(child) == 0
check()
print("parent")
"""
    assert in_a_process(code) == "children\nparent\n"


def test_the_memory_of_outputs_is_whole_in_a_child():
    """A thread that gives memory back while another one forks would leave it locked in the child."""
    code = """
x, w = torch.zeros(8000, 1024), torch.ones(1, requires_grad=True)
def work():
    while not done.is_set():
        # torch's nodes hold the products' inputs, and free them without the GIL.
        sum((memory.empty_like(x).view(-1)[::4096] * w).sum() for _ in range(8)).backward()
done = threading.Event()
thread = threading.Thread(target=work)
thread.start()
statuses = set()
for _ in range(300):
    child = os.fork()
    if child == 0:
        memory.empty_like(x)
        os._exit(0)
    statuses.add(ended(child, seconds=5))
    if statuses != {0}:
        break
done.set()
thread.join()
print(statuses)
"""
    assert in_a_process(code, SORA_KERNELS_CACHE_MB="0") == "{0}\n"


def test_what_other_threads_forced_or_recorded_ends_with_them():
    """In a child nobody would ever close it."""
    code = """
def hold():
    with backends.use_backend("reference"), backends.record() as calls:
        opened.set()
        done.wait()
        print(len(calls))
opened, done = threading.Event(), threading.Event()
thread = threading.Thread(target=hold)
thread.start()
opened.wait()
x = torch.zeros(3, 4)
def forced():
    with backends.record() as calls:
        bias_gelu(x, None)
    return calls[0][1], len(backends._records)
def say(who):
    print(who, *forced(), flush=True)
child = os.fork()
if child == 0:
    say("child")
    with backends.use_backend("cpu"), backends.record() as before:
        grandchild = os.fork()
        backends.use_backend("reference") if grandchild else say("grandchild")
    os._exit(0) if grandchild == 0 else None
    assert ended(grandchild) == 0
    say("child")
    os._exit(0)
assert ended(child) == 0
say("parent")
done.set()
thread.join()
say("parent")
"""
    out = in_a_process(code, SORA_KERNELS_BACKEND="")
    assert out.splitlines() == ["child cpu 0", "grandchild cpu 1", "child cpu 0", "parent reference 1", "1", "parent cpu 0"]


def test_what_is_remembered_of_widths_has_a_limit():
    """A width is that of a video where patches are cut."""
    for width in range(1, 3000):
        bias_gelu(torch.empty(0, width), None)
    assert backends._select.cache_info().currsize <= 1024
    assert memory.cached_bytes() <= memory.cache_limit()

"""A fork of this process that runs a function: what has been imported once is there in all of them."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable

FAILED = 70  # the exit status after an exception


def fork(run: Callable[[], int | None], output: int | None = None) -> int:
    """Starts it and returns its process's number.

    It ends with what the function returns, with a SystemExit's status, or, after any other exception, which it prints, with FAILED.
    output: the descriptor of a file for what it prints; default, this process's.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    status = FAILED
    try:
        if output is not None:
            os.dup2(output, 1)
            os.dup2(output, 2)
            # pytest's are elsewhere. Those of a fork's fork take the place of the first ones, which must not close theirs.
            sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
        status = run() or 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)  # whatever happened: nothing of the parent may go on here

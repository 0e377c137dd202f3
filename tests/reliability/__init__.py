"""Checks that attack the packages, and what they share. Makefile has the programs: python -m tests.reliability.<name> --help.

They share the helpers of tests/, which pytest imports by their bare names, and so do programs.
"""

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
if str(TESTS) not in sys.path:
    sys.path.append(str(TESTS))

"""Tests on a network of namespaces. They use the helpers of the relay's tests, the package `relay` beside this one."""

import sys
from pathlib import Path

# pytest's import mode `importlib` leaves sys.path alone, and knows a package by its name below tests/.
if (here := str(Path(__file__).resolve().parents[1])) not in sys.path:
    sys.path.append(here)

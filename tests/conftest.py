"""What every test shares: one thread, reproducible hypothesis examples, and the checkout on the import path."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]
if find_spec("shoal") is None:  # a checkout that is not installed
    sys.path.insert(0, str(ROOT))

# Two OpenMP threads on a busy machine with two cores wait for each other longer than they compute.
torch.set_num_threads(1)

# The same examples in every run: a test that was green stays green until the code changes.
settings.register_profile("shoal", derandomize=True, deadline=None, database=None)
settings.load_profile("shoal")

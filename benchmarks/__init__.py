"""What the library costs on this machine: `python -m benchmarks`, explained in docs/benchmarks.md."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # where a child process finds both packages

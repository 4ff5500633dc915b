"""What the library costs on this machine: `python -m benchmarks`, explained in docs/benchmarks.md."""

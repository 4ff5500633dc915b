"""Training over slow links: `python -m benchmarks.slow_link`."""

"""The PILLAR paper's training figures; see `python -m benchmarks.figures --help`."""

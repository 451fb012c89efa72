"""Accuracy in private; `python -m benchmarks.accuracy --help` has more."""

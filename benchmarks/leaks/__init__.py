"""What answers leak; `python -m benchmarks.leaks --help` has more."""

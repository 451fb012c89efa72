"""`python -m benchmarks.figures`."""

import sys

from .command import main

# Workers are spawned, and import this file again.
if __name__ == "__main__":
    sys.exit(main())

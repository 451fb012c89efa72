"""`python -m crypten_espn.cli`, the same as `crypten-espn`."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m sdjax`: the same as the command `sdjax`."""

import sys

from sdjax.cli import main

if __name__ == "__main__":
    sys.exit(main())

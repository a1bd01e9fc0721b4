"""Runs the command line as ``python -m optim_zoo.cli``."""

import sys

from optim_zoo.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m checkpoints` is the command `checkpoints`."""

import sys

from checkpoints.cli import main

if __name__ == "__main__":
    sys.exit(main())

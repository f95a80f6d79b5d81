"""`python -m everlong` is the `everlong` command."""

import sys

from everlong.cli import main

if __name__ == "__main__":
    sys.exit(main())

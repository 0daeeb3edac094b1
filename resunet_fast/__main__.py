"""Entry point of `python -m resunet_fast`."""

import sys

from resunet_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m tokenexit_cli`."""

import sys

from tokenexit_cli.main import main

if __name__ == "__main__":  # processes that are spawned import this file
    sys.exit(main())

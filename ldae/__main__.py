"""``python -m ldae`` and the ``ldae`` command."""

import sys

from ldae.cli import main

if __name__ == "__main__":
    sys.exit(main())

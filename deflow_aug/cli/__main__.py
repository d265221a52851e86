"""``python -m deflow_aug.cli``."""

import sys

from deflow_aug.cli import main

if __name__ == "__main__":
    sys.exit(main())

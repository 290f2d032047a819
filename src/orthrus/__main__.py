"""`python -m orthrus VERB`: the command line where no script is installed, and for `torchrun -m orthrus train`."""

import sys

from orthrus.cli import main

if __name__ == "__main__":
    sys.exit(main())

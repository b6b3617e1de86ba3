"""``python -m plait``: the same command line where no script is installed, and under torchrun."""

import sys

from plait.cli.entry import main

sys.exit(main())

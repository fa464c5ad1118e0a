"""Runs the command line: `python -m mar`."""

import sys

from mar.cli import main

sys.exit(main())

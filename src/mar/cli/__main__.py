"""`python -m mar.cli`."""

import sys

from mar.cli import main

sys.exit(main())

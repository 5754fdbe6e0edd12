"""`python -m tokenlabel` is the command line."""

import sys

from tokenlabel.cli import main

sys.exit(main())

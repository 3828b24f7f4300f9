"""`python -m owlore` is the command line."""

import sys

from owlore.cli import main

sys.exit(main())

"""`python -m minicos`, the same as `minicos`."""

import sys

from minicos.cli import main

sys.exit(main())

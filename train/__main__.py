"""`python -m restpoint.train` is `restpoint-train`."""

import sys

from .cli import main

sys.exit(main())

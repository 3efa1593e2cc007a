"""`python -m fastgan CMD`."""

import sys

from fastgan.commands import main

sys.exit(main())

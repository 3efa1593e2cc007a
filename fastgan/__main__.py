"""`python -m fastgan CMD`."""

import sys

from fastgan.cli.main import main

sys.exit(main())

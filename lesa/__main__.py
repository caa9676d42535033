"""`python -m lesa` is `lesa`."""

import sys

from lesa.cli import main

sys.exit(main())

"""`python -m zimage_mxfp8`: the program `zimage-mxfp8`."""

import sys

from .cli.main import program

sys.exit(program())

"""`python -m segzero_rt`: the same as `segzero`, where its script is not on the path."""

from __future__ import annotations

import sys

from segzero_rt.cli import main

if __name__ == "__main__":
    sys.exit(main())

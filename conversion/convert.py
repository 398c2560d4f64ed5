"""Runs `pvt-hf convert` of the `pvt_hf` beside this folder: `python conversion/convert.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pvt_hf.commands.convert import main

if __name__ == "__main__":
    sys.exit(main())

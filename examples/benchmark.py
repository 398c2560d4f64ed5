"""Runs `pvt-hf benchmark` of the `pvt_hf` beside this folder."""

import sys
from pathlib import Path

# In the place of this folder, where evaluate.py has the name of a package.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from pvt_hf.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["benchmark", *sys.argv[1:]]))

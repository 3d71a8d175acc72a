"""What `python mytrainer.py show_configs` does, for those who look for it here: `python configs/show_configs.py`."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# This folder must not shadow top-level modules when the file runs as a script.
sys.path[:] = [str(ROOT), *(p for p in sys.path if Path(p or ".").resolve() != ROOT / "configs")]

if __name__ == "__main__":
    from mytrainer import main

    sys.exit(main(["show_configs", *sys.argv[1:]]))

"""Every test process, before torch is imported: the project on the path, one thread that does not spin."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("MKL_NUM_THREADS", "1")
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


def pytest_addoption(parser):
    parser.addoption(
        "--architecture",
        action="append",
        default=[],
        metavar="TYPE|YAML",
        help="run the contract tests (tests/contract) on this architecture: a type of the table, or a YAML file "
        "whose package may lie beside it. May be given more than once; default: every type of the table",
    )

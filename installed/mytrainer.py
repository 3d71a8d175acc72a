"""What `pip install -e .` puts on the path: stands for `mytrainer.py` in the project's folder.

In a folder of its own, as an entry of the path brings everything that lies beside.
"""

import importlib.util
import runpy
import sys
from pathlib import Path

_path = Path(__file__).resolve().parents[1] / "mytrainer.py"
_spec = importlib.util.spec_from_file_location("mytrainer", _path)
if not _path.is_file() or _spec is None or _spec.loader is None:
    raise ImportError(
        "mytrainer runs from its project's folder. Install it from there with: pip install -e ."
    )
if __name__ == "__main__":  # python -m mytrainer
    runpy.run_path(str(_path), run_name="__main__")
else:
    _module = importlib.util.module_from_spec(_spec)
    sys.modules["mytrainer"] = _module
    _spec.loader.exec_module(_module)

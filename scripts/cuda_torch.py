"""Prints the CUDA version of this interpreter's torch where livrec_fast can use it as it is.

Prints nothing without a torch, or with a CPU or an older one; fails on an older Python. Reads the
version file of torch instead of importing it, which would take seconds of every `make`.
"""

import importlib.util
import runpy
import sys
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036 - the package is not installed yet
    sys.exit(f"livrec_fast needs Python 3.11 or later; this is {sys.version.split()[0]}")

found = importlib.util.find_spec("torch")
if found is not None and found.origin is not None:
    version = runpy.run_path(str(Path(found.origin).with_name("version.py")))
    release = tuple(int(part) for part in str(version["__version__"]).split(".")[:2])
    if version["cuda"] and release >= (2, 11):
        print(version["cuda"])

"""Makes the Triton kernels importable as `livrec_fast.kernels.<op>`.

They lie in `kernels/` beside the package in a checkout, and inside the package once installed. That
folder has no `__init__.py` (a distribution called `kernels` exists), so this module is the package and
points its `__path__` at whichever is there. Importing it does not import Triton; its submodules do.
"""

from pathlib import Path

_PACKAGE = Path(__file__).parent
_FOLDERS = (_PACKAGE / "kernels", _PACKAGE.parent / "kernels")

__path__ = [str(folder) for folder in _FOLDERS if (folder / "residual_kmeans.py").exists()][:1]

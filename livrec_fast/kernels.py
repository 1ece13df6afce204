"""Makes the Triton kernels importable as `livrec_fast.kernels.<op>`.

They lie in `kernels/` beside the package in a checkout, and inside the package once installed. That
folder has no `__init__.py` (a distribution called `kernels` exists), so this module is the package
and points its `__path__` at the one that is there. Importing it does not import Triton; its
submodules do.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

_INSTALLED = Path(__file__).parent / "kernels"
_CHECKOUT = Path(__file__).parents[1] / "kernels"

__path__ = [str(_INSTALLED if any(_INSTALLED.glob("*.py")) else _CHECKOUT)]

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Let `from livrec_fast.kernels import <op>` pass, which type checkers cannot follow."""

"""The compiled library: whether it is there, and which instruction-set level it uses.

Importing this module loads `livrec_fast._C`, whose static initialisers register the C++ kernels
with torch. Everything here works, and says what is missing, when there is no compiled library.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

MEND = "pip install --no-build-isolation --force-reinstall --no-deps livrec-fast"

_C: ModuleType | None
try:
    from . import _C  # type: ignore[no-redef]

    MISSING = None
except ImportError as error:
    _C = None
    if "_C" in str(error) and "cannot import name" in str(error):
        MISSING = f"the compiled library was not built (needs a C++17 compiler; to mend: {MEND})"
    else:
        MISSING = f"the compiled library does not load: {error} (to mend: {MEND})"

_FORCED = os.environ.get("LIVREC_CPU_ISA")
if _C is not None and _FORCED is not None and _FORCED not in _C.isa_levels():
    raise ValueError(
        f"LIVREC_CPU_ISA: must be one of {', '.join(_C.isa_levels())}, the levels that this "
        f"processor runs, got {_FORCED!r}"
    )

WITH_CUDA = _C is not None and hasattr(_C, "cuda_archs")


def isa() -> str | None:
    """Return the instruction-set level in use, or None without the compiled library."""
    return None if _C is None else _C.isa()


def isa_levels() -> tuple[str, ...]:
    """Return the levels that this build and this processor both have, slowest first."""
    return () if _C is None else _C.isa_levels()


def isa_built() -> tuple[str, ...]:
    """Return the levels that this build has, slowest first."""
    return () if _C is None else _C.isa_built()


def ask_for_huge_pages(address: int, size: int) -> None:
    """Ask the system for huge pages under `size` bytes that were not written yet: a wish."""
    if _C is not None:
        _C.ask_for_huge_pages(address, size)


@contextmanager
def use_isa(level: str) -> Iterator[None]:
    """Compute with `level` inside the block (for tests and benchmarks; not per thread)."""
    if _C is None:
        raise RuntimeError(MISSING)
    before = _C.isa()
    _C.set_isa(level)
    try:
        yield
    finally:
        _C.set_isa(before)

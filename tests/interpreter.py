"""Triton's interpreter, which runs kernels on CPU tensors. Import this before any kernel."""

import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when a kernel is decorated

from triton.runtime import interpreter  # noqa: E402

_patch_tensor = interpreter._patch_lang_tensor


def _with_index(tensor: Any, scope: Any) -> None:
    """Let a scalar bound a loop: NumPy 2.4 no longer makes an int of an array of one element."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _with_index

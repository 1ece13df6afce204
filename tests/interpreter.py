"""Triton's interpreter, which runs kernels on CPU tensors. Import this before any kernel.

What is replaced here either rounds as GPUs do or is quicker and gives the same.
"""

import math
import os
from functools import cache
from typing import Any

import numpy as np

os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when a kernel is decorated

import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

_patch_tensor = interpreter._patch_lang_tensor
_Builder = interpreter.InterpreterBuilder
_cast, _dot = _Builder.cast_impl, _Builder.create_dot
_reduce = interpreter.ReduceOps.apply_impl
_patch_lang, _get_np_dtype = interpreter._patch_lang, interpreter._get_np_dtype


def _with_index(tensor: Any, scope: Any) -> None:
    """Let a scalar bound a loop: NumPy 2.4 no longer makes an int of an array of one element."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _round_to_bfloat16(value: np.ndarray) -> np.ndarray:
    """Round float32 to the nearest bfloat16, ties to even, as GPUs do; return its bits."""
    bits = value.view(np.uint32)
    nearest = bits + np.uint32(0x7FFF) + (bits >> 16 & 1)
    return np.where(np.isnan(value), np.uint32(0x7FC00000), nearest) >> 16


def _cast_nearest(self: Any, src: Any, dst_type: Any) -> Any:
    """Cast; Triton's own interpreter cuts off what bfloat16 has no room for."""
    pair = src.dtype.scalar, dst_type.scalar
    if pair == (tl.float32, tl.bfloat16):
        bits = _round_to_bfloat16(np.ascontiguousarray(src.data)).astype(np.uint16)
        return interpreter.TensorHandle(bits, tl.bfloat16)
    if pair == (tl.bfloat16, tl.float32):
        wide = (src.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(wide, tl.float32)
    return _cast(self, src, dst_type)


def _dot_widened(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    """Multiply bfloat16 as float32; Triton's own interpreter multiplies their bits.

    And float32 in float64: a tensor core's sums are the same whichever factor is on the left, and
    those of NumPy's are not.
    """
    if a.dtype.scalar == tl.bfloat16:
        a, b = (_cast_nearest(self, value, tl.float32) for value in (a, b))
    if a.dtype.scalar == tl.float32:
        total = rest[0]
        exact = a.data.astype(np.float64) @ b.data.astype(np.float64) + total.data
        return interpreter.TensorHandle(exact.astype(total.data.dtype), total.dtype.scalar)
    return _dot(self, a, b, *rest)


def _fma_rounded_once(self: Any, x: Any, y: Any, z: Any) -> Any:
    """Multiply and add in float64; Triton's own interpreter rounds a float32 product, too."""
    exact = x.data.astype(np.float64) * y.data + z.data
    return interpreter.TensorHandle(exact.astype(x.data.dtype), x.dtype.scalar)


def _reduce_quickly(self: Any, values: Any) -> Any:
    """Reduce; sorts combine by xor, which Triton's own interpreter does number by number."""
    if self.combine_fn is not tl.standard._xor_combine:
        return _reduce(self, values)
    (value,) = values
    found = np.bitwise_xor.reduce(value.handle.data, axis=self.axis, keepdims=self.keep_dims)
    return self.to_tensor(found, value.dtype)


_patched: set[frozenset[int]] = set()
_np_dtypes: dict[str, np.dtype] = {}
_init_own_block = tl.block_type.__init__


def _patch_once(fn: Any) -> Any:
    """Replace the language's functions for good; Triton's own does so at each call of one."""
    modules = frozenset(id(value) for value in fn.__globals__.values() if value in (tl, tl.core))
    if modules not in _patched:
        _patched.add(modules)
        _patch_lang(fn)
    return interpreter._LangPatchScope()


def _np_dtype(dtype: Any) -> np.dtype:
    """Look up NumPy's dtype; Triton's own builds the table for each look-up."""
    scalar = dtype.scalar
    if scalar.name not in _np_dtypes:
        _np_dtypes[scalar.name] = _get_np_dtype(scalar)
    return _np_dtypes[scalar.name]


@cache
def _tensor_shape(*sizes: int) -> tuple[Any, Any]:
    """Return a shape as a tensor has it, and how many elements that is."""
    return tl.core.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(math.prod(sizes))


def _init_tensor(self: Any, handle: Any, type: Any) -> None:
    """Set what a tensor has; Triton's own makes a new shape for each."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _tensor_shape(*(type.shape if type.is_block() else ()))


@cache
def _block_shape(*sizes: Any) -> tuple[Any, int, str]:
    """Return a shape as a block's type has it, checked, its elements, and how it is written."""
    block = object.__new__(tl.block_type)
    _init_own_block(block, tl.int1, list(sizes))
    return block.shape, block.numel, str(block.shape)


def _init_block(self: Any, element_ty: Any, shape: Any) -> None:
    """Set what a block's type has; Triton's own checks the shape of each."""
    self.element_ty = element_ty
    self.shape, self.numel, written = _block_shape(*shape)
    self.name = f"<{written}, {element_ty}>"


interpreter._patch_lang = _patch_once
interpreter._get_np_dtype = _np_dtype
interpreter._patch_lang_tensor = _with_index
_Builder.cast_impl = _cast_nearest
_Builder.create_dot = _dot_widened
_Builder.create_fma = _fma_rounded_once
interpreter.ReduceOps.apply_impl = _reduce_quickly
tl.tensor.__init__ = _init_tensor
tl.block_type.__init__ = _init_block
# without options.debug, which the interpreter never sets, it drops what it finds of overflows
interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)

"""Tiles of keys and values, added up from the rows that codes name, and their products.

Keys and values are sums in float32, rounded to the tables' dtype, as the reference rounds them.
Products of bfloat16 and float16 are exact on tensor cores; float32 is multiplied as three products
of the two TF32 parts of each factor, which leave about 2^-23 of each term.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def piece_at(bounds, starts, owners, piece, B, SIZE: tl.constexpr):
    """Return the history of a piece, and where its items begin and end; none beyond all pieces."""
    owner = tl.load(owners + piece)
    there = owner < B
    owner = tl.minimum(owner, B - 1)
    begin = tl.load(bounds + owner) + (piece - tl.load(starts + owner)) * SIZE
    end = tl.minimum(begin + SIZE, tl.load(bounds + owner + 1))
    return owner, begin, tl.where(there, end, begin)


@triton.jit
def decode(
    tables, rows, items, there, head, T, HEADS: tl.constexpr, FIELDS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Return a head's sums of table rows, one row of D columns for each item, in their dtype."""
    dims = tl.arange(0, BLOCK_D)
    total = tl.zeros((items.shape[0], BLOCK_D), tl.float32)
    # Loops of one round: their bound keeps compilers from gathering more than two fields at once,
    # and from gathering numbers as tensor cores want their sum: registers would not suffice.
    for two in tl.static_range(0, FIELDS, 2):
        for _ in range(0, tl.minimum(T, 1)):
            for field in tl.static_range(two, two + 2):
                if field < FIELDS:
                    row = tl.load(rows + tl.cast(T, tl.int64) * field + items, mask=there, other=-1)
                    at = row.to(tl.int64) * (HEADS * D) + head * D
                    known = (row >= 0)[:, None] & (dims < D)[None, :]
                    table = tables[field] + (at[:, None] + dims[None, :])
                    total += tl.load(table, mask=known, other=0.0).to(tl.float32)
    return total.to(tables[0].dtype.element_ty)


@triton.jit
def read(values, candidates, C, head, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return a head's rows of the candidates of a user, whose [C, HEADS, D] begin at `values`."""
    dims = tl.arange(0, BLOCK_D)
    at = candidates.to(tl.int64) * (HEADS * D) + head * D
    inside = (candidates < C)[:, None] & (dims < D)[None, :]
    return tl.load(values + at[:, None] + dims[None, :], mask=inside, other=0.0)


@triton.jit
def product(a, b):
    """Multiply tiles of one dtype, exactly if it has 16 bits; sums are float32."""
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def add_product(total, a, b):
    """Add a times b: a is float32, and of b, of any dtype, nothing is lost."""
    if b.dtype == tl.bfloat16:
        high = a.to(tl.bfloat16)
        low = (a - high.to(tl.float32)).to(tl.bfloat16)
        total = tl.dot(low, b, total)
        total = tl.dot(high, b, total)
    else:
        total = tl.dot(a, b.to(tl.float32), total, input_precision="tf32x3")
    return total


@triton.jit
def logits(products, bias, items, there, head, scale, BIAS_HEADS: tl.constexpr, AXIS: tl.constexpr):
    """Return scale * products + bias; -inf for items that are not there. AXIS: that of items."""
    score = products * scale
    if BIAS_HEADS > 0:
        at = items * BIAS_HEADS
        if BIAS_HEADS > 1:
            at += head
        score += tl.expand_dims(tl.load(bias + at, mask=there, other=0.0), 1 - AXIS)
    return tl.where(tl.expand_dims(there, 1 - AXIS), score, float("-inf"))


@triton.jit
def finite(peak):
    """Return the peaks, with 0 for those of nothing but -inf."""
    return tl.where(peak == float("-inf"), 0.0, peak)

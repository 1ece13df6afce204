"""What kernels of prefix n-grams share: codes, their keys and the rows of tables they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

import triton
import triton.language as tl


@dataclass(frozen=True)
class Level:
    """What a kernel is compiled for at one level.

    size: the codes there are. keys: the prefixes there can be. rows: those of the table. first: a
    group begins. bit, width: where a packed code lies. dim, start: the columns of the table and
    where the result has them. row_stride, column_stride: the table's.
    """

    size: int
    keys: int
    rows: int
    first: bool
    bit: int
    width: int
    dim: int
    start: int
    row_stride: int = 1
    column_stride: int = 1


def describe(
    sizes: Sequence[int],
    groups: Sequence[int],
    rows: Sequence[int],
    dims: Sequence[int],
    summed: bool,
    strides: Sequence[tuple[int, ...]] = (),
) -> tuple[Level, ...]:
    """Describe every level; a sum has the columns of all levels at 0."""
    ends = list(accumulate(groups))
    keys: list[int] = []
    for end, count in zip(ends, groups, strict=True):
        keys += accumulate(sizes[end - count : end], mul)
    firsts = [end - count for end, count in zip(ends, groups, strict=True)]
    widths = [(size - 1).bit_length() for size in sizes]
    bits, starts = [0, *accumulate(widths)], [0, *accumulate(dims)]
    return tuple(
        Level(
            size, keys[at], rows[at], at in firsts, bits[at], widths[at], dims[at],
            0 if summed else starts[at], *(strides[at] if strides else ()),
        )
        for at, size in enumerate(sizes)
    )  # fmt: skip


@triton.jit
def _read(codes, column, there, LEVELS: tl.constexpr, AT: tl.constexpr, PACKED: tl.constexpr):
    """Return the codes of a level, int64, of rows that begin at `codes`."""
    if PACKED:
        code = tl.zeros(there.shape, tl.int64)
        for byte in tl.static_range(
            LEVELS[AT].bit // 8, (LEVELS[AT].bit + LEVELS[AT].width + 7) // 8
        ):
            value = tl.load(codes + tl.full([], byte, tl.int64) * column, mask=there, other=0)
            value = value.to(tl.int64)
            if byte * 8 >= LEVELS[AT].bit:
                code |= value << (byte * 8 - LEVELS[AT].bit)
            else:
                code |= value >> (LEVELS[AT].bit - byte * 8)
        code &= (1 << LEVELS[AT].width) - 1
    else:
        code = tl.load(codes + tl.full([], AT, tl.int64) * column, mask=there, other=0)
        code = code.to(tl.int64)
    return code


@triton.jit
def extend(
    key, known, codes, column, there, LEVELS: tl.constexpr, AT: tl.constexpr, PACKED: tl.constexpr
):
    """Append the code of a level to keys; from one that is unknown, or out of range, on: zeros.

    A key is thus always one of the level's, and `known` says whether it means anything.
    """
    code = _read(codes, column, there, LEVELS, AT, PACKED)
    if LEVELS[AT].first:
        key = tl.zeros(there.shape, tl.int64)
        known = there
    known = known & (code >= 0) & (code < LEVELS[AT].size)
    return key * LEVELS[AT].size + tl.where(known, code, 0), known


@triton.jit
def _rotate(a, BITS: tl.constexpr):
    return (a << BITS) | (a >> (64 - BITS))


@triton.jit
def _mix(a):
    a = (a ^ (a >> 33)) * 0xFF51AFD7ED558CCD
    a = (a ^ (a >> 33)) * 0xC4CEB9FE1A85EC53
    return a ^ (a >> 33)


@triton.jit
def _murmur3(key):
    """MurmurHash3 (x64, 128 bits) of the 16 bytes (key, 0), its halves combined by xor."""
    low = _rotate(key * 0x87C37B91114253D5, 31) * 0x4CF5AD432745937F
    low = _rotate(low, 27) * 5 + 0x52DCE729
    high = low * 5 + 0x38495AB5
    low = low ^ 16
    high = high ^ 16
    low = low + high
    high = high + low
    low = _mix(low)
    high = _mix(high)
    low = low + high
    return low ^ (high + low)


@triton.jit
def table_row(key, LEVELS: tl.constexpr, AT: tl.constexpr, HASHING: tl.constexpr):
    """Return the row of each key: the key where rows hold all, else its hash; all unsigned."""
    row = key
    if LEVELS[AT].rows < LEVELS[AT].keys:
        bits = key.to(tl.uint64)
        size = tl.full(key.shape, LEVELS[AT].rows, tl.uint64)
        if HASHING == "modulo":
            bits = bits % size
        elif HASHING == "murmur3":
            bits = _murmur3(bits) % size
        else:
            scale = tl.full(
                key.shape, LEVELS[AT].rows * 18446744073709551616 // LEVELS[AT].keys, tl.uint64
            )
            bits = tl.umulhi(bits, scale)
        row = bits.to(tl.int64)
    return row

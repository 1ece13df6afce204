"""Hashes of 64-bit numbers, which every backend and every peer must compute to the bit."""

from __future__ import annotations

import torch
from torch import Tensor


def times(a: Tensor, b: int) -> Tensor:
    """Multiply modulo 2^64; torch's int64 wraps, but takes constants up to 2^63 only."""
    return a * (b - 2**64 if b >= 2**63 else b)


def shifted(a: Tensor, bits: int) -> Tensor:
    """Shift right, zeros from the left: torch's shift brings the sign."""
    return (a >> bits) & (2 ** (64 - bits) - 1)


def rotated(a: Tensor, bits: int) -> Tensor:
    """Shift left, around the end."""
    return (a << bits) | shifted(a, 64 - bits)


def mixed(a: Tensor) -> Tensor:
    """MurmurHash3's last steps: every bit of the result depends on every bit of the number."""
    a = times(a ^ shifted(a, 33), 0xFF51AFD7ED558CCD)
    a = times(a ^ shifted(a, 33), 0xC4CEB9FE1A85EC53)
    return a ^ shifted(a, 33)


def murmur3(key: Tensor) -> Tensor:
    """MurmurHash3 (x64, 128 bits) of the 16 bytes (key, 0), seed 0, its halves combined by xor."""
    low = times(rotated(times(key, 0x87C37B91114253D5), 31), 0x4CF5AD432745937F)
    low = rotated(low, 27) * 5 + 0x52DCE729
    high = low * 5 + 0x38495AB5
    low, high = low ^ 16, high ^ 16
    low = low + high
    high = high + low
    low, high = mixed(low), mixed(high)
    low = low + high
    return low ^ (high + low)


def draw_bits(seed: int, rows: Tensor, columns: int, bits: int) -> Tensor:
    """Draw numbers below 2^bits, int64 [n, columns]: the same for a seed, row and column."""
    key = mixed(torch.tensor(seed, dtype=torch.int64, device=rows.device))
    at = rows[:, None] * columns + torch.arange(columns, device=rows.device)
    return mixed(key ^ at) & ((1 << bits) - 1)

"""Prefix n-grams in Python's integers, item by item: what tests hold the ops to."""

from itertools import islice

import torch

WORD = 2**64 - 1


def murmur3(data, seed=0):
    """MurmurHash3 of 128 bits for 64-bit machines, after its public description: two halves."""
    first, second = 0x87C37B91114253D5, 0x4CF5AD432745937F

    def rotated(x, bits):
        return (x << bits | x >> 64 - bits) & WORD

    def final(x):
        for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            x = (x ^ x >> 33) * factor & WORD
        return x ^ x >> 33

    h1 = h2 = seed
    blocks = len(data) // 16
    assert len(data) == 16 * blocks, "whole blocks only"
    for at in range(0, len(data), 16):
        k1, k2 = (int.from_bytes(data[at + b : at + b + 8], "little") for b in (0, 8))
        h1 ^= rotated(k1 * first & WORD, 31) * second & WORD
        h1 = ((rotated(h1, 27) + h2) * 5 + 0x52DCE729) & WORD
        h2 ^= rotated(k2 * second & WORD, 33) * first & WORD
        h2 = ((rotated(h2, 31) + h1) * 5 + 0x38495AB5) & WORD
    h1, h2 = h1 ^ len(data), h2 ^ len(data)
    h1 = (h1 + h2) & WORD
    h2 = (h2 + h1) & WORD
    h1, h2 = final(h1), final(h2)
    h1 = (h1 + h2) & WORD
    return h1, (h2 + h1) & WORD


def table_row(key, keys, rows, hashing):
    """Return the row of one key among `keys` in a table of `rows`."""
    if rows >= keys:
        return key
    if hashing == "modulo":
        return key % rows
    if hashing == "murmur3":
        h1, h2 = murmur3(key.to_bytes(8, "little") + bytes(8))
        return (h1 ^ h2) % rows
    return key * (rows * 2**64 // keys) // 2**64


def table_rows(codes, levels, rows, hashing="modulo", groups=None):
    """Return per item and level the table row, or None where the code is unknown."""
    found = []
    for item in codes.tolist():
        columns, row = iter(zip(item, levels, rows, strict=True)), []
        for part in groups or [len(levels)]:
            key, keys = 0, 1
            for code, size, height in islice(columns, part):
                key = None if key is None or code < 0 else key * size + code
                keys *= size
                row.append(None if key is None else table_row(key, keys, height, hashing))
        found.append(row)
    return found


def parts(grad, dims, mode):
    """Return the columns of each level."""
    return [grad] * len(dims) if mode == "sum" else list(grad.split(list(dims), 1))


def lookup(codes, tables, levels, mode="concat", **rest):
    """Return the embeddings, row by row, in the tables' dtype."""
    found = []
    for row in table_rows(codes, levels, [len(table) for table in tables], **rest):
        vectors = [t[0] * 0 if r is None else t[r] for r, t in zip(row, tables, strict=True)]
        found.append(torch.cat(vectors) if mode == "concat" else sum(vectors))
    return torch.stack(found)


def gradient(grad, codes, levels, rows, dims, mode="concat", **rest):
    """Return [rows, sums] per level: sums of the items' gradients in float64."""
    items = table_rows(codes, levels, rows, **rest)
    out = []
    for level, part in enumerate(parts(grad.double(), dims, mode)):
        sums = {}
        for item, row in enumerate(items):
            if row[level] is not None:
                sums[row[level]] = sums.get(row[level], 0) + part[item]
        found = sorted(sums)
        out.append(torch.tensor(found, dtype=torch.int64))
        stacked = [sums[row] for row in found]
        out.append(torch.stack(stacked) if stacked else part.new_zeros(0, dims[level]))
    return out

"""What ops on gradients of prefix n-grams are given alike in tests: codes, good and bad."""

import torch

LEVELS = (5, 4, 6)


def some_codes(items, levels=LEVELS, unknown=0.2, seed=0):
    """Return codes [items, len(levels)] of which some are unknown."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.stack([torch.randint(n, (items,), generator=generator) for n in levels], 1)
    return codes.masked_fill(torch.rand(codes.shape, generator=generator) < unknown, -1)


def put(good, value):
    codes = good["codes"].clone()
    codes[5, 1] = value
    return {"codes": codes}


def pooled(good, *offsets, **changed):
    offsets = [at if at is not None else len(good["codes"]) for at in offsets]
    grad = good["grad"][: max(0, len(offsets) - 1)]
    offsets = torch.tensor(offsets, dtype=torch.int64)
    return {"offsets": offsets, "pool": "sum", "grad": grad, **changed}


BAD_CODES = [
    ("codes list", lambda g: {"codes": [[0]]}, TypeError, "codes: .* list"),
    ("codes float", lambda g: {"codes": g["codes"].float()}, TypeError, "codes: .* float32"),
    ("columns", lambda g: {"codes": g["codes"][:, 1:]}, ValueError, r"codes: .*\[M, 3\]"),
    ("codes meta", lambda g: {"codes": g["codes"].to("meta")}, ValueError, "device .* meta"),
    ("id = size", lambda g: put(g, 7), IndexError, r"codes\[5, 1\] = 7 .* \[-1, 7\)"),
    ("below -1", lambda g: put(g, -2), IndexError, r"codes\[5, 1\] = -2 .* \[-1, 7\)"),
    ("too large", lambda g: {"levels": [2**21] * 3}, ValueError, r"product .* 2\^63 - 1"),
    ("mode", lambda g: {"mode": "mean"}, ValueError, "mode: .* got 'mean'"),
    ("hashing", lambda g: {"hashing": "xor"}, ValueError, "hashing: .* got 'xor'"),
    ("groups", lambda g: {"groups": (1, 1)}, ValueError, r"groups: .* 3 .* got \(1, 1\)"),
    ("packed", lambda g: {"packed": True}, TypeError, "codes: .* uint8, got int16"),
    ("pool", lambda g: pooled(g, 0, None, pool="max"), ValueError, "pool: .* 'max'"),
    ("pool alone", lambda g: {"pool": "sum"}, ValueError, "pool: needs offsets"),
    ("offsets alone", lambda g: pooled(g, 0, None, pool=None), ValueError, "no pool"),
    ("no offsets", pooled, ValueError, "offsets: .* at least one"),
    ("offsets list", lambda g: {"offsets": [0], "pool": "sum"}, TypeError, "offsets: .* list"),
    ("first", lambda g: pooled(g, 1, None), ValueError, "first must be 0, got 1"),
    ("last", lambda g: pooled(g, 0, 5), ValueError, "offsets: the last must be .*, got 5"),
    ("falls", lambda g: pooled(g, 0, 9, 4, None), ValueError, r"offsets\[1\] = 9 and .* 4"),
]  # fmt: skip

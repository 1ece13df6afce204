"""Table rows of code prefixes: the rows that the lookup reads, and bad inputs."""

import pytest
import torch

from livrec_fast import pack_codes, prefix_ngram_keys, prefix_ngram_lookup

LEVELS, ROWS = (6, 4, 5), (6, 10, 30)


def _put(good, value):
    codes = good["codes"].clone()
    codes[7, 0] = value
    return {"codes": codes}


def _rows(*rows):
    return lambda good: {"rows": rows}


BAD_INPUTS = {
    "prefix_ngram_keys": [
        ("codes list", lambda good: {"codes": [[0]]}, TypeError, "codes: .* list"),
        (
            "codes float",
            lambda good: {"codes": good["codes"] * 1.0},
            TypeError,
            "codes: .* float32",
        ),
        ("codes few", lambda good: {"codes": good["codes"][:, 1:]}, ValueError, r"\[M, 3\]"),
        ("id = size", lambda good: _put(good, 6), IndexError, r"codes\[7, 0\] = 6 .* \[-1, 6\)"),
        ("below -1", lambda good: _put(good, -2), IndexError, r"codes\[7, 0\] = -2 .* \[-1, 6\)"),
        ("levels text", lambda good: {"levels": "678"}, TypeError, "levels: .* '678'"),
        ("levels huge", lambda good: {"levels": (2**40,) * 3}, ValueError, r"levels: .* 2\^63 - 1"),
        ("levels few", lambda good: {"levels": (6, 7)}, ValueError, r"groups: .* 2 levels"),
        ("rows few", _rows(6, 10), ValueError, r"rows: must be one .* got \(6, 10\)"),
        ("row of none", _rows(6, 0, 30), ValueError, r"rows: .* \(6, 0, 30\)"),
        ("rows float", _rows(6, 10, 3.0), ValueError, r"rows: .* 3\.0"),
        ("hashing", lambda good: {"hashing": "md5"}, ValueError, "hashing: .* 'md5'"),
        ("groups", lambda good: {"groups": (1, 1)}, ValueError, r"groups: .* got \(1, 1\)"),
        ("not packed", lambda good: {"packed": True}, TypeError, "codes: .* uint8"),
    ]
}


def _codes(unknown=True):
    generator = torch.Generator().manual_seed(0)
    codes = torch.stack([torch.randint(n, (60,), generator=generator) for n in LEVELS], 1)
    if unknown:
        codes[torch.rand(codes.shape, generator=generator) < 0.15] = -1
    return codes


def test_keys_by_hand():
    codes = torch.tensor([[5, 3, 4], [2, -1, 1], [-1, 0, 0]])
    rows = prefix_ngram_keys(codes, LEVELS, ROWS)
    assert rows.tolist() == [[5, 23 % 10, (23 * 5 + 4) % 30], [2, -1, -1], [-1, -1, -1]]
    apart = prefix_ngram_keys(codes, LEVELS, ROWS, groups=(1, 1, 1))
    assert torch.equal(apart, codes)


@pytest.mark.parametrize("groups", [None, (1, 2), (1, 1, 1)])
@pytest.mark.parametrize("hashing", ["modulo", "murmur3", "order_preserving"])
def test_they_are_the_rows_that_the_lookup_reads(hashing, groups):
    tables = [1.0 + torch.arange(count)[:, None] for count in ROWS]  # row h holds h + 1
    read = prefix_ngram_lookup(_codes(), tables, LEVELS, hashing=hashing, groups=groups)
    rows = prefix_ngram_keys(_codes(), LEVELS, ROWS, hashing=hashing, groups=groups)
    assert rows.dtype == torch.int64 and rows.max() > 4
    assert torch.equal(rows + 1, read.long())


def test_packed_codes():
    codes = _codes(unknown=False)
    packed = prefix_ngram_keys(pack_codes(codes, LEVELS), LEVELS, ROWS, packed=True)
    assert torch.equal(packed, prefix_ngram_keys(codes, LEVELS, ROWS))

"""Rows that a search found, as a jagged list: by a loop, into attention, refusals."""

import pytest
import torch

from livrec_fast import code_attention, history_search, search_rows, target_attention


def _found(B=4, C=3, L=15, D=5, k=6, seed=0):
    """Draw a search that some candidates end with fewer than k items, or none."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, L + 1, (B,), generator=generator)
    offsets = torch.cat([torch.zeros(1).long(), lengths.cumsum(0)])
    T = int(offsets[-1])
    keys = torch.randn(T, D, generator=generator)
    query = torch.randn(B, C, D, generator=generator)
    authors = torch.randint(0, 3, (T,), generator=generator)
    wanted = torch.randint(-1, 3, (B, C), generator=generator)
    _, positions = history_search(query, keys, offsets, k, item_ids=authors, query_ids=wanted)
    return positions, offsets, generator


def _by_loop(positions, offsets):
    rows, row_offsets = [], [0]
    for user, candidates in enumerate(positions.tolist()):
        for candidate in candidates:
            rows += [int(offsets[user]) + at for at in candidate if at != -1]
            row_offsets.append(len(rows))
    return torch.tensor(rows, dtype=torch.int64), torch.tensor(row_offsets)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sizes", [{}, {"B": 0}, {"C": 0}, {"L": 0}, {"B": 1, "C": 1, "k": 1}])
def test_agrees_with_a_loop(sizes, seed):
    positions, offsets, _ = _found(seed=seed, **sizes)
    rows, row_offsets = search_rows(positions, offsets)
    want, want_offsets = _by_loop(positions, offsets)
    assert rows.dtype == row_offsets.dtype == torch.int64
    assert torch.equal(rows, want) and torch.equal(row_offsets, want_offsets)
    assert sizes or (0 < len(rows) < positions.numel())


def test_fill_may_stand_anywhere_and_order_is_kept():
    positions = torch.tensor([[[2, -1, 0], [-1, -1, -1]], [[-1, 0, -1], [0, 0, 1]]])
    rows, row_offsets = search_rows(positions, torch.tensor([0, 3, 5]))
    assert rows.tolist() == [2, 0, 3, 3, 3, 4]
    assert row_offsets.tolist() == [0, 2, 2, 3, 6]
    rows, row_offsets = search_rows(positions[..., :0], torch.tensor([0, 3, 5]))
    assert rows.tolist() == [] and row_offsets.tolist() == [0] * 5


def test_strided_positions():
    positions, offsets, _ = _found()
    other = positions.transpose(0, 2).contiguous().transpose(0, 2)
    stepped = torch.stack([offsets, offsets], 1)[:, 0]
    got, want = search_rows(other, stepped), search_rows(positions, offsets)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_attention_to_what_was_found():
    """Attention over the rows of each pair is softmax over its found positions, or zeros."""
    B, C, H, d = 4, 3, 2, 5
    positions, offsets, generator = _found(B, C)
    T = int(offsets[-1])
    q = torch.randn(B, C, H, d, generator=generator)
    codes = torch.randint(0, 7, (T, 2), generator=generator)
    tables = [torch.randn(7, H, d, generator=generator) for _ in range(2)]
    k = sum(table[code] for table, code in zip(tables, codes.T, strict=True)).requires_grad_()
    rows, row_offsets = search_rows(positions, offsets)
    pairs = q.reshape(B * C, 1, H, d)
    out = target_attention(pairs, k[rows], k[rows], row_offsets).reshape(B, C, H, d)
    want = torch.zeros_like(q)
    for u in range(B):
        for c in range(C):
            at = [int(offsets[u]) + p for p in positions[u, c].tolist() if p >= 0]
            if at:
                logits = torch.einsum("hd,thd->ht", q[u, c], k[at]) * d**-0.5
                want[u, c] = torch.einsum("ht,thd->hd", logits.softmax(1), k[at])
    torch.testing.assert_close(out, want)
    got, wanted = (torch.autograd.grad(x.square().sum(), k, retain_graph=True) for x in (out, want))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    from_codes = code_attention(pairs, codes[rows], tables, tables, row_offsets)
    torch.testing.assert_close(from_codes.reshape(B, C, H, d), want, rtol=1e-4, atol=1e-5)


WRONG = [
    ({"positions": [[[0]]]}, TypeError, "positions: must be a tensor, got list"),
    ({"positions": torch.zeros(2, 1, 1).int()}, TypeError, "positions: dtype .* int32"),
    ({"positions": torch.zeros(2, 1).long()}, ValueError, r"positions: .*\[B, C, k\]"),
    ({"positions": torch.zeros(1, 1, 1).long()}, ValueError, r"offsets: shape must be \[2\]"),
    ({"positions": torch.full((2, 1, 1), 2)}, IndexError, r"\[1, 0, 0\] = 2 is outside \[-1, 2\)"),
    ({"positions": torch.full((2, 1, 1), -2)}, IndexError, r"\[0, 0, 0\] = -2 is outside"),
    ({"offsets": torch.tensor([0, 4, 6]).int()}, TypeError, "offsets: dtype .* int32"),
    ({"offsets": torch.tensor([0, 4, 6], device="meta")}, ValueError, "offsets: device .* meta"),
    ({"offsets": torch.tensor([1, 4, 6])}, ValueError, "offsets: the first must be 0, got 1"),
    ({"offsets": torch.tensor([0, 7, 6])}, ValueError, "offsets: must not decrease"),
]


@pytest.mark.parametrize("change, error, message", WRONG)
def test_refusals(change, error, message):
    good = {"positions": torch.zeros(2, 1, 1).long(), "offsets": torch.tensor([0, 4, 6])}
    assert search_rows(**good)[0].tolist() == [0, 4]
    with pytest.raises(error, match=message):
        search_rows(**good | change)

"""Code attention over 10,000 items: against float64, on data that hurts sums and exponentials."""

import pytest
import torch
from conftest import SUBJECTS

from livrec_fast import _native
from livrec_fast.testing.checks import check_forward, check_gradients, expected, results

pytestmark = pytest.mark.skipif(_native.MISSING is not None, reason=f"{_native.MISSING}")
LEVELS, H, D = (512, 256, 128), 2, 16
KINDS = ("uniform", "zipf", "constant", "one dominates", "all equal", "alternating", "far apart")


def draw(kind, users, length, candidates=3, bias=None):
    """Draw histories whose logits are as the name says; those named after ±1e4 reach it."""
    generator = torch.Generator().manual_seed(KINDS.index(kind))
    lengths = torch.full((users,), length)
    lengths[-1] = length // 3 + 1
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    total = int(offsets[-1])
    columns = []
    for size in LEVELS:
        if kind == "zipf":
            odds = 1 / torch.arange(1, size + 1)
            columns.append(odds.multinomial(total, True, generator=generator))
        else:
            columns.append(torch.randint(size, (total,), generator=generator))
    codes = torch.stack(columns, 1)
    if kind == "constant":
        codes[:] = codes[0].clone()
    if kind == "alternating":
        codes[:, 0] = torch.arange(total) % 2
    tables = [[torch.randn(n, H, D, generator=generator) for n in LEVELS] for _ in range(2)]
    q = torch.randn(users, candidates, H, D, generator=generator)
    if kind in ("one dominates", "alternating", "far apart"):
        q[..., 0] = 1e4 if kind != "far apart" else 6.0
        for table in tables[0]:
            table[..., 0] *= 0.0 if kind != "far apart" else 1.0
        if kind == "one dominates":
            codes[:, 0].clamp_(max=510)
            codes[total // 2, 0], tables[0][0][511, :, 0] = 511, 1.0
        if kind == "alternating":
            tables[0][0][0, :, 0], tables[0][0][1, :, 0] = 1.0, -1.0
    if kind == "all equal":
        q[:] = 1.0
        for table in tables[0]:
            table[:] = 1e4 / (3 * D)
    made = {
        "q": q,
        "codes": codes.to(torch.int16),
        "key_tables": tables[0],
        "value_tables": tables[1],
        "offsets": offsets,
        "bias": None,
        "scale": 1.0 if kind != "uniform" else 0.25,
        "return_lse": True,
    }
    if bias:
        made["bias"] = torch.randn((total, H) if bias == "heads" else (total,), generator=generator)
    return made


@pytest.mark.parametrize("bias", [None, "items", "heads"])
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_float64(kind, bias):
    subject = SUBJECTS["code_attention"]
    inputs = draw(kind, 1, 10_000, bias=bias)  # few users: histories are cut
    wanted = expected(subject, inputs)
    check_forward(subject, "native", inputs, wanted)
    check_gradients(subject, "native", inputs, wanted)


@pytest.mark.parametrize("isa", _native.isa_levels() if _native.MISSING is None else [])
def test_every_level_with_many_users_and_candidates(isa):
    subject = SUBJECTS["code_attention"]
    inputs = draw("zipf", 9, 700, candidates=37, bias="heads")
    wanted = expected(subject, inputs)
    with _native.use_isa(isa):
        check_forward(subject, "native", inputs, wanted)
        check_gradients(subject, "native", inputs, wanted)


@pytest.mark.parametrize("users", [1, 3, 9])
def test_threads_change_no_bit(users):
    subject, before, found = SUBJECTS["code_attention"], torch.get_num_threads(), []
    inputs = draw("zipf", users, 6_000, bias="items")
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(subject, "native", inputs).named())
    finally:
        torch.set_num_threads(before)
    assert all(tensor.any() for tensor in found[0].values() if tensor.numel())
    for other in found[1:]:
        for name, tensor in found[0].items():
            assert torch.equal(tensor, other[name]), name

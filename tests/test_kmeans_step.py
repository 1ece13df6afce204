"""kmeans_step: sums that are exact, whatever the threads, the order or the parts."""

import pytest
import torch

from livrec_fast import kmeans_quanta, kmeans_step
from livrec_fast._native import isa_levels, use_isa
from livrec_fast.testing import subjects, targets

NAN, INF = float("nan"), float("inf")
BACKENDS = [str(t) for t in targets(subjects()["kmeans_step"]) if t.device == "cpu"]


def step(*args, kernel, **kwargs):
    """Run with "reference", "triton" or "native <level>"."""
    name, _, level = kernel.partition(" ")
    with use_isa(level or isa_levels()[-1]):
        return kmeans_step(*args, **kwargs, backend=name)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kernel", BACKENDS)
def test_a_hand_made_example(kernel):
    x = torch.tensor([[0.0, 1], [0, 3], [10, 0], [12, 2]])
    book = torch.tensor([[0.0, 0], [0, 0], [11, 1]])
    got = step(x, book, weights=torch.tensor([1.0, 2, 1, 0]), kernel=kernel)
    assert got.codes.tolist() == [0, 0, 2, 2] and got.error.tolist() == [1, 9, 2, 2]
    assert got.sums.tolist() == [[0, 7], [0, 0], [10, 0]]
    assert got.mass.tolist() == [3, 0, 1] and got.inertia.item() == 1 + 2 * 9 + 2


@pytest.mark.parametrize("kernel", BACKENDS)
@pytest.mark.parametrize("size, dim", [(16, 24), (700, 130)])
def test_parts_and_order_do_not_matter(kernel, size, dim):
    x, book = draw(3000, dim) * torch.logspace(-3, 3, 3000)[:, None], draw(size, dim, seed=1)
    weights = torch.rand(3000, generator=torch.Generator().manual_seed(2))
    longest = max(float(rows.double().square().sum(1).max()) for rows in (x, book))
    quanta = kmeans_quanta(3000, float(x.abs().max()), longest, 1.0)
    whole = step(x, book, weights=weights, quanta=quanta, kernel=kernel)
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(3))
    parts = [
        step(x[rows], book, weights=weights[rows], quanta=quanta, kernel=kernel)
        for rows in order.split([1, 999, 1500, 500])
    ]
    assert torch.cat([part.codes for part in parts]).equal(whole.codes[order])
    for name in ("sums", "mass", "inertia"):
        assert sum(getattr(part, name) for part in parts).equal(getattr(whole, name)), name
    own = step(x, book, weights=weights, kernel=kernel)
    torch.testing.assert_close(own.sums, whole.sums, rtol=1e-9, atol=1e-9)
    exact = torch.zeros_like(whole.sums).index_add_(
        0, whole.codes.long(), weights.double()[:, None] * x.double()
    )
    torch.testing.assert_close(whole.sums, exact, rtol=0, atol=3000 * float(quanta[0]))


@pytest.mark.parametrize("kernel", BACKENDS)
def test_a_penalty_moves_rows_and_infinity_bars(kernel):
    x, book = draw(500, 8), draw(12, 8, seed=1)
    free = step(x, book, kernel=kernel)
    penalty = torch.zeros(12)
    penalty[3], penalty[5] = 2.0, INF
    got = step(x, book, penalty=penalty, kernel=kernel)
    assert got.mass[5] == 0 and got.mass[3] < free.mass[3] and got.mass.sum() == 500
    wanted = (torch.cdist(x.double(), book.double()).square() + penalty).argmin(1)
    assert got.codes.long().equal(wanted)
    exact = (x - book[got.codes.long()]).double().square().sum(1)
    torch.testing.assert_close(got.error.double(), exact, rtol=1e-5, atol=1e-6)


def test_quanta_leave_room_for_the_sums():
    for rows in (1, 3, 1000, 2**24):
        quanta = kmeans_quanta(rows, 3.7, 11.0, 2.5)
        bound = rows * 2.5 * torch.tensor([3.7, 1.0, 44.0], dtype=torch.float64)
        assert (bound <= 2**51 * quanta).all() and (bound >= 2**50 * quanta).all()
        assert (torch.frexp(quanta).mantissa == 0.5).all()


def meta(tensor):
    return tensor.to("meta")


def with_value(row, value):
    def change(tensor):
        changed = tensor.clone()
        changed[row] = value
        return changed

    return change


def changed(name, change):
    return lambda good: {name: change(good[name])}


BAD_INPUTS = {
    "kmeans_step": [
        ("x: list", changed("x", torch.Tensor.tolist), TypeError, "^x: must be a tensor, got list"),
        ("x: integers", changed("x", torch.Tensor.int), TypeError, "^x: dtype .* got int32"),
        ("x: shape", changed("x", lambda x: x[0]), ValueError, r"^x: shape .* got \[24\]"),
        ("x: width", changed("x", lambda x: x[:, :3]), ValueError, r"^codebook: shape .*\[N, 3\]"),
        (
            "x: no column",
            lambda g: {"x": g["x"][:, :0], "codebook": g["codebook"][:, :0]},
            ValueError,
            r"^x: D must be at least 1, got shape \[400, 0\]",
        ),
        ("x: NaN", changed("x", with_value(17, NAN)), ValueError, "^x: row 17 is not finite"),
        ("x: infinity", changed("x", with_value(399, INF)), ValueError, "^x: row 399 is not fin"),
        ("codebook: half", changed("codebook", torch.Tensor.half), TypeError, "^codebook: dtype"),
        (
            "codebook: empty",
            lambda g: {"codebook": g["codebook"][:0], "penalty": None},
            ValueError,
            "^codebook: N must be 1 to 65536, got 0",
        ),
        ("codebook: device", changed("codebook", meta), ValueError, "^codebook: device .* meta"),
        (
            "weights: short",
            changed("weights", lambda w: w[:399]),
            ValueError,
            r"^weights: shape must be \[400\], got \[399\]",
        ),
        ("weights: double", changed("weights", torch.Tensor.double), TypeError, "^weights: dtype"),
        (
            "weights: negative",
            changed("weights", with_value(9, -1.0)),
            ValueError,
            r"^weights: must be finite and not negative, got weights\[9\] = -1",
        ),
        ("weights: NaN", changed("weights", with_value(0, NAN)), ValueError, r"weights\[0\] = nan"),
        ("weights: inf", changed("weights", with_value(3, INF)), ValueError, r"weights\[3\] = inf"),
        (
            "penalty: long",
            changed("penalty", lambda p: torch.cat([p, p])),
            ValueError,
            r"^penalty: shape must be \[37\], got \[74\]",
        ),
        ("penalty: NaN", changed("penalty", with_value(1, NAN)), ValueError, r"penalty\[1\] = nan"),
        (
            "penalty: bars everything",
            changed("penalty", lambda p: torch.full_like(p, INF)),
            ValueError,
            "^penalty: at least one codeword must be allowed",
        ),
        (
            "quanta: shape",
            lambda g: {"quanta": torch.ones(2, dtype=torch.float64)},
            ValueError,
            r"^quanta: shape must be \[3\], got \[2\]",
        ),
        ("quanta: float", lambda g: {"quanta": torch.ones(3)}, TypeError, "^quanta: dtype"),
        (
            "quanta: zero",
            lambda g: {"quanta": torch.zeros(3, dtype=torch.float64)},
            ValueError,
            "^quanta: must be positive and finite",
        ),
    ],
}

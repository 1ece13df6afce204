"""Row updates: torch's optimisers by another way, rounding at random, and errors."""

import pytest
import torch
from conftest import SUBJECTS

import livrec_fast
from livrec_fast.reference._hash import draw_bits
from livrec_fast.reference.row_update import round_at_random
from livrec_fast.testing import inputs_for

META = {"device": "meta"}
BAD_INPUTS = {
    "row_update": [
        ("rule", lambda g: {"rule": "adam"}, ValueError, "rule: must be one of .*'adam'"),
        ("lr", lambda g: {"lr": 0.0}, ValueError, "lr: must be positive and finite, got 0.0"),
        ("eps", lambda g: {"eps": float("inf")}, ValueError, "eps: .* got inf"),
        ("table type", lambda g: {"table": [1.0]}, TypeError, "table: must be a tensor"),
        ("table shape", lambda g: {"table": g["table"][0]}, ValueError, "table: shape"),
        ("rows dtype", lambda g: {"rows": g["rows"].int()}, TypeError, "rows: dtype .* got int32"),
        ("sums shape", lambda g: {"sums": g["sums"][:, :3]}, ValueError, "sums: shape must be"),
        ("sums dtype", lambda g: {"sums": g["sums"].half()}, TypeError, "sums: dtype .* float16"),
        ("no state", lambda g: {"state": None}, ValueError, "state: rule 'rowwise_adagrad' needs"),
        ("sgd's state", lambda g: {"rule": "sgd"}, ValueError, "state: rule 'sgd' has none"),
        ("state shape", lambda g: {"state": g["table"].clone()}, ValueError, "state: shape"),
        ("device", lambda g: {"sums": g["sums"].to("meta")}, ValueError, "sums: device"),
        (
            "row = H",
            lambda g: {"rows": g["rows"] + 200},
            IndexError,
            r"rows: must be in \[0, 200\)",
        ),
        ("row < 0", lambda g: {"rows": g["rows"] - 200}, IndexError, r"rows\[0\] = -"),
        ("twice", lambda g: {"rows": g["rows"] // 2}, ValueError, "rows: must ascend"),
        ("falling", lambda g: {"rows": g["rows"].flip(0)}, ValueError, "rows: must ascend"),
    ]
}
OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {}),
    "adagrad": (torch.optim.Adagrad, {"eps": 1e-8}),
}


@pytest.mark.parametrize("rule", OPTIMIZERS)
@pytest.mark.parametrize("kernel", ["native", "reference"])
def test_follows_torchs_optimiser(rule, kernel):
    torch.manual_seed(0)
    kind, settings = OPTIMIZERS[rule]
    weight = torch.randn(50, 6, requires_grad=True)
    table, state = weight.detach().clone(), torch.zeros(50, 6) if rule == "adagrad" else None
    optimizer = kind([weight], lr=0.1, **settings)
    for _ in range(5):
        rows = torch.randperm(50)[:20].sort()[0]
        sums = torch.randn(20, 6)
        weight.grad = torch.sparse_coo_tensor(rows[None], sums, weight.shape).coalesce()
        optimizer.step()
        livrec_fast.row_update(table, rows, sums, rule=rule, lr=0.1, state=state, backend=kernel)
    torch.testing.assert_close(table, weight.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_leaves_other_rows_alone(dtype, kernel):
    table = torch.randn(40, 5).to(dtype)
    before, rows = table.clone(), torch.tensor([3, 7, 39])
    state = torch.zeros(40)
    livrec_fast.row_update(
        table, rows, torch.ones(3, 5), rule="rowwise_adagrad", lr=0.5, state=state, backend=kernel
    )
    others = torch.ones(40, dtype=torch.bool).index_fill(0, rows, False)
    assert torch.equal(table[others], before[others]) and not state[others].any()
    assert (table[rows] != before[rows]).all() and (state[rows] == 1).all()


@pytest.mark.parametrize("kernel", ["native", "reference"])
def test_a_refused_call_changes_nothing(kernel):
    table, rows = torch.ones(10, 2), torch.tensor([0, 1, 2, 10])
    with pytest.raises(IndexError, match=r"rows\[3\] = 10"):
        livrec_fast.row_update(table, rows, torch.ones(4, 2), rule="sgd", lr=1.0, backend=kernel)
    assert (table == 1).all()


def test_graphs_notice_the_change():
    table = torch.ones(4, 2, requires_grad=True)
    loss = table.square().sum()
    livrec_fast.row_update(table, torch.tensor([1]), torch.ones(1, 2), rule="sgd", lr=1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_backends_draw_the_same_roundings(dtype):
    inputs = inputs_for(
        SUBJECTS["row_update"].oracle, {"H": 500, "d": 33, "M": 400, "rule": 0}, dtype
    )
    inputs["table"][:, ::3] *= 1e-5  # where float16 is subnormal
    moved = {}
    for kernel in ("native", "reference"):
        for seed in (0, -5):
            table = inputs["table"].clone()
            livrec_fast.row_update(**{**inputs, "table": table, "seed": seed, "backend": kernel})
            moved[kernel, seed] = table
    assert torch.equal(moved["native", 0], moved["reference", 0])
    assert torch.equal(moved["native", -5], moved["reference", -5])
    assert not torch.equal(moved["native", 0], moved["native", -5])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_roundings_are_to_neighbours_and_unbiased(dtype):
    exact = torch.tensor([1.0 + 1e-3, -1.0 - 3e-4, 3.14159, -(2.0**-15) * 1.0007, 1e-7, 0.0, 2.0])
    many, bits = exact.repeat(20_000, 1), 16 if dtype == torch.bfloat16 else 13
    noise = draw_bits(0, torch.arange(20_000), len(exact), bits)
    found = round_at_random(many, dtype, noise).float()
    gap = torch.finfo(dtype).eps * exact.abs().clamp(min=torch.finfo(dtype).tiny)
    assert ((found - many).abs() <= gap).all()
    spread = gap / 2 / len(many) ** 0.5
    assert ((found.mean(0) - exact).abs() <= 4 * spread + 1e-6 * exact.abs()).all()
    assert (found[:, :3].std(0) > 0).all() and (found[:, 5:] == exact[5:]).all()
    odd = torch.tensor([float("inf"), -float("inf"), float("nan")])
    rounded = round_at_random(odd, dtype, torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(rounded, odd.to(dtype), equal_nan=True)

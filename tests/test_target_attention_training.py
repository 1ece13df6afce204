"""TargetAttention inside rankers: training, compiled, under autocast, over ranks; bad inputs."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ranks import leave
from test_target_attention_module import (
    DIM,
    KEY,
    LENGTHS,
    OFFSETS,
    Keyed,
    T,
    Torchrec,
    _bias,
    _forms,
    _inputs,
    _unit,
)
from torch import nn

from livrec_fast import CodeTargetAttention, ExtractUnit, TargetAttention


@pytest.fixture(autouse=True)
def forget():
    """Let each test compile the module anew."""
    torch.compiler.reset()


@pytest.mark.parametrize("absorb", ["none", "query"])
def test_gradcheck(absorb):
    unit, (candidates, x) = _unit(absorb=absorb), _inputs()
    names, values = zip(*unit.named_parameters(), strict=True)

    def call(candidates, x, *parameters):
        state = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(unit, state, (candidates, x, OFFSETS))

    given = (candidates.requires_grad_(), x.requires_grad_(), *values)
    assert torch.autograd.gradcheck(call, given, fast_mode=True)


@pytest.mark.parametrize("absorb", ["none", "query"])
def test_compiles_with_dynamic_shapes(absorb):
    unit = _unit(torch.float32, absorb=absorb)
    compiled = torch.compile(unit, fullgraph=True, dynamic=True, backend="aot_eager")
    candidates, x = _inputs(torch.float32)
    for users, items in ((4, 41), (3, 30)):
        given = candidates[:users], x[:items], OFFSETS[: users + 1]
        grads = []
        for module in (unit, compiled):
            out = module(*given, bias=_bias(2)[:items].float())
            assert torch.equal(out, unit(*given, bias=_bias(2)[:items].float()))
            grads.append(torch.autograd.grad(out.square().sum(), list(unit.parameters())))
        for ours, theirs in zip(*grads, strict=True):
            assert ours.any()
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("form", ["nested", "padded, mask"])
@pytest.mark.parametrize("absorb", ["none", "query"])
def test_autocast(absorb, form):
    unit, (candidates, x) = _unit(torch.float32, absorb=absorb), _inputs(torch.float32)
    history, given = _forms(x)[form]
    exact = unit(candidates, history, **given)
    wanted = torch.autograd.grad(exact.square().sum(), list(unit.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        out = unit(candidates, history, **given)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, rtol=0.05, atol=0.05 * exact.abs().max().item())
    grads = torch.autograd.grad(out.float().square().sum(), list(unit.parameters()))
    for ours, theirs in zip(grads, wanted, strict=True):
        assert ours.dtype == torch.float32 and ours.any()
        assert (ours - theirs).norm() < 0.1 * theirs.norm()


def test_one_state_for_either_way_and_unit():
    candidates, x = _inputs()
    unit, other = _unit(absorb="none"), _unit(absorb="query")
    other.reset_parameters()
    assert not torch.allclose(unit(candidates, x, OFFSETS), other(candidates, x, OFFSETS))
    assert set(unit.state_dict()) == {f"{n}.weight" for n in ("query", "key", "value", "out")}
    other.load_state_dict(unit.state_dict())
    torch.testing.assert_close(unit(candidates, x, OFFSETS), other(candidates, x, OFFSETS))
    given = {"key_dim": KEY, "head_dim": 3, "value_dim": 5, "out_dim": 4}
    ExtractUnit(DIM, 2, **given).load_state_dict(unit.state_dict())
    made = {name for name, _ in CodeTargetAttention(8, 2, out_dim=4).named_parameters()}
    assert {n.split(".")[0] for n in made} == {"query", "key", "value", "out", "tables"}


def test_meta_device_and_reset():
    unit = _unit(torch.float32, device="meta", biases=("query", "out"))
    assert {p.device.type for p in unit.parameters()} == {"meta"}
    unit = unit.to_empty(device="cpu")
    unit.reset_parameters()
    assert unit(*_inputs(torch.float32), OFFSETS)[1].eq(0).all() and not unit.query.bias.any()
    assert "dim=6, heads=2, key_dim=8" in repr(unit)
    plain = TargetAttention(DIM, 4)
    assert (plain.head_dim, plain.value_dim, plain.out_dim) == (2, 2, 8)
    assert isinstance(plain.out, nn.Identity) and plain.query.bias is None


def test_learns_what_a_candidate_saw():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    table, items = nn.Embedding(30, 16), torch.randint(0, 30, (64,), generator=generator)
    offsets = torch.arange(0, 65, 8)
    candidates = torch.randint(0, 30, (8, 10), generator=generator)
    seen = (candidates[:, :, None] == items.view(8, 1, 8)).any(2).float()
    unit, score = TargetAttention(16, 2, out_dim=16), nn.Linear(16, 1)
    layers = nn.ModuleList([table, unit, score])
    step = torch.optim.Adam(layers.parameters(), 0.02)
    losses = []
    for _ in range(80):
        c = table(candidates)
        out = score(c * unit(c, table(items), offsets))[..., 0]
        loss = nn.functional.binary_cross_entropy_with_logits(out, seen)
        step.zero_grad()
        loss.backward()
        step.step()
        losses.append(loss.item())
    assert 0 < seen.mean() < 0.5 < losses[0] and losses[-1] < 0.1


def _work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    users, (candidates, x) = slice(2 * rank, 2 * rank + 2), _inputs()
    items = slice(int(OFFSETS[users.start]), int(OFFSETS[users.stop]))
    offsets = OFFSETS[users.start : users.stop + 1] - items.start
    unit = _unit()
    shared = nn.parallel.DistributedDataParallel(unit)
    shared(candidates[users], x[items], offsets).square().mean().backward()
    torch.save([parameter.grad for parameter in unit.parameters()], f"{folder}/{rank}.pt")
    leave()


def test_two_ranks_have_the_gradients_of_one(tmp_path):
    mp.spawn(_work, (str(tmp_path),), nprocs=2)
    unit, (candidates, x) = _unit(), _inputs()
    unit(candidates, x, OFFSETS).square().mean().backward()
    wanted = [parameter.grad for parameter in unit.parameters()]
    assert all(grad.any() for grad in wanted)
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), wanted)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dim": 0}, ValueError, "dim: must be from 1 to .*, got 0"),
        ({"heads": 2.0}, TypeError, "heads: must be an int, got 2.0"),
        ({"key_dim": -1}, ValueError, "key_dim: .* got -1"),
        ({"out_dim": 0}, ValueError, "out_dim: .* got 0"),
        ({"biases": ("keys",)}, ValueError, "biases: must be one of 'query', 'key', .* got 'keys'"),
        ({"biases": ("out",)}, ValueError, "biases: must be one of .*, got 'out'"),
        ({"biases": ("key",), "absorb": "query"}, ValueError, "biases: key and value must have no"),
        ({"activation": "relu"}, ValueError, "activation: .* got 'relu'"),
        ({"absorb": "tables"}, ValueError, "absorb: .* got 'tables'"),
        ({"scale": float("nan")}, ValueError, "scale: must be finite, got nan"),
        ({"scale": "1"}, TypeError, "scale: must be a float, got str"),
    ],
    ids=str,
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        TargetAttention(**{"dim": 8, "heads": 2, **change})


_PAD = torch.zeros(4, 25, KEY)
_STRIDED = torch.nested.nested_tensor([torch.zeros(2, KEY)])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"candidates": torch.zeros(4, 3, 5)}, ValueError, r"candidates: shape .* \[4, C, 6\]"),
        ({"candidates": torch.zeros(3, 3, 6)}, ValueError, r"candidates: shape .* \[4, C, 6\]"),
        ({"candidates": torch.zeros(5, 6)}, ValueError, r"candidates: shape must be \[4, 6\]"),
        ({"candidates": torch.zeros(4, 3, 6).double()}, TypeError, "candidates: dtype .* got .*64"),
        ({"candidates": [1]}, TypeError, "candidates: must be a tensor .*; got list"),
        ({"history": torch.zeros(T, 6)}, ValueError, r"history: shape must be \[T, 8\]"),
        ({"history": torch.zeros(T, KEY).long()}, TypeError, "history: dtype .* got int64"),
        ({"history": {"a": 1}}, TypeError, "history: must be .* JaggedTensor; got dict"),
        ({"history": torch.zeros(T, KEY, device="meta")}, ValueError, "device must be that of"),
        ({"history": _STRIDED, "offsets": None}, TypeError, "history: .* layout torch.jagged"),
        ({"history": Torchrec(_PAD[0], OFFSETS)}, ValueError, "offsets: history is jagged and bri"),
        ({"offsets": None}, ValueError, r"history: .* needs offsets or lengths"),
        ({"offsets": OFFSETS[:-1]}, ValueError, r"candidates: shape must be \[3, C, 6\], got"),
        ({"offsets": OFFSETS.float()}, TypeError, "offsets: dtype .* got float32"),
        ({"offsets": OFFSETS - 1}, ValueError, "offsets: the first must be 0, got -1"),
        ({"offsets": OFFSETS.clamp(max=40)}, ValueError, "offsets: the last must be .* 41, got 40"),
        ({"lengths": LENGTHS}, ValueError, "lengths: give one of offsets, lengths and mask"),
        ({"mask": torch.ones(4, 25).bool()}, ValueError, "mask: give one of .*; got offsets too"),
        ({"bias": torch.zeros(T, 3)}, ValueError, r"bias: shape must be \[41, 2\], got \[41, 3\]"),
        ({"bias": torch.zeros(T).long()}, TypeError, "bias: dtype"),
        ({"candidate_offsets": OFFSETS}, ValueError, r"candidates: shape must be \[T, 6\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_inputs(change, error, message):
    candidates, x = _inputs(torch.float32)
    good = {"candidates": candidates, "history": x, "offsets": OFFSETS}
    with pytest.raises(error, match=message):
        _unit(torch.float32)(**good | change)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"lengths": LENGTHS + 10}, ValueError, "lengths: must be 0 to L = 25, got 31"),
        ({"lengths": LENGTHS - 1}, ValueError, "lengths: must be 0 to L = 25, got -1"),
        ({"lengths": LENGTHS[1:]}, ValueError, r"lengths: shape must be \[4\], got \[3\]"),
        ({"lengths": LENGTHS.float()}, TypeError, "lengths: dtype .* got float32"),
        ({"mask": torch.ones(4, 24).bool()}, ValueError, r"mask: shape must be \[4, 25\]"),
        ({"mask": torch.ones(4, 25)}, TypeError, "mask: dtype must be one of bool, got float32"),
        ({"bias": torch.zeros(T)}, ValueError, r"bias: shape must be \[4, 25\], got \[41\]"),
    ],
    ids=str,
)
def test_bad_padding(given, error, message):
    with pytest.raises(error, match=message):
        _unit(torch.float32)(_inputs(torch.float32)[0], _PAD, **given)


def test_several_keys_are_refused():
    history = Keyed(["a", "b"], _inputs()[1], OFFSETS)
    with pytest.raises(ValueError, match=r"history: must have one key, got \['a', 'b'\]"):
        _unit()(_inputs()[0], history)

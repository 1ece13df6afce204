"""Row optimisers: equal to torch's, nothing of a table's size, roundings without bias."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from livrec_fast import (
    PairedPrefixNgramEmbedding,
    PrefixNgramEmbedding,
    RowAdagrad,
    RowSGD,
    RowwiseAdagrad,
)
from livrec_fast._dispatch import Op
from livrec_fast.modules._row_optimizers import backend_of_rows

LEVELS = (6, 4, 5)
OPTIMIZERS = [RowSGD(0.5), RowAdagrad(0.1), RowwiseAdagrad(0.1)]


class _RowwiseByHand:
    def __init__(self, tables, lr=0.1, eps=1e-8):
        self.tables, self.lr, self.eps = tables, lr, eps
        self.state = [table.new_zeros(len(table)) for table in tables]

    @torch.no_grad()
    def step(self):
        for table, state in zip(self.tables, self.state, strict=True):
            grad = table.grad.to_dense()
            state += grad.square().mean(1)
            table -= self.lr * grad / (state.sqrt() + self.eps)[:, None]


PEERS = {
    RowSGD: lambda tables: torch.optim.SGD(tables, 0.5),
    RowAdagrad: lambda tables: torch.optim.Adagrad(tables, 0.1),
    RowwiseAdagrad: _RowwiseByHand,
}


def _codes(seed, items=50):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.stack([torch.randint(n, (items,), generator=generator) for n in LEVELS], 1)
    codes[torch.rand(codes.shape, generator=generator) < 0.15] = -1
    return codes


def _train(module, step, rounds=5, pool=False):
    offsets = torch.tensor([0, 9, 9, 20, 50]) if pool else None
    for seed in range(rounds):
        for table in module.parameters():
            table.grad = None
        out = module(_codes(seed), offsets)
        target = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
        (out - target).square().sum().backward()
        step()


def _nothing():
    pass


@pytest.mark.parametrize("mode", ["concat", "sum"])
@pytest.mark.parametrize("scheme", ["prefix", "levelwise"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: type(o).__name__)
def test_equals_torch(optimizer, sparse, scheme, mode):
    torch.manual_seed(0)
    settings = {"scheme": scheme, "mode": mode, "max_rows": 40, "dtype": torch.float64}
    settings |= {"pool": "mean" if sparse else None}
    fused = PrefixNgramEmbedding(LEVELS, 4, optimizer=optimizer, **settings)
    peer = PrefixNgramEmbedding(LEVELS, 4, sparse=sparse, **settings).warm_start_from(fused)
    before = copy.deepcopy(peer)
    _train(fused, _nothing, pool=sparse)
    _train(peer, PEERS[type(optimizer)](list(peer.parameters())).step, pool=sparse)
    assert all(table.grad is None for table in fused.parameters())
    for ours, theirs, first in zip(fused.tables, peer.tables, before.tables, strict=True):
        assert (theirs - first).abs().max() > 0.05
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: type(o).__name__)
def test_float32_equals_torch(optimizer):
    fused = PrefixNgramEmbedding(LEVELS, 4, optimizer=optimizer)
    peer = PrefixNgramEmbedding(LEVELS, 4).warm_start_from(fused)
    _train(fused, _nothing)
    _train(peer, PEERS[type(optimizer)](list(peer.parameters())).step)
    for ours, theirs in zip(fused.tables, peer.tables, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


class _Largest(TorchDispatchMode):
    """The most elements of a tensor that an operator made, rather than was given."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for made in tree_leaves(out):
            if isinstance(made, torch.Tensor) and made.data_ptr() not in given:
                self.most = max(self.most, made.numel())
        return out


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: type(o).__name__)
def test_makes_nothing_of_a_tables_size(optimizer):
    def most(**settings):
        module = PrefixNgramEmbedding((200, 200), 8, **settings)
        codes = torch.randint(200, (30, 2))
        with _Largest() as watched:
            module(codes).square().sum().backward()
        return watched.most

    assert most() >= 200 * 200 * 8  # the dense gradient is seen
    assert most(optimizer=optimizer) <= 30 * 16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_steps_add_up(dtype):
    torch.manual_seed(0)
    module = PrefixNgramEmbedding((2,), 512, optimizer=RowSGD(1e-4), dtype=dtype)
    with torch.no_grad():
        module.tables[0].fill_(1.0)
    for _ in range(200):  # each step far below half the distance of numbers near 1
        module(torch.tensor([[0]])).float().sum().backward()
    moved, still = module.tables[0].float().mean(1).tolist()
    assert moved == pytest.approx(1 - 200e-4, abs=2e-3) and still == 1


def test_roundings_follow_seed_and_count():
    def trained(seed, halfway=False):
        torch.manual_seed(0)
        module = PrefixNgramEmbedding(
            LEVELS, 4, optimizer=RowAdagrad(0.1, seed=seed), dtype=torch.bfloat16
        )
        _train(module, _nothing, rounds=3)
        if halfway:  # goes on from its state in a fresh module
            other = PrefixNgramEmbedding(
                LEVELS, 4, optimizer=RowAdagrad(0.1, seed=seed), dtype=torch.bfloat16
            )
            other.load_state_dict(module.state_dict())
            module = other
        _train(module, _nothing, rounds=3)
        return torch.cat([table.detach() for table in module.tables])

    assert torch.equal(trained(1), trained(1))
    assert torch.equal(trained(1), trained(1, halfway=True))
    assert not torch.equal(trained(1), trained(2))


def test_state_is_kept_and_stays_wide():
    module = PrefixNgramEmbedding(LEVELS, 4, optimizer=RowwiseAdagrad(0.1))
    assert {"updates", "state_0", "state_2"} <= module.state_dict().keys()
    _train(module, _nothing, rounds=2)
    kept = module.state_0.clone()
    assert module.updates == 2 and kept.any() and kept.shape == (6,)
    module.half()
    assert module.tables[0].dtype == torch.float16 and module.state_0.dtype == torch.float32
    assert torch.equal(module.state_0, kept)
    assert module.to("meta").state_0.is_meta
    module.to_empty(device="cpu").reset_parameters()
    assert not module.state_0.any() and module.updates == 0


def test_frozen_tables_stay_and_others_learn():
    module = PrefixNgramEmbedding(LEVELS, 4, optimizer=RowSGD(0.5))
    before = copy.deepcopy(module)
    module.tables[1].requires_grad_(False)
    _train(module, _nothing, rounds=1)
    same = [torch.equal(a, b) for a, b in zip(module.tables, before.tables, strict=True)]
    assert same == [False, True, False]
    with torch.no_grad():
        assert not module(_codes(0)).requires_grad
    module.requires_grad_(False)
    assert not module(_codes(0)).requires_grad


def test_learning_rate_can_change():
    module = PrefixNgramEmbedding(LEVELS, 4, optimizer=RowSGD(0.5))
    peer = PrefixNgramEmbedding(LEVELS, 4).warm_start_from(module)
    module.optimizer = replace(module.optimizer, lr=0.25)
    _train(module, _nothing, rounds=1)
    _train(peer, torch.optim.SGD(peer.parameters(), 0.25).step, rounds=1)
    torch.testing.assert_close(list(module.tables), list(peer.tables))


def test_compiled_models_leave_the_lookup_to_eager_mode():
    module = PrefixNgramEmbedding(LEVELS, 4, optimizer=RowSGD(0.5))
    peer = copy.deepcopy(module)
    model = torch.nn.Sequential(module, torch.nn.Linear(12, 1))
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        compiled(_codes(0)).sin().sum().backward()
        model[1](peer(_codes(0))).sin().sum().backward()
    assert module.updates == 2
    torch.testing.assert_close(module.state_dict(), peer.state_dict())


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: type(o).__name__)
def test_a_pair_learns_as_its_parts_do(optimizer):
    pair = PairedPrefixNgramEmbedding(
        *(PrefixNgramEmbedding(LEVELS, 4, optimizer=optimizer) for _ in range(2))
    )
    parts = copy.deepcopy(pair)
    codes = torch.cat([_codes(0), _codes(1)], 1)
    pair(codes).sin().sum().backward()
    parts.slice(_codes(0)).sin().sum().backward()
    parts.room(_codes(1)).sin().sum().backward()
    assert not torch.equal(pair.room.tables[0], pair.slice.tables[0])
    torch.testing.assert_close(pair.state_dict(), parts.state_dict())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: RowSGD(0), ValueError, "lr: must be positive and finite, got 0"),
        (lambda: RowAdagrad(float("nan")), ValueError, "lr: .* nan"),
        (lambda: RowwiseAdagrad(0.1, eps=-1.0), ValueError, "eps: .* -1.0"),
        (
            lambda: PrefixNgramEmbedding(LEVELS, 4, optimizer="sgd"),
            TypeError,
            "optimizer: must be a RowSGD, .* got str",
        ),
        (
            lambda: PrefixNgramEmbedding(LEVELS, 4, optimizer=RowSGD(0.1), sparse=True),
            ValueError,
            "sparse: ",
        ),
    ],
)
def test_bad_settings(make, error, message):
    with pytest.raises(error, match=message):
        make()


def _chosen(monkeypatch, run):
    """Return the backend of every op that `run` calls."""
    chosen, choose = [], Op.choose

    def told(op, args, backend):
        chosen.append((op.name, choose(op, args, backend)))
        return chosen[-1][1]

    monkeypatch.setattr(Op, "choose", told)
    run()
    return chosen


@pytest.mark.parametrize("kernel", ["native", "reference"])
@pytest.mark.parametrize("paired", [False, True])
def test_updates_run_by_the_modules_backend(kernel, paired, monkeypatch):
    if kernel == "native":
        pytest.importorskip("livrec_fast._C", reason="the compiled library is not there")
    module = PrefixNgramEmbedding(LEVELS, 4, optimizer=RowAdagrad(0.1), backend=kernel)
    if paired:
        other = PrefixNgramEmbedding(LEVELS, 4, optimizer=RowAdagrad(0.1), backend=kernel)
        module = PairedPrefixNgramEmbedding(module, other)
    codes = torch.cat([_codes(0)] * (2 if paired else 1), 1)
    chosen = _chosen(monkeypatch, lambda: module(codes).sum().backward())
    assert {backend for name, backend in chosen if name != "prefix_ngram_update"} <= {kernel}
    names = {name for name, _ in chosen}
    assert ("row_update" in names) == (kernel == "reference") and "prefix_ngram_lookup" in names


def test_a_backend_that_has_no_row_update_leaves_the_choice():
    assert backend_of_rows("triton") == backend_of_rows("auto") == "auto"
    assert backend_of_rows("reference") == "reference" and backend_of_rows("native") == "native"

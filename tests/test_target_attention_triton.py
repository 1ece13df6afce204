"""The Triton kernels of target attention: what they compute, their edges, how they reach a chip."""

import re
from importlib.util import find_spec
from itertools import product

import gpu_gates as gates
import pytest
import torch
from conftest import run_in_tritons_interpreter
from test_gates import needs_triton

from livrec_fast.reference.target_attention import ACTIVATIONS
from livrec_fast.reference.target_attention import target_attention as reference

SOME = {"B": 3, "C": 2, "L": 20, "H": 2, "d": 6, "dv": 5, "bias": 2}
LIMITS = {torch.float32: 4e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def _draw(dtype=torch.float32, activation="softmax", jagged=False, seed=3, **sizes):
    """Draw the operator's arguments; the second user has no history, and others' have holes."""
    B, C, L, H, d, dv, bias = (SOME | sizes).values()
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, L + 1, (B,), generator=generator)
    counts = torch.randint(0, 2 * C, (B,), generator=generator)
    lengths[1:2], counts[:1] = 0, C
    zero = torch.zeros(1, dtype=torch.int64)
    offsets, q_offsets = (torch.cat([zero, many.cumsum(0)]) for many in (lengths, counts))
    T = int(offsets[-1])
    leading = (int(q_offsets[-1]),) if jagged else (B, C)
    shapes = ((*leading, H, d), (T, H, d), (T, H, dv), (None, (T,), (T, H))[bias])
    q, k, v, added = (s and torch.randn(s, generator=generator) for s in shapes)
    if added is not None:
        added[::5] = -torch.inf
    q, k, v = (tensor.to(dtype) for tensor in (q, k, v))
    return [q, k, v, offsets, added, 1.5 * d**-0.5, activation, q_offsets if jagged else None]


def _flows(out, lse):
    generator = torch.Generator().manual_seed(4)
    flow, lse_flow = (torch.randn(t.shape, generator=generator).to(t) for t in (out, lse))
    return flow, lse_flow if lse.numel() else None


def _needs(args):
    return [True, True, True, False] + [True] * (args[4] is not None) + [False]


def _run(args):
    """Return what the kernels give: out, lse, and the gradients of q, k, v and bias."""
    from livrec_fast.kernels.target_attention import target_attention
    from livrec_fast.kernels.target_attention_gradient import target_attention_gradient

    out, lse = target_attention(*args)
    given = (*_flows(out, lse), *args, out, lse, _needs(args))
    return [out, lse, *target_attention_gradient(*given)]


def _wanted(args, flows, dtype):
    """Return what the reference gives in `dtype`."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in args[:3]]
    bias = args[4]
    if bias is not None:
        leaves.append(bias.to(torch.promote_types(dtype, torch.float32)).requires_grad_())
        bias = leaves[3]
    results = reference(*leaves[:3], args[3], bias, *args[5:])
    pairs = [(o, f.to(o)) for o, f in zip(results, flows, strict=True) if f is not None]
    roots, grads = zip(*pairs, strict=True)
    found = torch.autograd.grad(roots, leaves, grads, materialize_grads=True)
    return [one.detach() for one in (*results, *found)]


def _agree(args, atol=None):
    """Hold out, lse and gradients to at most twice the reference's own error, and a little."""
    got = _run(args)
    flows, dtype = _flows(*got[:2]), args[0].dtype
    every = got, _wanted(args, flows, dtype), _wanted(args, flows, torch.float64)
    atol = atol or LIMITS[dtype]
    least = min(1.0, max(float(one.abs().max()) for one in every[2][2:] if one.numel()))
    for at, (one, same, exact) in enumerate(zip(*every, strict=True)):
        assert (one.shape, one.dtype) == (same.shape, same.dtype), at
        there = exact.isfinite()
        assert one[~there].double().equal(exact[~there]), at
        if not there.any():
            continue
        error, own = ((t.double() - exact)[there] for t in (one, same))
        for norm in (lambda t: t.abs().max(), lambda t: t.square().mean().sqrt()):
            limit = 2 * norm(own) + atol * norm(exact[there]).clamp(min=least)
            assert norm(error) <= limit, (at, float(norm(error)), float(limit))
        assert one[there].any() or not same[there].any(), at
    return got


def softmax_of_every_kind():
    for bias, jagged in product((0, 1, 2), (False, True)):
        _agree(_draw(bias=bias, jagged=jagged))


def other_activations_of_every_kind():
    for activation, bias, jagged in product(ACTIVATIONS[1:], (0, 1, 2), (False, True)):
        _agree(_draw(activation=activation, bias=bias, jagged=jagged))


def dtypes_of_16_bits():
    for dtype, activation in product((torch.bfloat16, torch.float16), ACTIVATIONS):
        _agree(_draw(dtype, activation, d=20, dv=7))


def histories_of_many_pieces():
    """Lengths around a piece's, and several; the pieces' greatest logits far apart."""
    for activation, jagged in (("softmax", False), ("softmax", True), ("silu", True)):
        args = _draw(activation=activation, jagged=jagged, B=4, H=1, L=1, bias=1)
        generator = torch.Generator().manual_seed(0)
        k, v = (torch.randn(1600, 1, many, generator=generator) for many in (6, 5))
        args[1:5] = k, v, torch.tensor([0, 256, 256, 513, 1600]), torch.linspace(-60, 60, 1600)
        args[4] = args[4].roll(700)
        _agree(args, 2e-5)


def candidates_of_many_blocks():
    """More than one block of candidates, the last in part; rows that fill no tile, wide ones."""
    _agree(_draw(B=1, C=40, L=40, H=1, d=17, dv=70))
    _agree(_draw(B=2, C=20, L=40, H=1, d=100, dv=3, bias=0, jagged=True))
    _agree(_draw(torch.bfloat16, B=1, C=70, L=40, H=1, d=16, dv=3))
    _agree(_draw(B=1, C=3, L=30, H=1, d=130, dv=200, activation="sigmoid"))


def hot_logits_do_not_overflow():
    """Logits up to 10^4 of both signs, of whole numbers, so that they are exact."""
    for activation in ACTIVATIONS:
        args = _draw(activation=activation, B=1, H=1, L=20, bias=1)
        generator = torch.Generator().manual_seed(0)
        T = len(args[1])
        args[0] = torch.full_like(args[0], 100.0)
        args[1] = torch.randint(-9, 10, args[1].shape, generator=generator).float()
        args[4:6] = torch.arange(T).float() * 500 - 5000, 2.0
        _agree(args)


def values_with_a_common_part():
    """D is nearly one number: its differences must survive, and gradients of logits add up to 0."""
    args = _draw(L=60, bias=1)
    args[2] += 1000
    *_, grad = _agree(args, 2e-4)
    flow, lse_flow = _flows(*_run(args)[:2])
    total = sum(float(lse_flow[u].sum()) for u in (0, 2))  # what is left of them is of lse
    assert abs(float(grad.sum()) - total) <= 1e-3


def masked_histories_get_zeros():
    for activation in ACTIVATIONS:
        args = _draw(activation=activation, bias=1)
        args[4] = torch.full_like(args[4], -torch.inf)
        out, lse, *found = _run(args)
        assert lse.isneginf().all() and all(one.eq(0).all() for one in (out, *found))


def what_is_empty_gets_zeros():
    """No items, no candidates or no users, dense and jagged."""
    for activation, jagged, what in product(("softmax", "silu"), (False, True), "TCB"):
        args = _draw(activation=activation, jagged=jagged)
        if what in "TB":
            args[1:3] = args[1][:0], args[2][:0]
            args[3:5] = torch.zeros_like(args[3]), args[4][:0]
        if what in "CB":
            args[0] = args[0][:0] if jagged or what == "B" else args[0][:, :0]
            args[7] = torch.zeros_like(args[7]) if jagged else None
        if what == "B":
            args[3], args[7] = args[3][:1], args[7][:1] if jagged else None
        out, lse, *found = _run(args)
        assert out.shape == (*args[0].shape[:-1], args[2].shape[2])
        assert lse.shape == (args[0].shape[:-1] if activation == "softmax" else (0,))
        assert lse.isneginf().all() and all(one.eq(0).all() for one in (out, *found))


def not_a_number_spreads():
    """As far as in the reference, and no farther."""
    for activation, at in product(ACTIVATIONS, (0, 1, 2)):
        args = _draw(activation=activation, bias=0)
        (args[at][0] if at == 0 else args[at])[0] = torch.nan
        got = _run(args)
        wanted = _wanted(args, _flows(*got[:2]), torch.float64)
        pairs = [(one.isnan(), other.isnan()) for one, other in zip(got, wanted, strict=True)]
        assert pairs[0][0].any() and all(one.equal(other) for one, other in pairs)


def only_what_is_needed():
    args = _draw()
    full = _run(args)
    from livrec_fast.kernels.target_attention_gradient import target_attention_gradient

    for wanted in ([0], [1], [2], [3], [0, 2], []):
        needs = [at in wanted for at in (0, 1, 2)] + [False, 3 in wanted]
        found = target_attention_gradient(*_flows(*full[:2]), *args, *full[:2], needs)
        pairs = zip(found, (full[2 + at] for at in wanted), strict=True)
        assert all(one.equal(other) for one, other in pairs)


def strides_change_nothing():
    args = _draw(d=16, dv=16)
    got = _run(args)
    for at in (0, 1, 2):
        unaligned = torch.cat([args[at].new_ones(1), args[at].flatten()])[1:].view(args[at].shape)
        args[at] = unaligned.transpose(0, -1).contiguous().transpose(0, -1) if at else unaligned
    args[4] = torch.stack([args[4], args[4]], -1)[..., 0]
    assert all(one.equal(other) for one, other in zip(_run(args), got, strict=True))


def bad_offsets_stay_in_bounds():
    """The host does not look at them: they are made to ascend from 0 to the end."""
    bad, good = torch.tensor([-3, 4, 2, 2**62]), torch.tensor([0, 4, 4, 9])
    for jagged in (False, True):
        args = _draw(jagged=jagged, C=4)
        args[1:3] = torch.ones(9, 2, 6), torch.arange(9.0)[:, None, None].expand(9, 2, 5)
        args[4] = None
        results = []
        for offsets in (good, bad):
            args[3] = offsets
            if jagged:
                args[0], args[7] = torch.ones(9, 2, 6), offsets
            results.append(_run(args))
        assert all(one.equal(other) for one, other in zip(*results, strict=True))


def every_kind():
    softmax_of_every_kind()
    other_activations_of_every_kind()
    dtypes_of_16_bits()


def every_size():
    histories_of_many_pieces()
    candidates_of_many_blocks()
    what_is_empty_gets_zeros()


def extreme_contents():
    hot_logits_do_not_overflow()
    values_with_a_common_part()
    masked_histories_get_zeros()
    not_a_number_spreads()


def odd_arguments():
    only_what_is_needed()
    strides_change_nothing()
    bad_offsets_stay_in_bounds()


EDGES = [every_kind, every_size, extreme_contents, odd_arguments]  # Triton takes long to import


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("edges", EDGES, ids=lambda edges: edges.__name__)
def test_edges_in_tritons_interpreter(edges):
    run_in_tritons_interpreter(edges)


@needs_triton
def test_rows_travel_in_128_bits_while_others_are_multiplied():
    """Asynchronously; 64 candidates meet warp groups' matrix instructions, fewer a warp's."""
    module = gates.load("target_attention")
    seen = set()
    for kernel, types, constants, options in module.compile_configs():
        alone = "v" in constants  # keys are the values, too
        if kernel is module._attend and constants["D"] == constants["DV"] == 64 and not alone:
            sass = gates.compile_triton(kernel, types, constants, options, 90).sass
            assert len(re.findall(r"LDGSTS\.E\S*\.128", sass)) >= 4  # keys and values, two stages
            groups = constants["BLOCK_C"] >= 64
            assert re.search(r"\bHGMMA\b" if groups else r"\bHMMA\b", sass)
            seen.add(groups)
    assert seen == {True, False}

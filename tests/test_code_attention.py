"""Code attention: against target attention on decoded histories, unknown codes, gradients."""

import pytest
import torch
from test_target_attention import COMMON

from livrec_fast import code_attention, target_attention
from livrec_fast.reference.code_attention import make_inputs


def _put(good, value, dtype=None):
    codes = good["codes"].to(dtype or good["codes"].dtype).clone()
    codes[5, 0] = value
    return {"codes": codes}


def _tables(good, change, name="key_tables", at=1):
    tables = list(good[name])
    tables[at] = change(tables[at])
    return {name: tables}


def _packed(good, levels=(31, 28, 25), width=2):
    codes = torch.full((len(good["codes"]), width), 255, dtype=torch.uint8)  # 31, 31, 31
    return {"codes": codes, "packed": True, "levels": levels}


FIELDS = [
    ("codes list", lambda g: {"codes": [[0]]}, TypeError, "codes: must be a tensor, got list"),
    ("codes float", lambda g: {"codes": g["codes"].float()}, TypeError, "codes: .* float32"),
    ("codes narrow", lambda g: {"codes": g["codes"][:, 1:]}, ValueError, r"codes: .*\[T, 3\]"),
    ("codes meta", lambda g: {"codes": g["codes"].to("meta")}, ValueError, "codes: .* meta"),
    ("id = size", lambda g: _put(g, 31), IndexError, r"codes\[5, 0\] = 31 .* \[-1, 31\)"),
    ("id -2", lambda g: _put(g, -2), IndexError, r"codes\[5, 0\] = -2 .* \[-1, 31\)"),
    ("huge id", lambda g: _put(g, 2**40, torch.int64), IndexError, str(2**40)),
    ("a tensor", lambda g: {"key_tables": g["key_tables"][0]}, TypeError, "key_tables: .* list"),
    ("none", lambda g: {"value_tables": []}, ValueError, "value_tables: at least one"),
    ("fewer", lambda g: {"value_tables": g["value_tables"][1:]}, ValueError, "3, got 2"),
    ("item", lambda g: _tables(g, lambda t: None), TypeError, r"key_tables\[1\]: .* NoneType"),
    ("half", lambda g: _tables(g, torch.Tensor.half), TypeError, r"key_tables\[1\]: dtype"),
    ("no rows", lambda g: _tables(g, lambda t: t[:0]), ValueError, r"\[1\]: .* one row"),
    ("wide", lambda g: _tables(g, lambda t: t.repeat(1, 1, 2)), ValueError, "N, 2, 16"),
    ("meta", lambda g: _tables(g, lambda t: t.to("meta")), ValueError, r"\[1\]: device .* meta"),
    (
        "rows differ", lambda g: _tables(g, lambda t: t[1:], "value_tables", 2), ValueError,
        r"value_tables\[2\]: shape must be \[25, 2, 24\], got \[24, 2, 24\]",
    ),
    (
        "dv differs", lambda g: _tables(g, lambda t: t[..., 1:], "value_tables", 2), ValueError,
        r"value_tables\[2\]: shape must be \[25, 2, 24\], got \[25, 2, 23\]",
    ),
    (
        "no dv", lambda g: {"value_tables": [t[..., :0] for t in g["value_tables"]]}, ValueError,
        r"value_tables\[0\]: dv must be at least 1",
    ),
    ("levels text", lambda g: {"levels": "abc"}, TypeError, "levels: .* ints, got 'abc'"),
    ("levels few", lambda g: {"levels": (31, 28)}, ValueError, "levels: .* table, 3, got 2"),
    ("level 0", lambda g: {"levels": (31, 0, 25)}, ValueError, r"levels: .* \(31, 0, 25\)"),
    ("id = level", lambda g: {"levels": (31, 9, 25)}, IndexError, r", 1\] = \d+ .* \[-1, 9\)"),
    (
        "keys too large", lambda g: {"levels": [2**21] * 3, "prefix": True}, ValueError,
        r"levels: .* 2\^63 - 1",
    ),
    ("packed alone", lambda g: {"packed": True}, ValueError, "levels: .* packed=True, got None"),
    ("prefix alone", lambda g: {"prefix": True}, ValueError, "levels: .* prefix=True, got None"),
    ("groups alone", lambda g: {"groups": (1, 2)}, ValueError, r"levels: .* groups=\(1, 2\), got"),
    (
        "prefix and groups", lambda g: {"levels": [31] * 3, "prefix": True, "groups": (3,)},
        ValueError, r"groups: prefix=True .* groups=\(3,\)",
    ),
    (
        "groups few", lambda g: {"levels": [31] * 3, "groups": (1, 1)}, ValueError,
        r"groups: .* 3 levels, got \(1, 1\)",
    ),
    ("prefix int", lambda g: {"prefix": 1}, TypeError, "prefix: must be True or False, got 1"),
    ("packed int", lambda g: {"packed": 1}, TypeError, "packed: must be True or False, got 1"),
    ("hashing", lambda g: {"hashing": "xor"}, ValueError, "hashing: .* got 'xor'"),
    (
        "packed int16", lambda g: {"levels": [31] * 3, "packed": True}, TypeError,
        "codes: .* uint8, got int16",
    ),
    ("packed wide", lambda g: _packed(g, width=3), ValueError, r"codes: .*\[T, 2\], got .*3\]"),
    ("packed id", _packed, IndexError, r"codes\[0, 0\] = 31 is outside \[-1, 31\)"),
]  # fmt: skip
BAD_INPUTS = {
    "code_attention": [
        *COMMON,
        *FIELDS,
        (
            "bad with sparse",
            lambda g: {
                **_put(g, 31),
                "sparse": True,
                "key_tables": [t.requires_grad_() for t in g["key_tables"]],
            },
            IndexError,
            r"codes\[5, 0\] = 31",
        ),
    ]
}


def _inputs(dtype=torch.float32, seed=0, **sizes):
    sizes = {"B": 5, "C": 3, "L": 30, "F": 3, "N": 9, "H": 2, "d": 8, "dv": 6, "bias": 2} | sizes
    return make_inputs(torch.Generator().manual_seed(seed), dtype, **sizes)


def _decode(codes, tables):
    """Add up rows in a loop, as the sentence that defines them says."""
    out = torch.zeros(len(codes), *tables[0].shape[1:], dtype=torch.float64)
    for row, row_codes in enumerate(codes.tolist()):
        for table, code in zip(tables, row_codes, strict=True):
            if code >= 0:
                out[row] = out[row] + table[code].double()
    return out.to(tables[0].dtype)


def _as_target(inputs):
    given = {name: inputs[name] for name in ("q", "offsets", "bias", "scale", "return_lse")}
    k, v = (_decode(inputs["codes"], inputs[name]) for name in ("key_tables", "value_tables"))
    return given | {"k": k, "v": v}


def _leaves(inputs):
    tables = [*inputs["key_tables"], *inputs["value_tables"]]
    return [t.requires_grad_() for t in (inputs["q"], inputs["bias"], *tables)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_is_target_attention_on_decoded_histories(dtype):
    inputs = _inputs(dtype)
    assert (inputs["codes"] == -1).any() and (inputs["offsets"].diff() == 0).any()
    exact = dtype == torch.float64
    leaves = _leaves(inputs)
    results = code_attention(**inputs), target_attention(**_as_target(inputs))
    forward = {"rtol": 0.016, "atol": 0.02} if dtype == torch.bfloat16 else {}  # keys are rounded
    torch.testing.assert_close(*results, **forward)
    flows = [torch.randn(t.shape).to(t) for t in results[0]]
    grads, want = (torch.autograd.grad(result, leaves, flows) for result in results)
    tolerance = {} if exact else {"rtol": 2e-5 if dtype == torch.float32 else 0.1, "atol": 1e-3}
    if dtype == torch.bfloat16:
        tolerance["atol"] = 0.2  # the loop rounds a row's gradient at every step
    torch.testing.assert_close(grads, want, **tolerance)
    assert all(grad.ne(0).any() for grad in grads)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64])
def test_takes_codes_of_any_integer_dtype(dtype):
    inputs = _inputs()
    inputs["codes"] = inputs["codes"].clamp(min=0)
    cast = inputs | {"codes": inputs["codes"].to(dtype)}
    torch.testing.assert_close(code_attention(**cast), code_attention(**inputs), rtol=0, atol=0)


def test_unknown_codes_add_nothing_and_get_no_gradient():
    inputs = _inputs(torch.float64)
    inputs["codes"] = torch.full_like(inputs["codes"], -1)
    inputs["codes"][:, 1] = 4
    leaves = _leaves(inputs)
    grads = torch.autograd.grad(code_attention(**inputs)[0].square().sum(), leaves)
    for field, grad in enumerate(grads[5:]):
        live = grad.ne(0).flatten(1).any(1).nonzero().flatten().tolist()
        assert live == ([4] if field == 1 else []), (field, live)
    torch.testing.assert_close(code_attention(**inputs), target_attention(**_as_target(inputs)))


def test_rows_of_no_codes_stay_in_the_history():
    inputs = _inputs(bias=0) | {"return_lse": True}
    inputs["codes"] = torch.full_like(inputs["codes"], -1)
    out, lse = code_attention(**inputs)
    lengths = inputs["offsets"].diff()
    assert out.eq(0).all()
    want = lengths.log()[:, None, None].expand_as(lse)
    torch.testing.assert_close(lse, want)


def test_gradients_of_tables_are_summed_wide():
    """4,096 equal terms summed one by one in bfloat16 would stop at 256 of them."""
    T, one = 4096, torch.ones(1, 1, 1, dtype=torch.bfloat16)
    table = torch.ones(1, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    codes, offsets = torch.zeros(T, 1, dtype=torch.uint8), torch.arange(T + 1)
    out = code_attention(one.expand(T, 1, 1, 1), codes, [one], [table], offsets)
    (grad,) = torch.autograd.grad(out.sum(), table)
    assert grad.item() == T


def test_the_gradient_is_exact_in_float64():
    inputs = _inputs(torch.float64, L=4, N=4)
    held = inputs["offsets"].diff() > 0
    assert len(inputs["codes"]) > 4 and not held.all()

    def run(q, bias, *tables):
        given = {"q": q, "bias": bias, "key_tables": tables[:3], "value_tables": tables[3:]}
        out, lse = code_attention(**inputs | given)
        return out, lse[held]

    assert torch.autograd.gradcheck(run, _leaves(inputs))


def test_takes_a_parameter_list_and_autocast():
    inputs = _inputs()
    tables = torch.nn.ParameterList(inputs["key_tables"])
    got = code_attention(**inputs | {"key_tables": tables})
    torch.testing.assert_close(got, code_attention(**inputs), rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = code_attention(**inputs | {"q": inputs["q"].bfloat16()})
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32


@pytest.mark.parametrize("wanted", [("q",), ("q", "key 1"), ("value 0", "key 2"), ("bias",)])
def test_gradients_that_are_wanted_are_those_of_all(wanted):
    made = _inputs(torch.float32)
    names = ["q", "bias", *(f"{kind} {at}" for kind in ("key", "value") for at in range(3))]
    every, found = dict(zip(names, _leaves(made), strict=True)), {}
    for asked in (tuple(names), wanted):
        for name, tensor in every.items():
            tensor.requires_grad_(name in asked)
        loss = code_attention(**made)[0].square().sum()
        grads = torch.autograd.grad(loss, [every[name] for name in asked])
        found[asked] = dict(zip(asked, grads, strict=True))
    for name, grad in found[wanted].items():
        assert grad.any() and grad.equal(found[tuple(names)][name])

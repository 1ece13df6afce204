"""The CUDA kernels compiled for a CPU by tests/cuda/, behind the arguments of torch's operators."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from livrec_fast.testing.subjects import Subject

ROOT = Path(__file__).parent.parent
H100, OLD = 227 << 10, 99 << 10  # bytes of shared memory of a block
ASCENDING, DESCENDING, DRAWN = 0, 1, 7  # orders of blocks and threads
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-shared", "-U_FORTIFY_SOURCE", "-fno-strict-aliasing"]
CHECKS = ["-fsanitize=undefined", "-fno-sanitize-recover=all"]
CODES = {torch.uint8: 0, torch.int16: 2, torch.int32: 3}  # CodeType
INTEGERS = {torch.uint8: 0, torch.int16: 2, torch.int32: 3}  # Integer
TABLES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # TableType
_kept: list[Any] = []  # what pointers lead to


@cache
def library(name: str) -> ctypes.CDLL:
    """Compile a kernel for this machine."""
    folders = [f"-I{ROOT / 'tests' / 'cuda'}", f"-I{ROOT / 'csrc'}"]
    source = str(ROOT / "tests" / "cuda" / f"{name}.cpp")
    with TemporaryDirectory() as folder:
        made = str(Path(folder) / f"{name}.so")
        command = ["g++", *FLAGS, *CHECKS, *folders, source, "-o", made]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        loaded = ctypes.CDLL(made)
    loaded.guarded.restype = ctypes.c_void_p
    return loaded


def structure(**fields: str) -> type[ctypes.Structure]:
    """Make a struct of C from its fields and their types: pointer, long, int or float."""
    types = {"pointer": ctypes.c_void_p, "long": ctypes.c_int64}
    types |= {"int": ctypes.c_int, "float": ctypes.c_float}
    listed = [(name, types[kind]) for name, kind in fields.items()]
    return type("Job", (ctypes.Structure,), {"_fields_": listed})


ATTENTION = {
    "q": "pointer", "codes": "pointer", "code_type": "int", "items": "long", "fields": "long",
    "keys": "pointer", "values": "pointer", "rows": "pointer", "type": "int", "offsets": "pointer",
    "users": "long", "candidates": "long", "heads": "long", "dim": "long", "value_dim": "long",
    "bias": "pointer", "bias_heads": "long", "scale": "float", "out": "pointer", "lse": "pointer",
}  # fmt: skip
Attention = structure(**ATTENTION)
Gradient = structure(
    **ATTENTION, grad="pointer", made="pointer", grad_lse="pointer", grad_q="pointer",
    grad_bias="pointer", key_sums="pointer", value_sums="pointer", found="pointer",
    counts="pointer", room="long",
)  # fmt: skip
Votes = structure(
    codes="pointer", code_type="int", slices="long", offsets="pointer", histories="long",
    levels="pointer", level_count="long", voted="pointer", voted_type="int",
)  # fmt: skip


def on_device(lib: ctypes.CDLL, tensor: Tensor) -> int:
    """Copy a tensor to where nothing can be read beyond its end; return the address."""
    tensor = tensor.contiguous()
    size = tensor.numel() * tensor.element_size()
    address = lib.guarded(ctypes.c_int64(size))
    ctypes.memmove(address, tensor.data_ptr(), size)
    return address


def fresh(lib: ctypes.CDLL, out: Tensor) -> int:
    """Return the address of memory for a result: full of NaNs, with nothing behind it."""
    return lib.guarded(ctypes.c_int64(out.numel() * out.element_size()))


def fetch(out: Tensor, address: int) -> Tensor:
    """Copy a result back."""
    ctypes.memmove(out.data_ptr(), address, out.numel() * out.element_size())
    return out


def array(kind: Any, values: Sequence[int]) -> int:
    """Return the address of an array on the host."""
    _kept.append((kind * len(values))(*values))
    return ctypes.addressof(_kept[-1])


def described(
    lib: ctypes.CDLL, q: Tensor, codes: Tensor, key_tables: Sequence[Tensor],
    value_tables: Sequence[Tensor], offsets: Tensor, bias: Tensor | None, scale: float,
    levels: Sequence[int], groups: Sequence[int], hashing: str, packed: bool,
) -> list[Any]:  # fmt: skip
    """Return the fields of CodeAttentionCuda but for its results."""
    assert not packed and all(group == 1 for group in groups)
    (users, candidates, heads, dim), value_dim = q.shape, value_tables[0].shape[2]
    keys, values = (
        array(ctypes.c_void_p, [on_device(lib, table) for table in tables])
        for tables in (key_tables, value_tables)
    )
    bias_heads = 0 if bias is None else heads if bias.dim() == 2 else 1
    return [
        on_device(lib, q), on_device(lib, codes), CODES[codes.dtype], len(codes), len(key_tables),
        keys, values, array(ctypes.c_int64, levels), TABLES[q.dtype], on_device(lib, offsets),
        users, candidates, heads, dim, value_dim, None if bias is None else on_device(lib, bias),
        bias_heads, scale,
    ]  # fmt: skip


def attend(
    q: Tensor, codes: Tensor, key_tables: Sequence[Tensor], value_tables: Sequence[Tensor],
    *rest: Any, limit: int = H100, order: int = ASCENDING,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Do what `livrec::code_attention.cuda` does."""
    lib = library("code_attention")
    given = described(lib, q, codes, key_tables, value_tables, *rest)
    out = q.new_empty(*q.shape[:3], value_tables[0].shape[2])
    lse = torch.empty(q.shape[:3])
    places = fresh(lib, out), fresh(lib, lse)
    assert lib.code_attention(ctypes.byref(Attention(*given, *places)), limit, order) == 0
    return fetch(out, places[0]), fetch(lse, places[1])


def differentiate(
    grad: Tensor, grad_lse: Tensor | None, q: Tensor, codes: Tensor, key_tables: Sequence[Tensor],
    value_tables: Sequence[Tensor], offsets: Tensor, bias: Tensor | None, scale: float,
    levels: Sequence[int], *rest: Any, limit: int = H100, order: int = ASCENDING,
    room: int = 64 << 20,
) -> list[Tensor]:  # fmt: skip
    """Do what `livrec::code_attention_gradient.cuda` does."""
    lib = library("code_attention_gradient")
    *how, out, _ = rest
    given = described(lib, q, codes, key_tables, value_tables, offsets, bias, scale, levels, *how)
    shapes = (sum(levels), *key_tables[0].shape[1:]), (sum(levels), *value_tables[0].shape[1:])
    made = [torch.empty(q.shape, dtype=q.dtype)]
    made += [torch.empty(0 if bias is None else bias.shape), *map(torch.empty, shapes)]
    made += [torch.empty(n, dtype=torch.int64) for n in (sum(levels), len(levels))]
    places = [fresh(lib, one) for one in made]
    flows = [None if one is None else on_device(lib, one) for one in (grad, out, grad_lse)]
    job = Gradient(*given, None, None, *flows, *places, room)
    assert lib.code_attention_gradient(ctypes.byref(job), limit, order) == 0
    grad_q, grad_bias, keys, values, rows, counts = map(fetch, made, places)
    found, begin = [grad_q, grad_bias], 0
    for level, count in zip(levels, counts.tolist(), strict=True):
        own = rows[begin : begin + count]
        sums = [one[begin : begin + level] for one in (keys, values)]
        found += [own, *(taken(lib, one, own) for one in sums)]
        begin += level
    return found


def taken(lib: ctypes.CDLL, sums: Tensor, rows: Tensor) -> Tensor:
    """Copy some rows as the kernels do."""
    out = sums.new_empty(len(rows), *sums.shape[1:])
    place, size = fresh(lib, out), ctypes.c_int64(sums[0].numel())
    pointers = [ctypes.c_void_p(on_device(lib, one)) for one in (sums, rows)]
    count = ctypes.c_int64(len(rows))
    assert lib.take_rows(*pointers, count, size, ctypes.c_void_p(place)) == 0
    return fetch(out, place)


def vote(
    codes: Tensor, offsets: Tensor, levels: Sequence[int], rule: str, order: int = ASCENDING
) -> Tensor:
    """Do what `livrec::majority_vote.cuda` does."""
    lib = library("majority_vote")
    dtype = torch.int16 if max(levels) <= 32767 else torch.int32
    voted = torch.empty(len(offsets) - 1, len(levels), dtype=dtype)
    place = fresh(lib, voted)
    job = Votes(
        on_device(lib, codes), INTEGERS[codes.dtype], len(codes), on_device(lib, offsets),
        len(voted), array(ctypes.c_int64, levels), len(levels), place, INTEGERS[dtype],
    )  # fmt: skip
    assert lib.majority_vote(ctypes.byref(job), OLD, order) == 0
    return fetch(voted, place)


def emulated(subject: Subject, function: Callable[..., Any]) -> Subject:
    """Return the op with an emulated kernel where the formula stood: to be run by FORMULA."""
    return replace(subject, oracle=replace(subject.oracle, function=function))

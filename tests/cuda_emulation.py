"""The CUDA kernels compiled for a CPU by tests/cuda/, behind the arguments of torch's operators."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
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
    made = Path(mkdtemp()) / f"{name}.so"
    folders = [f"-I{ROOT / 'tests' / 'cuda'}", f"-I{ROOT / 'csrc'}"]
    source = str(ROOT / "tests" / "cuda" / f"{name}.cpp")
    done = subprocess.run(
        ["g++", *FLAGS, *CHECKS, *folders, source, "-o", str(made)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(str(made))
    loaded.guarded.restype = ctypes.c_void_p
    return loaded


def structure(**fields: str) -> type[ctypes.Structure]:
    """Make a struct of C from its fields and their types: pointer, long, int or float."""
    types = {"pointer": ctypes.c_void_p, "long": ctypes.c_int64}
    types |= {"int": ctypes.c_int, "float": ctypes.c_float}
    listed = [(name, types[kind]) for name, kind in fields.items()]
    return type("Job", (ctypes.Structure,), {"_fields_": listed})


Attention = structure(
    q="pointer", codes="pointer", code_type="int", items="long", fields="long", keys="pointer",
    values="pointer", rows="pointer", type="int", offsets="pointer", users="long",
    candidates="long", heads="long", dim="long", value_dim="long", bias="pointer",
    bias_heads="long", scale="float", out="pointer", lse="pointer",
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


def attend(
    q: Tensor, codes: Tensor, key_tables: Sequence[Tensor], value_tables: Sequence[Tensor],
    offsets: Tensor, bias: Tensor | None, scale: float, levels: Sequence[int], *rest: Any,
    limit: int = H100, order: int = ASCENDING,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Do what `livrec::code_attention.cuda` does."""
    lib = library("code_attention")
    (users, candidates, heads, dim), value_dim = q.shape, value_tables[0].shape[2]
    out, lse = q.new_empty(users, candidates, heads, value_dim), torch.empty(q.shape[:3])
    keys, values = (
        array(ctypes.c_void_p, [on_device(lib, table) for table in tables])
        for tables in (key_tables, value_tables)
    )
    places = fresh(lib, out), fresh(lib, lse)
    job = Attention(
        on_device(lib, q), on_device(lib, codes), CODES[codes.dtype], len(codes), len(key_tables),
        keys, values, array(ctypes.c_int64, levels), TABLES[q.dtype], on_device(lib, offsets),
        users, candidates, heads, dim, value_dim, None if bias is None else on_device(lib, bias),
        0 if bias is None else bias[0].numel() if len(bias) else 1, scale, *places,
    )  # fmt: skip
    assert lib.code_attention(ctypes.byref(job), limit, order) == 0
    return fetch(out, places[0]), fetch(lse, places[1])


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

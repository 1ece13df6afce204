"""Items of a history as fields: an author, a time gap and codes, with a table for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from operator import mul
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .._checks import (
    FLOATS,
    INTEGERS,
    check_choice,
    check_codes,
    check_levels,
    check_same,
    check_tensor,
)
from ..ops._prefix import check_key_space
from ..ops.pack_codes import unpack_codes
from ..ops.prefix_ngram import prefix_ngram_lookup
from ..reference.pack_codes import packed_bytes


def gap_bucket(seconds: Tensor, buckets: int) -> Tensor:
    r"""Put time gaps into buckets that double: $\min(\lfloor \log_2 s \rfloor + 1, buckets - 1)$.

    Bucket 0 is below one second, bucket i from 2^(i-1) to below 2^i seconds, the last takes all
    longer gaps: 25 buckets tell gaps of up to 97 days apart. Gaps that are negative or NaN are
    unknown, -1.

    Args:
        seconds: of any shape, integers or floats; exact for integers below 2^53.
        buckets: 1 to 64.

    Returns:
        int8, of the shape of seconds.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a number of buckets out of range.

    Example:
        >>> gap_bucket(torch.tensor([0, 1, 59, 3600]), 25)  # [0, 1, 6, 12]
    """
    if not isinstance(seconds, Tensor):
        raise TypeError(f"seconds: must be a tensor, got {type(seconds).__name__}")
    check_tensor("seconds", seconds, list(seconds.shape), (*INTEGERS, *FLOATS))
    check_count("buckets", buckets, most=64)
    wide = seconds.double()
    exponent = torch.frexp(wide.clamp(0, 2.0**62)).exponent  # an infinity has none
    return torch.where(wide >= 0, exponent.clamp(0, buckets - 1), -1).to(torch.int8)


class CodeItems(nn.Module):
    """The tables of the fields, and how items read them."""

    def __init__(
        self, dim: int, levels: Sequence[int], *, prefix: bool, max_rows: int, authors: int | None,
        author_ids: int | None, gap_buckets: int | None, hashing: str, sparse: bool, backend: str,
        **made: Any,
    ):  # fmt: skip
        """Make the tables; arguments are those of `CodeTargetAttention`."""
        super().__init__()
        for name, flag in {"prefix": prefix, "sparse": sparse}.items():
            if not isinstance(flag, bool):
                raise TypeError(f"{name}: must be True or False, got {flag!r}")
        check_count("max_rows", max_rows)
        for name, count in {"authors": authors, "gap_buckets": gap_buckets}.items():
            check_count(name, 1 if count is None else count)
        if author_ids is not None:
            check_count("author_ids", author_ids)
            if authors is None or author_ids < authors:
                raise ValueError(
                    f"author_ids: must be at least authors={authors}, got {author_ids}"
                )
        check_choice("hashing", hashing, ("modulo", "murmur3", "order_preserving"))
        self.levels = check_key_space(levels) if prefix else check_levels(levels)
        self.dim, self.prefix, self.hashing, self.backend = dim, prefix, hashing, backend
        self.sparse, self.author_ids, self.gap_buckets = sparse, author_ids or authors, gap_buckets
        keys = accumulate(self.levels, mul) if prefix else self.levels
        every = {"author": authors, "gap": gap_buckets}
        every |= {f"code_{at}": min(n, max_rows) if prefix else n for at, n in enumerate(keys)}
        self.rows = {name: count for name, count in every.items() if count is not None}
        ahead = [size for size in (self.author_ids, gap_buckets) if size is not None]
        self.fields = [*ahead, *self.levels]
        depth = len(self.levels)
        self.groups = [1] * len(ahead) + ([depth] if prefix else [1] * depth)
        self.tables = nn.ModuleDict(  # embeddings, as DistributedDataParallel knows their sparsity
            {name: nn.Embedding(n, dim, sparse=sparse, **made) for name, n in self.rows.items()}
        )

    def table(self, name: str) -> Tensor:
        """Return the table of one field: "author", "gap", "code_0", "code_1" and so on."""
        return self.tables.get_submodule(name).get_parameter("weight")

    def embed(
        self, codes: Tensor, *, authors: Tensor | None = None, gaps: Tensor | None = None,
        packed: bool = False,
    ) -> Tensor:  # fmt: skip
        """Return the items' x [M, dim], of candidates, say: authors or gaps not given are unknown.

        Arguments are those of forward. Gradients reach the tables, sparse ones where forward's are.
        """
        self._check_items(codes, authors, gaps, packed)

        def compute() -> Tensor:
            fields, packed_fields = self._stacked(codes, authors, gaps, packed)
            return prefix_ngram_lookup(
                fields, [self.table(name) for name in self.rows], self.fields, mode="sum",
                hashing=self.hashing, groups=self.groups, packed=packed_fields, sparse=self.sparse,
                backend=self.backend,
            )  # fmt: skip

        return self._named(compute, codes, authors, gaps, packed)

    def _stacked(
        self, codes: Tensor, authors: Tensor | None, gaps: Tensor | None, packed: bool
    ) -> tuple[Tensor, bool]:
        """Return all fields as the columns of one matrix, or packed codes, where they are all."""
        ahead = {"author": authors, "gap": gaps}
        found = [ids for name, ids in ahead.items() if name in self.rows]
        if not found:
            return codes, packed
        unknown = codes.new_full((codes.shape[0],), -1, dtype=torch.int8)
        columns = [unknown if ids is None else ids for ids in found]
        rest = unpack_codes(codes, self.levels) if packed else codes
        return torch.cat([*(column[:, None] for column in columns), rest], 1), False

    def _check_items(
        self, codes: Tensor, authors: Tensor | None, gaps: Tensor | None, packed: bool
    ) -> None:
        if not isinstance(packed, bool):
            raise TypeError(f"packed: must be True or False, got {packed!r}")
        width = packed_bytes(self.levels) if packed else len(self.levels)
        check_tensor("codes", codes, ("T", width), (torch.uint8,) if packed else INTEGERS)
        for name, field, ids in (("authors", "author", authors), ("gaps", "gap", gaps)):
            if ids is None:
                continue
            if field not in self.rows:
                made = "authors" if field == "author" else "gap_buckets"
                raise ValueError(
                    f"{name}: the module has no such field: it was made without {made}"
                )
            check_tensor(name, ids, (codes.shape[0],), INTEGERS)
        check_same("device", codes=codes, authors=authors, gaps=gaps, tables=self.table("code_0"))

    def _named(
        self, compute: Callable[[], Any], codes: Tensor, authors: Tensor | None,
        gaps: Tensor | None, packed: bool,
    ) -> Any:  # fmt: skip
        """Compute; where an id is out of range, name the argument that has it, not the column."""
        if torch.compiler.is_compiling():
            return compute()
        try:
            return compute()
        except IndexError:
            for name, ids, size in (
                ("authors", authors, self.author_ids), ("gaps", gaps, self.gap_buckets)
            ):  # fmt: skip
                if ids is not None and size is not None:
                    _check_ids(name, ids, size)
            check_codes(
                unpack_codes(codes, self.levels) if packed else codes, self.levels, least=-1
            )
            raise


class OneHead(torch.autograd.Function):
    """table[:, None], through which sparse gradients pass: torch's own views refuse them."""

    @staticmethod
    def forward(ctx: Any, table: Tensor) -> Tensor:
        """Add the dimension."""
        return table[:, None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Take it away."""
        if not grad.is_sparse:
            return grad[:, 0]
        shape = (grad.shape[0], grad.shape[2])
        return torch.sparse_coo_tensor(
            grad._indices(), grad._values()[:, 0], shape,
            is_coalesced=grad.is_coalesced(), check_invariants=False,
        )  # fmt: skip


def check_count(name: str, count: Any, most: int = 2**63 - 1) -> None:
    """Check that a setting is an int from 1 to `most`."""
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"{name}: must be an int, got {count!r}")
    if not 1 <= count <= most:
        raise ValueError(f"{name}: must be from 1 to {most:,}, got {count}")


def _check_ids(name: str, ids: Tensor, size: int) -> None:
    bad = ((ids.long() < -1) | (ids.long() >= size)).nonzero()
    if len(bad):
        at = int(bad[0])
        raise IndexError(f"{name}: {name}[{at}] = {int(ids[at])} is outside [-1, {size})")

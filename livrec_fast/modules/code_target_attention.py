"""Target attention over histories of codes, as a layer of a ranker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from .._checks import FLOATS, check_choice, check_one_dtype, check_same, check_tensor, named_items
from ..ops._attention import check_bias
from ..ops.code_attention import code_attention
from ..ops.target_attention import target_attention
from ._code_items import CodeItems, OneHead, check_count

_PROJECTED_ROWS = 1 << 13  # of all tables: up to here projecting them was the cheaper way


class CodeTargetAttention(CodeItems):
    r"""Attend from candidates to their user's history of codes, authors and time gaps.

    An item is the sum of its fields' embeddings, $x_t = \sum_f E_f[r_f(t)]$, and head h computes
    $o_c = \sum_t \mathrm{softmax}_t(\langle q_c, W^k_h x_t \rangle / \sqrt d + b_t)\, W^v_h x_t$
    with $q_c = W^q_h c + b^q_h$. Fields are the author, the gap and the codes, in this order; what
    is unknown, -1, adds nothing. No vector of an item is ever made: as keys and values are linear
    in x, the projections go elsewhere, and both ways are exact:

    - absorb "tables": $K_f = E_f W_k^\top$ and $V_f = E_f W_v^\top$, once per call, then
      `code_attention` over these. Costs a product over every row of every table.
    - absorb "query": $\langle q, W_k x \rangle = \langle W_k^\top q, x \rangle$ and
      $\sum_t p_t W_v x_t = W_v \sum_t p_t x_t$: `code_attention` over E_f itself, with the heads as
      further candidates. Costs dim instead of d per row that the batch reads, and nothing per row
      that it does not read: for tables of authors and of deep prefixes. With a bias per head it
      takes a call per head.

    Both have the same parameters, and either can be loaded into the other. The query's bias gives
    every gap, author and code a weight whatever the candidate, $\langle b^q, W_k E_f[r] \rangle$:
    a learned bias by gap needs no [T, H] tensor. No other projection has one, so that a user
    without history gets zeros.

    Tables start normal, such that the entries of x have variance 1, as nn.Embedding's have;
    projections as `xavier_uniform_` has it, the bias at 0.

    Works under autocast, which casts the tables in full, under DistributedDataParallel and, unless
    sparse, under torch.compile. What else it computes is `code_attention`'s: its numerics, its bits
    and its workspace, at width dim and H times the candidates where the query absorbs.

    Source: LARM, equation 5 (author and codes of live slices); Moment&Cross, section 2.4 (target
    attention over behaviours with side information, such as time gaps).

    Example:
        >>> unit = CodeTargetAttention(64, 4, authors=100_000, gap_buckets=25)
        >>> gaps = gap_bucket(now - time, 25)  # seconds [T]
        >>> seen = unit(candidates, codes, offsets, authors=authors, gaps=gaps)  # [B, C, 64]
        >>> logits = mlp(torch.cat([candidates, seen], 2))  # mlp: of the ranker
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        levels: Sequence[int] = (512, 256, 128),
        prefix: bool = False,
        max_rows: int = 1 << 20,
        authors: int | None = None,
        author_ids: int | None = None,
        gap_buckets: int | None = None,
        query_dim: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        out_dim: int | None = None,
        hashing: str = "modulo",
        absorb: str = "auto",
        sparse: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        backend: str = "auto",
    ):
        """Make the tables and the projections.

        Args:
            dim: of the embedding x of an item.
            heads: H.
            levels: (N_1, ..., N_L), the sizes of the codebooks.
            prefix: look codes up by their prefixes: level l reads the row of the first l codes.
            max_rows: the most rows of a table of prefixes, shared by hashing where it is too few.
            authors: rows of the table of authors; None, no such field.
            author_ids: how many ids there are, where more than rows: hashing lets them share.
            gap_buckets: rows of the table of gaps; None, no such field.
            query_dim: of a candidate; dim where None.
            head_dim: d, of a head's query; dim / heads, rounded up, where None.
            value_dim: of a head's value; head_dim where None.
            out_dim: of a last projection; None, no such projection, the heads side by side.
            hashing: "modulo", "murmur3" or "order_preserving"; see `prefix_ngram_lookup`.
            absorb: "tables", "query", or "auto": "tables" for up to 8,192 rows in all, if not
                sparse, else "query".
            sparse: gradients of the tables are sparse, as torch.optim.SparseAdam, SGD and Adagrad
                take them. Absorbs by "query", in eager mode only.
            dtype: of the parameters; torch's default where None.
            device: of the parameters.
            backend: of the ops.
        """
        needed = {"dim": dim, "heads": heads}
        sizes = {"query_dim": query_dim, "head_dim": head_dim, "value_dim": value_dim}
        for name, size in (needed | sizes | {"out_dim": out_dim}).items():
            check_count(name, 1 if size is None and name not in needed else size)
        check_choice("absorb", absorb, ("auto", "tables", "query"))
        if sparse and absorb == "tables":
            raise ValueError("sparse: needs absorb='query': products make tables' gradients dense")
        made: dict[str, Any] = {"dtype": dtype, "device": device}
        super().__init__(
            dim, levels, prefix=prefix, max_rows=max_rows, authors=authors, author_ids=author_ids,
            gap_buckets=gap_buckets, hashing=hashing, sparse=sparse, backend=backend, **made,
        )  # fmt: skip
        if absorb == "auto":
            few = sum(self.rows.values()) <= _PROJECTED_ROWS
            absorb = "tables" if few and not sparse else "query"
        self.heads, self.absorb = heads, absorb
        self.query_dim, self.head_dim = query_dim or dim, head_dim or -(-dim // heads)
        self.value_dim = value_dim or self.head_dim
        joined = heads * self.value_dim
        self.out_dim = out_dim or joined
        self.query = nn.Linear(self.query_dim, heads * self.head_dim, **made)
        self.key = nn.Linear(dim, heads * self.head_dim, bias=False, **made)
        self.value = nn.Linear(dim, joined, bias=False, **made)
        self.out = nn.Linear(joined, out_dim, bias=False, **made) if out_dim else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        for name in self.rows:
            nn.init.normal_(self.table(name), std=len(self.rows) ** -0.5)
        for module in (self.query, self.key, self.value, self.out):
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(self.query.bias)

    @classmethod
    def from_codebooks(cls, codebooks: Sequence[Tensor], heads: int, **settings: Any) -> Self:
        """Make a module whose items start as the vectors that their codes stand for.

        The tables of codes are the codewords, so that x is `residual_kmeans_decode` of the codes,
        and dim is theirs; those of authors and gaps start as large as the first codewords are.

        Args:
            codebooks: L tensors [N_l, D], such as `ResidualKMeans.codebooks`; they are copied.
            heads: H.
            settings: as of the class, but for dim, levels and prefix.

        Example:
            >>> unit = CodeTargetAttention.from_codebooks(quantizer.codebooks, 4, authors=100_000)
        """
        if settings.get("prefix"):
            raise ValueError("prefix: rows of prefixes are not codewords; got prefix=True")
        books = named_items("codebooks", codebooks)
        D: int | str = "D"  # until the first codebook tells
        for name, book in books.items():
            check_tensor(name, book, ("N", D), FLOATS)
            D = book.shape[1]
        levels = [len(book) for book in books.values()]
        unit = cls(codebooks[0].shape[1], heads, levels=levels, **settings)
        first = codebooks[0].detach().double().square().mean().sqrt()
        with torch.no_grad():
            for level, book in enumerate(books.values()):
                unit.table(f"code_{level}").copy_(book)
            for name in [name for name in ("author", "gap") if name in unit.rows]:
                nn.init.normal_(unit.table(name), std=float(first))
        return unit

    def forward(
        self, candidates: Tensor, codes: Tensor, offsets: Tensor, *, authors: Tensor | None = None,
        gaps: Tensor | None = None, bias: Tensor | None = None, packed: bool = False,
        return_lse: bool = False,
    ) -> Any:  # fmt: skip
        """Attend to the histories.

        Args:
            candidates: [B, C, query_dim], the parameters' dtype: C candidates for each of B users.
            codes: [T, L] integers, column l in [-1, N_l): of all histories, one after the other.
            offsets: int64 [B + 1]; user u has the rows offsets[u] .. offsets[u + 1] - 1.
            authors: [T] integers in [-1, author_ids), needed where the module has the field.
            gaps: [T] integers in [-1, gap_buckets), such as of `gap_bucket`; needed likewise.
            bias: [T] or [T, H], added to the logits; -inf takes an item out.
            packed: codes are what `pack_codes` makes of them, uint8 [T, ceil(bits / 8)].
            return_lse: return the logarithm of the sum of the exponentials, too: how much of the
                history is like the candidate.

        Returns:
            [B, C, out_dim], zeros for a user without history, or with it the lse [B, C, H], -inf
            for such a user.

        Raises:
            TypeError, ValueError, IndexError: what is wrong with which argument.
        """
        q, bias = self._query(candidates, codes, offsets, authors, gaps, bias, packed)
        attend = self._by_tables if self.absorb == "tables" else self._by_query

        def compute() -> tuple[Tensor, Tensor]:
            fields, packed_fields = self._stacked(codes, authors, gaps, packed)
            return attend(q, fields, offsets, bias, packed_fields)

        found, lse = self._named(compute, codes, authors, gaps, packed)
        out = self.out(found.flatten(2))
        return (out, lse) if return_lse else out

    def unabsorbed(
        self, candidates: Tensor, codes: Tensor, offsets: Tensor, *, authors: Tensor | None = None,
        gaps: Tensor | None = None, bias: Tensor | None = None, packed: bool = False,
    ) -> Tensor:  # fmt: skip
        """Compute the same as it is defined: embed every item, project it, and attend to that."""
        q, bias = self._query(candidates, codes, offsets, authors, gaps, bias, packed)
        x = self.embed(codes, authors=authors, gaps=gaps, packed=packed)
        k = self.key(x).unflatten(1, (self.heads, self.head_dim))
        v = self.value(x).unflatten(1, (self.heads, self.value_dim))
        out = target_attention(q, k, v, offsets, bias=bias, backend=self.backend)
        assert isinstance(out, Tensor)
        return self.out(out.flatten(2))

    def _query(
        self, candidates: Tensor, codes: Tensor, offsets: Tensor, authors: Tensor | None,
        gaps: Tensor | None, bias: Tensor | None, packed: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Check all arguments; return the queries [B, C, H, d], and the bias as logits are."""
        check_tensor("candidates", candidates, ("B", "C", self.query_dim), FLOATS)
        check_one_dtype(parameters=self.query.weight, candidates=candidates)
        for name, field, ids in (("authors", "author", authors), ("gaps", "gap", gaps)):
            if field in self.rows and ids is None:
                raise ValueError(f"{name}: needed, as the module has the field; -1 where unknown")
        self._check_items(codes, authors, gaps, packed)
        check_tensor("offsets", offsets, (candidates.shape[0] + 1,), (torch.int64,))
        q = self.query(candidates).unflatten(2, (self.heads, self.head_dim))
        bias = check_bias(bias, q, codes.shape[0])
        check_same("device", candidates=candidates, codes=codes, offsets=offsets, bias=bias)
        return q, bias

    def _by_tables(
        self, q: Tensor, fields: Tensor, offsets: Tensor, bias: Tensor | None, packed: bool
    ) -> tuple[Tensor, Tensor]:
        """Attend with the tables projected, to [B, C, H, value_dim], and lse [B, C, H]."""
        tables = [self.table(name) for name in self.rows]
        keys = [self.key(table).unflatten(1, (self.heads, self.head_dim)) for table in tables]
        values = [self.value(table).unflatten(1, (self.heads, self.value_dim)) for table in tables]
        return self._attend(q, fields, keys, values, offsets, bias, packed)

    def _by_query(
        self, q: Tensor, fields: Tensor, offsets: Tensor, bias: Tensor | None, packed: bool
    ) -> tuple[Tensor, Tensor]:
        """Attend with the query projected to the tables' width, and the result from it."""
        key = self.key.weight.unflatten(0, (self.heads, self.head_dim))
        value = self.value.weight.unflatten(0, (self.heads, self.value_dim))
        q = torch.einsum("bchd,hdn->bchn", q, key)
        tables = [self.table(name) for name in self.rows]
        tables = [OneHead.apply(table) if self.sparse else table[:, None] for table in tables]

        def attend(q: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
            folded = q.flatten(1, 2)[:, :, None]  # of [B, C, heads, dim]
            out, lse = self._attend(folded, fields, tables, tables, offsets, bias, packed)
            return out.view(q.shape), lse.view(q.shape[:3])

        if bias is None or bias.dim() == 1:
            out, lse = attend(q, bias)
        else:
            heads = zip(q.split(1, 2), bias.unbind(1), strict=True)
            parts = zip(*(attend(*head) for head in heads), strict=True)
            out, lse = (torch.cat(part, 2) for part in parts)
        return torch.einsum("bchn,hvn->bchv", out, value), lse

    def _attend(
        self, q: Tensor, fields: Tensor, keys: list[Tensor], values: list[Tensor], offsets: Tensor,
        bias: Tensor | None, packed: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        found = code_attention(
            q, fields, keys, values, offsets, bias=bias, scale=self.head_dim**-0.5,
            levels=self.fields, groups=self.groups, hashing=self.hashing, packed=packed,
            sparse=self.sparse, backend=self.backend, return_lse=True,
        )  # fmt: skip
        assert isinstance(found, tuple)
        return found

    def extra_repr(self) -> str:
        """Describe the module in `print(module)`."""
        return (
            f"dim={self.dim}, heads={self.heads}, levels={tuple(self.levels)}, "
            f"prefix={self.prefix}, hashing={self.hashing!r}, absorb={self.absorb!r}, "
            f"sparse={self.sparse}, out_dim={self.out_dim}"
        )

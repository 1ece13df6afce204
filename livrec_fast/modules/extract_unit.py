"""Target attention over what a search found: the second stage of SIM and TWIN."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .._checks import FLOATS, check_choice, check_same, check_tensor
from ..ops.search_rows import search_rows
from ._jagged import as_jagged, may_wait
from ._projected_attention import ProjectedAttention


class ExtractUnit(ProjectedAttention):
    r"""Attend from candidates to the items that a search found for them: an exact search unit.

    $o_c = \sum_{t \in S_c} w_t\, W^v_h x_t$ for each head h, with the weights of `TargetAttention`
    over $S_c$, the rows at the positions that a `SearchUnit` returned. Arguments, parameters and
    their names are those of `TargetAttention`; one can be loaded into the other.

    Consistent search, as in TWIN: `search_query` gives the query by which a dot product with the
    rows x themselves is the logit that this unit gives them, so that the search finds what
    attention would weigh most, $\langle W_k^\top q_h, x_t \rangle$. With several heads

    - "each" lets every head search by its own logits, and attend to its own k items (TWIN);
    - "sum" searches once, by the sum of all heads' logits, and all attend to the same k items: H
      times fewer rows to read.

    The query is detached: the projections learn by attention alone. Biases of logits and of keys
    take no part in it; the latter add the same to all items.

    Only found rows are gathered, best first, pair by pair of user and candidate; positions [B, 1,
    k] are gathered once per user, for all candidates. A candidate that found nothing gets zeros,
    unless out has a bias. Under torch.compile and on a GPU the rows are as many as positions, what
    is fill with a weight of 0, so that no host waits and no graph breaks.

    Source: SIM (search, then attention); TWIN (with the same projections); Moment&Cross, section
    2.4.

    Example:
        >>> search, extract = SearchUnit("dot_product", 100), ExtractUnit(64, 4)
        >>> query = extract.search_query(candidates, "sum")
        >>> positions = search(offsets, query=query, keys=history)  # [B, C, 100]
        >>> seen = extract(candidates, history, offsets, positions=positions)  # [B, C, 64]
    """

    def forward(
        self, candidates: Tensor, history: Any, offsets: Tensor | None = None, *,
        positions: Tensor, bias: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Attend to the rows found.

        Args:
            candidates: [B, C, dim], the parameters' dtype, or [B, dim], one each.
            history: [T, key_dim] with offsets, a nested tensor of layout torch.jagged, or
                torchrec's JaggedTensor: that which was searched.
            offsets: int64 or int32 [B + 1]; user u has the rows offsets[u] .. offsets[u + 1] - 1.
            positions: int64 [B, C, k] in the user's own history, -1 where nothing was found; [B, C,
                H, k] where every head has its own; C may be 1: shared by all candidates.
            bias: [T] or [T, H], added to the logits; -inf takes an item out.

        Returns:
            [B, C, out_dim] or [B, out_dim].

        Raises:
            TypeError, ValueError: what is wrong with which argument. IndexError: a position outside
            its history; looked at in eager mode on a CPU only, elsewhere it means nothing.
        """
        jagged = as_jagged("history", history, self.key_dim, offsets)
        x, offsets = jagged.values, jagged.offsets
        rows = self._rows(candidates, offsets.shape[0] - 1)
        self._check(candidates=rows, history=x)
        self._check_positions(positions, rows)
        bias = jagged.logits_bias(bias, self.heads)
        q = self.query(rows).unflatten(-1, (self.heads, self.head_dim))
        if positions.dim() == 3:
            out = self._extract(q, x, offsets, positions, bias, slice(None))
        else:
            each = [slice(h, h + 1) for h in range(self.heads)]
            out = torch.cat(
                [
                    self._extract(q[:, :, h], x, offsets, positions[:, :, h.start], bias, h)
                    for h in each
                ],
                2,
            )
        out = self.out(out.flatten(2))
        return out[:, 0] if candidates.dim() == 2 else out

    def search_query(self, candidates: Tensor, heads: str = "each") -> Tensor:
        """Return the queries whose dot products with the history's rows are this unit's logits.

        Args:
            candidates: [B, C, dim] or [B, dim].
            heads: "each", or "sum" for one query whose scores are the sums of the heads' logits.

        Returns:
            [B, C, H, key_dim] or [B, C, key_dim], detached, in the parameters' dtype, without
            autocast; C is 1 for candidates [B, dim].

        Raises:
            TypeError, ValueError: what is wrong with which argument.
        """
        check_choice("heads", heads, ("each", "sum"))
        rows = self._rows(candidates, "B")
        with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
            self._check(candidates=rows)
            q = self.scale * self.query(rows).unflatten(-1, (self.heads, self.head_dim))
            form = "bchd,hdn->bchn" if heads == "each" else "bchd,hdn->bcn"
            return torch.einsum(form, q, self._weight(self.key))

    def _rows(self, candidates: Any, users: int | str) -> Tensor:
        """Return candidates as [B, C, dim]."""
        single = isinstance(candidates, Tensor) and candidates.dim() == 2
        shape = (users, self.dim) if single else (users, "C", self.dim)
        check_tensor("candidates", candidates, shape, FLOATS)
        return candidates[:, None] if single else candidates

    def _check_positions(self, positions: Any, rows: Tensor) -> None:
        per_head = isinstance(positions, Tensor) and positions.dim() == 4
        B, C = rows.shape[:2]
        shared = isinstance(positions, Tensor) and positions.dim() > 1 and positions.shape[1] == 1
        pairs = (B, 1 if shared else C)
        shape = (*pairs, self.heads, "k") if per_head else (*pairs, "k")
        check_tensor("positions", positions, shape, (torch.int64,))
        check_same("device", candidates=rows, positions=positions)

    def _extract(
        self, q: Tensor, x: Tensor, offsets: Tensor, positions: Tensor, bias: Tensor | None,
        heads: slice,
    ) -> Tensor:  # fmt: skip
        """Attend with the queries [B, C, h, d] of some heads; positions [B, C or 1, k]."""
        rows, row_offsets, hidden = _found(positions, offsets, x.shape[0])
        if not x.shape[0]:  # fill needs a row to stand for it
            x, bias = functional.pad(x, (0, 0, 0, 1)), None
        found = x.index_select(0, rows)
        if bias is not None:
            bias = (bias if bias.dim() == 1 else bias[:, heads]).index_select(0, rows)
        if hidden is not None:  # what stands there belongs to others
            found = found.masked_fill(hidden[:, None], 0)
            bias = found.new_zeros(len(rows), dtype=torch.float32) if bias is None else bias
            bias = bias.masked_fill(hidden if bias.dim() == 1 else hidden[:, None], -torch.inf)
        pairs = q if positions.shape[1] != q.shape[1] else q.flatten(0, 1)[:, None]
        out = self._attend(pairs, found, row_offsets, bias, heads=heads)
        return out.view(*q.shape[:3], self.value_dim)


def _found(positions: Tensor, offsets: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return rows found and their offsets by list, and which are fill, if fill has rows, too."""
    if may_wait(positions):
        return *search_rows(positions, offsets), None
    B, C, k = positions.shape
    rows = (offsets[:-1, None, None] + positions).flatten().clamp(0, max(total - 1, 0))
    row_offsets = k * torch.arange(B * C + 1, device=positions.device)
    return rows, row_offsets, (positions < 0).flatten()

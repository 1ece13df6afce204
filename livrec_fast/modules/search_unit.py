"""Search of histories of any length for what to attend to: the first stage of SIM and TWIN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_choice, check_offsets, check_tensor
from ..ops.history_search import history_search, history_search_codes
from ._code_items import check_count
from ._jagged import as_jagged, may_wait

_NEEDS = {
    "latest": (),
    "dot_product": ("query",),
    "author": ("item_ids", "query_ids"),
    "long_view": ("item_bits", "required_bits"),
}


class SearchUnit(nn.Module):
    r"""Find the k items of each user's own history to attend to: a general search unit.

    - "latest": the most recent ones, for every candidate alike.
    - "dot_product": those with the greatest $\langle \mathrm{query}, \mathrm{key} \rangle$, from
      keys or straight from codes (soft search).
    - "author": those of the candidate's author, or of any other id (hard search).
    - "long_view": those that have all required bits, such as the one of a long view.

    "author" and "long_view" give the most recent first, or, where they get a query, the greatest
    dot product. Every kind takes every mask of `history_search` on top: "latest" with until, say,
    for what came before the candidate. Items that masks leave out, padding and other users' items
    are never found, none is found twice, and a history with fewer than k items has -1 behind them.

    No parameters, and no gradient, as positions are integers: search by what is learned elsewhere,
    such as by `ExtractUnit.search_query`.

    Source: Moment&Cross, section 2.4: V_short and V_mixed are "latest" and "long_view", V_long and
    V_livelong "dot_product", V_aidhard "author". SIM has hard and soft search.

    Example:
        >>> author = SearchUnit("author", 100)
        >>> positions = author(offsets, item_ids=authors, query_ids=author_of_candidate)
        >>> seen = ExtractUnit(64, 4)(candidates, history, offsets, positions=positions)
    """

    def __init__(
        self,
        kind: str,
        k: int,
        *,
        levels: Sequence[int] | None = None,
        prefix: bool = False,
        groups: Sequence[int] | None = None,
        hashing: str = "modulo",
        packed: bool = False,
        backend: str = "auto",
    ):
        """Say what to find.

        Args:
            kind: "latest", "dot_product", "author" or "long_view".
            k: how many.
            levels: of codes; this and what follows as in `history_search_codes`.
            prefix: the fields are the prefixes of one code.
            groups: how many fields each code has.
            hashing: "modulo", "murmur3" or "order_preserving".
            packed: codes come packed.
            backend: of the ops.
        """
        super().__init__()
        check_choice("kind", kind, tuple(_NEEDS))
        check_count("k", k, most=2**31 - 1)
        self.kind, self.k, self.backend = kind, k, backend
        self.codes: dict[str, Any] = {
            "levels": levels, "prefix": prefix, "groups": groups, "hashing": hashing,
            "packed": packed,
        }  # fmt: skip

    def forward(
        self, offsets: Tensor | None = None, *, query: Tensor | None = None, keys: Any = None,
        codes: Tensor | None = None, tables: Sequence[Tensor] | None = None,
        item_ids: Tensor | None = None, query_ids: Tensor | None = None,
        item_bits: Tensor | None = None, required_bits: int | Tensor | None = None,
        item_times: Tensor | None = None, since: int | Tensor | None = None,
        until: int | Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Search.

        Args:
            offsets: int64 [B + 1]; user u has the rows offsets[u] .. offsets[u + 1] - 1, oldest
                first. None where keys bring their own.
            query: [B, C, D], or [B, C, H, D]: every head searches by itself.
            keys: [T, D], query's dtype; or a nested tensor or torchrec's, as `TargetAttention`.
            codes: [T, F] instead of keys, with tables; as in `history_search_codes`.
            tables: F tensors [R_f, D].
            item_ids: [T] integers, with query_ids: only items of the candidate's id are found.
            query_ids: [B, C] integers; -1 finds nothing.
            item_bits: [T] integers, with required_bits: only items with all of these.
            required_bits: an int, or [B, C] integers.
            item_times: [T] integers, with since, until or both: since <= time < until.
            since: None, an int, or [B, C] integers.
            until: None, an int, or [B, C] integers.

        Returns:
            int64 [B, C, k], or [B, C, H, k]: positions in the user's own history, -1 where there is
            none left. C is 1 where neither a query nor a mask [B, C] tells it: a result for all
            candidates, which `ExtractUnit` reads once per user.

        Raises:
            TypeError, ValueError, IndexError: what is wrong with which argument.
        """
        masks = {
            "item_ids": item_ids, "query_ids": query_ids, "item_bits": item_bits,
            "required_bits": required_bits, "item_times": item_times, "since": since,
            "until": until,
        }  # fmt: skip
        self._check_kind(query, keys, codes, tables, masks)
        if query is None:
            return self._latest(offsets, {n: m for n, m in masks.items() if m is not None})
        given: dict[str, Any] = {"query": query, "offsets": offsets, "k": self.k}
        given |= {**masks, "backend": self.backend}
        if query.dim() == 4:  # heads are further candidates
            given["query"] = given["query"].flatten(1, 2)
            for name in ("query_ids", "required_bits", "since", "until"):
                if isinstance(mask := masks[name], Tensor):
                    given[name] = mask.repeat_interleave(query.shape[2], 1)
        if keys is not None:
            given["keys"], given["offsets"], *_ = as_jagged("keys", keys, query.shape[-1], offsets)
        else:
            given |= {"codes": codes, "tables": tables, **self.codes}
        with torch.no_grad():
            search = history_search_codes if keys is None else history_search
            _, positions = search(**given)
        return positions.view(*query.shape[:-1], self.k)

    def _check_kind(
        self, query: Any, keys: Any, codes: Any, tables: Any, masks: dict[str, Any]
    ) -> None:
        """Check that what the kind needs is given, and that what is searched by is whole."""
        for name in _NEEDS[self.kind]:
            if (query if name == "query" else masks[name]) is None:
                raise ValueError(f"{name}: needed by a search of kind {self.kind!r}, got none")
        for name, value in {"query": query, "keys": keys, "codes": codes, "tables": tables}.items():
            if value is not None and self.kind == "latest":
                raise ValueError(f"{name}: the latest are found without; got one")
            if value is not None and query is None:
                raise ValueError(f"{name}: needs query, got none")
        if query is None:
            return
        if not isinstance(query, Tensor):
            raise TypeError(f"query: must be a tensor, got {type(query).__name__}")
        if query.dim() not in (3, 4):
            raise ValueError(f"query: must be [B, C, D] or [B, C, H, D], got {list(query.shape)}")
        if (keys is None) == (codes is None):
            raise ValueError("keys: give these or codes, one of both")
        if (codes is None) != (tables is None):
            raise ValueError("tables: needed with codes, and with them alone")

    def _latest(self, offsets: Any, masks: dict[str, Any]) -> Tensor:
        """Find the latest; among what masks leave by a search whose scores are all 0."""
        check_tensor("offsets", offsets, ("B + 1",), (torch.int64,))
        if offsets.shape[0] < 1:
            raise ValueError("offsets: must have at least one element, got none")
        if not masks:
            lengths = offsets.diff()
            if may_wait(offsets):
                check_offsets(offsets, int(offsets[-1]))
            ranks = torch.arange(1, self.k + 1, device=offsets.device)
            return (lengths[:, None] - ranks).clamp(min=-1)[:, None]
        items = next((m for n, m in masks.items() if n.startswith("item_")), None)
        T = items.shape[0] if isinstance(items, Tensor) else 0
        asked = [m for n, m in masks.items() if not n.startswith("item_")]
        shape = next((m.shape for m in asked if isinstance(m, Tensor)), (offsets.shape[0] - 1, 1))
        made: dict[str, Any] = {"device": offsets.device}
        query, keys = torch.zeros(*shape, 1, **made), torch.zeros(T, 1, **made)
        _, positions = history_search(query, keys, offsets, self.k, **masks, backend=self.backend)
        return positions

    def extra_repr(self) -> str:
        """Describe the module in `print(module)`."""
        return f"{self.kind!r}, k={self.k}"

"""Target attention over histories of feature vectors, as a layer of a ranker."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import FLOATS, check_tensor
from ._jagged import Jagged, as_jagged
from ._projected_attention import ProjectedAttention


class TargetAttention(ProjectedAttention):
    r"""Attend from candidates to their user's history, with projections of both.

    Head h computes $o_c = \sum_t w_t\, W^v_h x_t$ with the logits
    $z_t = s\, \langle W^q_h c, W^k_h x_t \rangle + b_t$ and $w_t = \mathrm{softmax}_t(z_t)$, or
    another activation of $z_t$; the heads side by side, projected by W_o where there is an out_dim.

    As keys and values are linear in x, the projections may go elsewhere, which is exact, too:

    - absorb "none": $K = X W_k^\top$ and $V = X W_v^\top$, then attention. Costs two products of
      the whole history with dim x d, and their memory.
    - absorb "query": $\langle q, W_k x \rangle = \langle W_k^\top q, x \rangle$ and
      $\sum_t w_t W_v x_t = W_v \sum_t w_t x_t$: `target_attention_features`, which attends
      over the rows x themselves. Costs key_dim instead of d per row, head and candidate, and no
      memory per row. It is what pays for few candidates per user.

    Both have the same parameters. The history may be jagged, padded, nested or torchrec's; padding
    takes no part: on a CPU it is dropped, under torch.compile and on a GPU it has a weight of 0.
    A user without history gets zeros, unless out has a bias.

    Projections start as `xavier_uniform_` has it, biases at 0. Works under autocast,
    DistributedDataParallel and torch.compile. What else it computes is `target_attention`'s: its
    numerics, its bits and its workspace, or `target_attention_features`'s.

    Source: Moment&Cross, section 2.4 (the exact search unit); SIM and TWIN, where it follows a
    search (`ExtractUnit`).

    Example:
        >>> unit = TargetAttention(64, 4)
        >>> seen = unit(candidates, history, offsets)  # [B, C, 64], [T, 64] -> [B, C, 64]
        >>> seen = unit(candidates, padded, lengths=lengths)  # [B, L, 64]
        >>> seen = unit(candidates, torch.nested.nested_tensor(each, layout=torch.jagged))
    """

    def forward(
        self, candidates: Any, history: Any, offsets: Tensor | None = None, *,
        lengths: Tensor | None = None, mask: Tensor | None = None, bias: Tensor | None = None,
        candidate_offsets: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Attend to the histories.

        Args:
            candidates: [B, C, dim], the parameters' dtype: C candidates for each of B users; [B,
                dim], one each; or jagged: [Q, dim] with candidate_offsets, a nested tensor, or
                torchrec's JaggedTensor.
            history: [T, key_dim] with offsets or lengths, the items of all users one after the
                other; [B, L, key_dim], padded to a length, with lengths, a mask or neither;
                a nested tensor of layout torch.jagged; torchrec's JaggedTensor or KeyedJaggedTensor
                of one key, whose weights are not read.
            offsets: int64 or int32 [B + 1]; user u has the rows offsets[u] .. offsets[u + 1] - 1.
            lengths: integers [B]; of a padded history the first lengths[u] rows are u's items.
            mask: bool [B, L], true where a padded row is an item.
            bias: [T] or [B, L], or with H behind, added to the logits; -inf takes an item out.
            candidate_offsets: int64 or int32 [B + 1], as offsets, of jagged candidates.

        Returns:
            [B, C, out_dim], [B, out_dim] or [Q, out_dim]; a nested tensor for nested candidates.

        Raises:
            TypeError, ValueError: what is wrong with which argument.
        """
        jagged = as_jagged("history", history, self.key_dim, offsets, lengths, mask)
        q, q_offsets = self._query(candidates, candidate_offsets, jagged)
        bias = jagged.logits_bias(bias, self.heads)
        out = self._attend(q, jagged.values, jagged.offsets, bias, q_offsets)
        out = self.out(out.flatten(-2))
        if isinstance(candidates, Tensor) and candidates.is_nested:
            nested: Tensor = torch.nested.nested_tensor_from_jagged(out, q_offsets)
            return nested
        whole = q_offsets is None and candidates.dim() == 2
        return out[:, 0] if whole else out

    def _query(
        self, candidates: Any, offsets: Tensor | None, history: Jagged
    ) -> tuple[Tensor, Tensor | None]:
        """Return queries [B, C, H, d], or [Q, H, d] with offsets; check candidates and dtypes."""
        jagged = offsets is not None or not isinstance(candidates, Tensor) or candidates.is_nested
        if jagged:
            rows, offsets, *_ = as_jagged("candidates", candidates, self.dim, offsets)
            check_tensor("candidate_offsets", offsets, history.offsets.shape, (torch.int64,))
        else:
            users = history.offsets.shape[0] - 1
            shape = (users, self.dim) if candidates.dim() == 2 else (users, "C", self.dim)
            check_tensor("candidates", candidates, shape, FLOATS)
            rows = candidates[:, None] if candidates.dim() == 2 else candidates
        self._check(candidates=rows, history=history.values)
        return self.query(rows).unflatten(-1, (self.heads, self.head_dim)), offsets

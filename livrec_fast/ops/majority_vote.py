"""Majority voting: the codes of a room from those of its slices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import (
    INTEGERS,
    check_choice,
    check_codes,
    check_levels,
    check_offsets,
    check_same,
    check_tensor,
)
from .._dispatch import Backend, Op, refuse_cuda, refuse_native
from ..reference import majority_vote as reference


def _check_values(codes: Tensor, offsets: Tensor, levels: Sequence[int], rule: str) -> None:
    check_offsets(offsets, codes.shape[0])
    check_codes(codes, levels, least=-1)


def _refuse_native(codes: Tensor, offsets: Tensor, levels: Sequence[int], rule: str) -> str | None:
    if codes.shape[0] >= 2**32 - 1:
        return "counts in 32 bits: T must be below 2^32 - 1"
    return refuse_native(codes)


def _refuse_cuda(codes: Tensor, offsets: Tensor, levels: Sequence[int], rule: str) -> str | None:
    if rule != "per_level":
        return "votes by rule 'per_level' only"
    if codes.dtype not in (torch.uint8, torch.int16, torch.int32):
        return "takes codes of uint8, int16 or int32"
    if codes.shape[0] >= 2**31:
        return "counts positions in 32 bits: T must be below 2^31"
    if len(levels) > 32 or sum(levels) > 12288:
        return "counts in shared memory: at most 32 levels, 12,288 codewords in all"
    return refuse_cuda(codes)


_op = Op(
    "majority_vote",
    "(Tensor codes, Tensor offsets, int[] levels, str rule) -> Tensor",
    fake=lambda codes, offsets, levels, rule: codes.new_empty(
        (offsets.shape[0] - 1, len(levels)), dtype=reference.vote_dtype(levels)
    ),
    reference=reference.majority_vote,
    check_values=_check_values,
    backends=(Backend("native", _refuse_native), Backend("cuda", _refuse_cuda)),
    differentiable=False,
)


def majority_vote(
    codes: Tensor,
    offsets: Tensor,
    levels: Sequence[int],
    *,
    rule: str = "per_level",
    backend: str = "auto",
) -> Tensor:
    r"""Give each history, per level, the most frequent codeword of its slices.

    $v_l = \arg\max_c |\{t \in S_l : c_{tl} = c\}|$, where $S_l$ is the whole history (rule
    "per_level") or its slices with $(c_{t1}, ..., c_{t,l-1}) = (v_1, ..., v_{l-1})$ (rule "path").

    In PyTorch, for one history and level, but for ties::

        votes = torch.bincount(codes[first:last, level], minlength=levels[level])
        voted = votes.argmax()

    Args:
        codes: [T, L] integers in the order in which they were seen, column l in [-1, N_l); -1 is an
            unknown code, which casts no vote.
        offsets: int64 [B + 1]: slices offsets[b] to offsets[b + 1] - 1 are history b.
        levels: (N_1, ..., N_L), 1 <= N_l <= 2^31.
        rule: "per_level" votes every level by itself, so that the voted tuple may be one that no
            slice has; "path" gives one that some slice has, as far as it is known.
        backend: "auto", "native", "cuda" or "reference".

    Returns:
        [B, L]: int16 where every N_l <= 32,767, else int32. A level without votes gets -1: an empty
        history at every level; by "path", also all levels after one that got -1.

    Ties go to the codeword seen last (the largest position). Exact and deterministic: the same for
    any number of threads. Not differentiable.

    Workspace: O(T) integers, whatever the sizes N_l. With "native", per thread 16 bytes for each
    codeword of the largest level that has at most max(65,536, 2 T_b), where T_b is the longest
    history; at most 24 T_b bytes more where a level is larger, and 4 T_b by rule "path". None with
    "cuda".

    Backends: "native" (CPU) takes T below 2^32 - 1; it reads the codes as they lie, strided or not.
    "cuda" takes rule "per_level" and levels of 12,288 codewords in all.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape, level, rule or offset.
        IndexError: a code out of range. With "cuda", where telling would stall the stream, such a
        code casts no vote and a bad offset counts as the nearest in [0, T].

    Source: FLUID, section 3.2 (room-level codes); "path" answers section 3.3, by which a code has
    no meaning outside its prefix.

    Example:
        >>> room = majority_vote(slices, offsets, (64, 64, 64, 64), rule="path")  # [B, 4]
    """
    sizes = check_levels(levels, most=2**31)
    check_tensor("codes", codes, ("T", len(sizes)), INTEGERS)
    check_tensor("offsets", offsets, ("B + 1",), (torch.int64,))
    if offsets.shape[0] < 1:
        raise ValueError("offsets: must have at least one element, got none")
    check_same("device", codes=codes, offsets=offsets)
    check_choice("rule", rule, ("per_level", "path"))
    return _op(codes, offsets, sizes, rule, backend=backend)

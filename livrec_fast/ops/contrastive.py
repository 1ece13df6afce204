"""In-batch contrastive loss (InfoNCE) with masked false negatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import FLOATS, check_choice, check_one_dtype, check_same, check_tensor
from .._dispatch import Backend, Op, refuse_triton, refuse_wide
from ..reference import contrastive as reference
from ..reference._formula import wide_dtype
from . import _contrastive as checks


def _check_values(
    query: Tensor,
    key: Tensor,
    temperature: Tensor,
    normalize: bool,
    symmetric: bool,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    group_ids: Tensor | None,
    false_negative_threshold: float | None,
    pair_vectors: Tensor | None,
    keep_pairs: bool,
    keep_products: int,
    log_q: Tensor | None,
    log_q_rule: str,
    valid: Tensor | None,
    *rest: object,
) -> None:
    checks.check_temperature(temperature)
    checks.check_log_q(log_q, log_q_rule, query.shape[0], valid)


def _fake(
    query: Tensor,
    key: Tensor,
    temperature: Tensor,
    normalize: bool,
    symmetric: bool,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    group_ids: Tensor | None,
    false_negative_threshold: float | None,
    pair_vectors: Tensor | None,
    keep_pairs: bool,
    keep_products: int,
    log_q: Tensor | None,
    log_q_rule: str,
    valid: Tensor | None,
    extra_keys: Tensor | None,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch = query.shape[0]
    compared = batch if pair_vectors is None else pair_vectors.shape[0]
    pairs = checks.kept_shape(batch, compared, false_negative_threshold, keep_pairs)
    keys = batch + (0 if extra_keys is None else extra_keys.shape[0])
    rows = reference.rows_kept(batch, keys, keep_products)
    sums = 1 + symmetric + (log_q_rule == reference.UNSAMPLED)  # the last: a row's weight
    return (
        query.new_empty((batch,), dtype=wide_dtype(query.dtype)),
        query.new_empty((sums, batch), dtype=torch.float64),
        query.new_empty(pairs, dtype=torch.int64),
        query.new_empty((rows, keys), dtype=torch.float32),
    )


def _refuse_tiles(query: Tensor, *rest: Any) -> str | None:
    if _named((query, *rest))["keep_products"]:
        return "keeps no products"
    if query.dtype == torch.float64:
        return "computes in float32; queries are float64"
    return refuse_triton(query)


def _named(args: Sequence[Any]) -> dict[str, Any]:
    return dict(zip((argument.name for argument in _op.schema.arguments), args, strict=True))


def _triton(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from ..kernels import contrastive

    given = _named(args)
    del given["keep_products"]  # it is 0
    extra_keys = given["extra_keys"]
    keys = len(given["key"]) + (0 if extra_keys is None else len(extra_keys))
    no_products = args[0].new_empty((0, keys), dtype=torch.float32)
    return *contrastive.in_batch_contrastive(**given), no_products


def _triton_backward(
    grads: Sequence[Tensor | None], *args: Any, outputs: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor]:
    from ..kernels import contrastive_gradient as kernels

    given = _named(args)
    tensors = [name for name, value in given.items() if isinstance(value, Tensor)]
    wanted = [name for name, need in zip(tensors, needs, strict=True) if need]
    _, lse, pairs, _ = outputs
    del given["keep_products"]
    found = kernels.in_batch_contrastive_gradient(grads[0], lse, pairs, wanted=wanted, **given)
    return [found[name] for name in wanted]


_op = Op(
    "in_batch_contrastive",
    "(Tensor query, Tensor key, Tensor temperature, bool normalize, bool symmetric, "
    "Tensor? query_ids, Tensor? key_ids, Tensor? group_ids, float? false_negative_threshold, "
    "Tensor? pair_vectors, bool keep_pairs, int keep_products, Tensor? log_q, str log_q_rule, "
    "Tensor? valid, Tensor? extra_keys, str precision) "
    "-> (Tensor losses, Tensor lse, Tensor pairs, Tensor products)",
    fake=_fake,
    reference=reference.in_batch_contrastive,
    check_values=_check_values,
    backends=(
        Backend("native", refuse_wide, backward=None),
        Backend("triton", _refuse_tiles, _triton, _triton_backward),
    ),
    autocast=("query", "key", "pair_vectors", "extra_keys"),
)


def in_batch_contrastive(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    normalize: bool = True,
    symmetric: bool = False,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    group_ids: Tensor | None = None,
    false_negative_threshold: float | None = None,
    pair_vectors: Tensor | None = None,
    log_q: Tensor | None = None,
    log_q_rule: str = "standard",
    weights: Tensor | None = None,
    valid: Tensor | None = None,
    extra_keys: Tensor | None = None,
    precision: str | None = None,
    keep_products: bool = False,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    r"""Contrast each query's own key with the other keys of the batch, less the false negatives.

    $\ell_i = \log \sum_{j \notin m_i} e^{s_{ij}} - \frac{1}{|P_i|} \sum_{p \in P_i} s_{ip},\quad
    s_{ij} = \langle q_i, k_j \rangle / T - \log Q_j$, with $q, k$ of unit length where `normalize`,
    and the positives $P_i = \{i\}$, or i and the other keys of its group.

    With log_q_rule="unsampled_positive", where the positive, which is always there, is no sample:
    $\ell_i = w_i (\log N_i - s_{ii}),\ N_i = \sum_{j \notin m_i, j \ne i} e^{s_{ij}},\
    s_{ij} = \langle q_i, k_j \rangle / T - [j \ne i] \log \frac{Q_j}{1 - Q_i}$, with the constant
    $w_i = 1 - e^{s_{ii}} / (e^{s_{ii}} + N_i / n_i)$ for $n_i$ negatives: what the model misses.

    In PyTorch, without masks::

        logits = F.normalize(query, dim=1) @ F.normalize(torch.cat([key, extra_keys]), dim=1).T
        loss = F.cross_entropy(logits / temperature - log_q, torch.arange(len(query)))

    Args:
        query: [B, D] float32, float16, bfloat16 or float64.
        key: [B, D], query's dtype; key i is the positive of query i, the others are its negatives.
        temperature: T > 0, a float, or a 0-d floating tensor that may want a gradient.
        normalize: divide queries and keys by max(norm, 1e-12), as F.normalize does.
        symmetric: average with the loss of the other direction, where key i picks its query among
            the batch's queries by the same mask; log_q and extra_keys have no part in it.
        query_ids: int64 [B], or [B + E] with those of the extra keys' queries; key j is no negative
            of row i where query_ids[j] == query_ids[i].
        key_ids: int64 [B], or [B + E] with those of the extra keys; likewise where they are equal.
        group_ids: int64 [B], or [B + E]; valid keys of row i's group are positives like its own,
            whatever masks say, and in the other direction the queries of key i's group.
        false_negative_threshold: where the cosine of queries i and j is greater, neither key is a
            negative of the other's row. In float32, whatever `normalize`; it has no gradient.
        pair_vectors: [B, P], or [B + E, P] with those of the extra keys, query's dtype: compared
            instead of the queries. Without them no extra key is a false negative.
        log_q: [B] or [B + E] float32 (or float64), the log of each key's sampling probability,
            which every logit loses, the positive's too. [B] means 0 for the extra keys.
        log_q_rule: "standard", or "unsampled_positive" as above, which needs a negative log_q of
            the batch's keys, and one positive a row.
        weights: [B] float32 (or float64), not negative.
        valid: bool [B]; False takes row i and key i out, whatever they hold, NaN included.
        extra_keys: [E, D], query's dtype: more negatives for every row, such as a memory queue.
        precision: "bf16" rounds unit vectors (or those given) to bfloat16, and in the C++ kernel at
            the levels avx512_bf16 and amx what the gradient multiplies them with; sums stay in
            float32.
            bfloat16 inputs take the same path, float64 stays as it is.
        keep_products: where a gradient is wanted, the C++ kernel keeps the products of queries with
            keys, of the first rows, 64 MiB at most (all rows of B = 4,096): of four matrix products
            one less. For processes that keep the memory that they free; where each step asks the
            system for it anew, it costs as much as it saves, or more. The bits are the same.
        reduction: "mean" is sum(w_i loss_i) / sum(w_i) over valid rows, or 0 where sum(w_i) is 0;
            "sum" is sum(w_i loss_i); "none" is w_i loss_i, [B].
        backend: "auto", "native", "triton" or "reference".

    Returns:
        0-d, or [B] for "none"; float64 for float64 inputs, else float32.

    A mask never hides a row's positives. A valid row whose negatives are all masked has loss
    and gradient exactly 0 and counts in the mean; an invalid row has both 0 and does not count.
    B = 0 gives a mean of 0; E = 0 is no extra keys. Differentiable once, in query, key, extra_keys,
    log_q, weights and temperature. The gradient of a row of zeros is F.normalize's: finite, but
    1e12 times that of its direction, which float16 cannot hold.

    Numerics: unit vectors are rounded to the inputs' dtype; all after them is in float32, or in
    float64 for float64 inputs (the reference also rounds products to the inputs' dtype: without
    `normalize`, one past 65,504 overflows in float16). A softmax less its greatest logit takes any
    temperature, and a small loss keeps its digits. A cosine within rounding of the threshold may
    fall on either side, for both rows of the pair alike, and as in the gradient. The same inputs
    give the same bits on every run, of the C++ kernel for any number of threads. Autocast casts
    query, key and extra_keys; temperature and log_q stay.

    Workspace: of the C++ kernel 4 D' (2 B + E) bytes, with D' = D rounded up to an odd multiple of
    16, as much again in the gradient, and where it multiplies bfloat16; a bit per pair compared
    where these are at most 2^28 (false negatives are found anew in both passes where they are
    more); the products, if kept; with a threshold 4 P' for each vector compared (P' as D'), unless
    these are the normalised float32 queries themselves; and per thread about 512 (D + P) + 110,000
    bytes. Of the reference: about six float32 matrices and five boolean ones of B x (B + E), and as
    much again in the gradient. Threads: one for every 256 keys, at most 32. The Triton kernels hold
    the units of both sides, too, partial sums of at most 16 parts, and bits of pairs as above or at
    most 32 MiB of them; they round weights to 16 bits where units are, but for the temperature's
    gradient.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape, device or choice, or a
        temperature that is not positive and finite, or a valid row's log_q that is not finite, or
        not negative where the rule wants it so. BackendError: the named backend cannot run this.

    Source: FLUID, section 3.1.3 (query-to-item InfoNCE with false-negative masking); LARM, section
    2.2.1 (user and author towers); Moment&Cross, section 2.4 (aligning four searched sequences).
    Groups: L_out of "Supervised Contrastive Learning" (2020). The unsampled positive: "Correcting
    the LogQ Correction: Revisiting Sampled Softmax for Large-Scale Retrieval" (2025).

    Example:
        >>> loss = in_batch_contrastive(users, rooms, key_ids=room_ids, temperature=0.05)
        >>> loss.backward()
    """
    check_tensor("query", query, ("B", "D"), FLOATS)
    batch, dim = query.shape
    if dim < 1:
        raise ValueError(f"query: D must be at least 1, got shape {list(query.shape)}")
    check_tensor("key", key, (batch, dim), FLOATS)
    if extra_keys is not None:
        check_tensor("extra_keys", extra_keys, ("E", dim), FLOATS)
    keys = batch + (0 if extra_keys is None else extra_keys.shape[0])
    for name, ids in (("query_ids", query_ids), ("key_ids", key_ids), ("group_ids", group_ids)):
        checks.check_vector(name, ids, (batch, keys), (torch.int64,))
    checks.check_vector("log_q", log_q, (batch, keys), checks.WIDE)
    checks.check_vector("weights", weights, (batch,), checks.WIDE)
    checks.check_vector("valid", valid, (batch,), (torch.bool,))
    checks.check_pair_vectors(pair_vectors, (batch, keys))
    check_one_dtype(query=query, key=key, pair_vectors=pair_vectors, extra_keys=extra_keys)
    checks.check_flags(normalize=normalize, symmetric=symmetric, keep_products=keep_products)
    checks.check_rule(log_q_rule, log_q, group_ids)
    threshold = checks.check_threshold(false_negative_threshold)
    lowered = checks.precision_of(precision)
    check_choice("reduction", reduction, checks.REDUCTIONS)
    scale = checks.as_tensor(temperature, query)
    check_same(
        "device", query=query, key=key, temperature=scale, query_ids=query_ids, key_ids=key_ids,
        group_ids=group_ids, pair_vectors=pair_vectors, log_q=log_q, weights=weights, valid=valid,
        extra_keys=extra_keys,
    )  # fmt: skip
    compared = None if pair_vectors is None or threshold is None else pair_vectors.detach()
    kept = threshold is not None and checks.keeps_pairs(
        batch, batch if compared is None else compared.shape[0]
    )
    before = (
        query, key, scale, normalize, symmetric, query_ids, key_ids, group_ids, threshold, compared,
        kept,
    )  # fmt: skip
    after = (log_q, log_q_rule, valid, extra_keys, lowered)
    wanted = (query, key, scale, log_q, extra_keys)
    products = checks.products_kept(*wanted) if keep_products else 0
    if products and _op.choose((*before, 0, *after), backend) != "native":
        products = 0
    losses, _, _, _ = _op(*before, products, *after, backend=backend)
    return checks.reduce(losses, weights, valid, reduction)

"""What else trains by in-batch negatives: torch's cross entropies, and libraries' losses.

Most make all B x B logits, and are absent where these would take more than half of the memory, or
8 GiB on a CPU. `F.linear_cross_entropy` and sentence-transformers' cached loss compute them in
chunks, the first as it chooses by default, the second as a trial finds quickest. No library masks
by the queries.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from livrec_fast.benchmarking import Absent, Contestant, Options

from . import peers
from .peers import Inputs, Noted, Run

Loss = Callable[[Tensor, Tensor], Tensor]
_INFINITY = float("inf")
MOST_BYTES = 8 * 2**30  # of a CPU's memory
CHUNKS = (256, 1_024, 4_096)  # rows of sentence-transformers' mini-batches, by trial
MOST_CACHED = 32_768  # rows for which its cached loss takes less than a minute on a CPU
TRIAL_ROWS = 8_192


class Setting(NamedTuple):
    """What a case computes."""

    rows: int
    training: bool
    temperature: float
    threshold: float | None
    symmetric: bool
    dtype: torch.dtype

    @property
    def plain(self) -> bool:
        """Whether nothing is masked and all is in float32, as the libraries have it."""
        return self.threshold is None and self.dtype == torch.float32


def too_large(options: Options, pairs: float, bytes_each: int) -> str | None:
    """Return why what is held for each pair of rows, as measured, is more than there is room."""
    if options.device == "cuda":
        room = torch.cuda.mem_get_info()[1] / 2 if torch.cuda.is_available() else 0
    else:
        room = min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2, MOST_BYTES)
    needed = pairs * bytes_each
    if needed <= room:
        return None
    return f"needs {needed / 2**30:,.0f} GiB for all pairs of rows"


def cross_entropy(
    query: Tensor, key: Tensor, temperature: float, threshold: float | None, symmetric: bool
) -> Tensor:
    """Compute the loss as torch has it, masked logits -inf."""
    query, key = (F.normalize(x.float(), dim=1).to(x.dtype) for x in (query, key))
    logits = (query @ key.T).float() / temperature
    if threshold is not None:
        similar = (query.detach() @ query.detach().T > threshold).fill_diagonal_(False)
        logits = logits.masked_fill(similar, -_INFINITY)
    own = torch.arange(len(query), device=query.device)
    loss = F.cross_entropy(logits, own)
    return (loss + F.cross_entropy(logits.T, own)) / 2 if symmetric else loss


def linear_cross_entropy(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    """Compute the loss with keys as the weight of a linear layer."""
    own = torch.arange(len(query), device=query.device)
    query, key = F.normalize(query, dim=1) / temperature, F.normalize(key, dim=1)
    return F.linear_cross_entropy(query, key, own, options=torch.nn.LinearCrossEntropyOptions())


def training(loss: Loss, inputs: Inputs, with_gradients: bool) -> Run:
    """Return a run: the loss, or with the gradients of query and key."""
    query, key = (inputs[n].detach().requires_grad_(with_gradients) for n in ("query", "key"))

    def run() -> Any:
        found = loss(query, key)
        return [found, *torch.autograd.grad(found, (query, key))] if with_gradients else [found]

    return run


def both_ways(loss: Loss, symmetric: bool) -> Loss:
    """Return a loss of one direction, or the mean of both."""
    return (lambda q, k: (loss(q, k) + loss(k, q)) / 2) if symmetric else loss


def contestants(setting: Setting, options: Options) -> Iterator[Contestant | Absent]:
    """Yield all peers of a case but those of GPUs."""
    yield from of_torch(setting, options)
    metric, sentences = "pytorch-metric-learning", "sentence-transformers"
    pairs = setting.rows**2

    def measured(kind: str) -> Callable[[], Loss]:
        return lambda: metric_learning(setting, kind, options.device)

    for name, needed, bytes_each, make in (
        (metric, pairs, 46, measured("SupCon")),
        (f"{metric}, NTXentLoss", pairs * setting.rows, 18, measured("NTXent")),
        ("info-nce-pytorch", pairs, 13, lambda: info_nce(setting)),
        (sentences, pairs, 18, lambda: ranking(setting)),
    ):
        yield library(name, needed, bytes_each, setting, options, make)
    name = f"{sentences}, cached"
    if reason := absence(sentences, setting, options):
        yield Absent(name, reason)
    elif options.device == "cpu" and setting.rows > MOST_CACHED:
        yield Absent(name, f"takes more than a minute for more than {MOST_CACHED:,} rows")
    else:
        yield Contestant(name, lambda inputs: cached_ranking(setting, inputs))


def of_torch(setting: Setting, options: Options) -> Iterator[Contestant | Absent]:
    """Yield torch's cross entropies."""
    rows, with_gradients, *given, dtype = setting

    def plain(query: Tensor, key: Tensor) -> Tensor:
        return cross_entropy(query, key, *given)

    def compiled(inputs: Inputs) -> Run:
        function = torch.compile(peers.fresh(cross_entropy), dynamic=False, fullgraph=True)
        run = training(lambda q, k: function(q, k, *given), inputs, with_gradients)
        run()
        return run

    def chunked(inputs: Inputs) -> Run:
        return training(
            lambda q, k: linear_cross_entropy(q, k, setting.temperature), inputs, with_gradients
        )

    if large := too_large(options, rows**2, 13):
        yield Absent("torch eager, plain", large)
    else:
        yield Contestant("torch eager, plain", lambda made: training(plain, made, with_gradients))
    large = too_large(options, rows**2, 6)
    if large or peers._lacks_compiler(options):
        yield Absent("torch.compile", large or "torch.compile needs a C++ compiler on a CPU")
    else:
        yield Contestant("torch.compile", compiled)
    if not setting.plain or setting.symmetric:
        reason = "F.linear_cross_entropy: one way, without masks, all of it in the inputs' dtype"
        yield Absent("F.linear_cross_entropy", reason)
    elif not hasattr(F, "linear_cross_entropy"):
        yield Absent("F.linear_cross_entropy", "this torch has no F.linear_cross_entropy")
    else:
        yield Contestant("F.linear_cross_entropy", chunked)


MODULES = {
    "pytorch-metric-learning": "pytorch_metric_learning",
    "info-nce-pytorch": "info_nce",
    "sentence-transformers": "sentence_transformers",
}


def absence(package: str, setting: Setting, options: Options) -> str | None:
    """Return why a library cannot take part."""
    if not setting.plain:
        return f"{package}: without masks by the queries, all of it in the inputs' dtype"
    return peers.absence(MODULES[package], package, options, cpu_only=options.device == "cpu")


def library(
    name: str, pairs: int, bytes_each: int, setting: Setting, options: Options,
    make: Callable[[], Loss],
) -> Contestant | Absent:  # fmt: skip
    """Return a loss that holds something for each pair, or why not."""
    reason = absence(name.partition(",")[0], setting, options)
    if reason := reason or too_large(options, pairs, bytes_each):
        return Absent(name, reason)
    return Contestant(name, lambda inputs: training(make(), inputs, setting.training))


def metric_learning(setting: Setting, kind: str, device: str) -> Loss:
    """Return its NTXentLoss, or SupConLoss, which is the same where no two rows share a label.

    The first holds B x B x B numbers, the second B x B.
    """
    from pytorch_metric_learning import losses, reducers

    mean = reducers.MeanReducer()  # the default of one leaves out losses of 0
    module = getattr(losses, f"{kind}Loss")(temperature=setting.temperature, reducer=mean)
    labels = torch.arange(setting.rows, device=device)
    other = labels.clone()  # the same tensor would mean the same rows

    def loss(query: Tensor, key: Tensor) -> Tensor:
        found: Tensor = module(query, labels, ref_emb=key, ref_labels=other)
        return found

    return both_ways(loss, setting.symmetric)


def info_nce(setting: Setting) -> Loss:
    """Return its loss with the other rows' keys as negatives."""
    from info_nce import InfoNCE

    return both_ways(InfoNCE(temperature=setting.temperature), setting.symmetric)


def ranking_settings(setting: Setting) -> dict[str, Any]:
    """Return the arguments of sentence-transformers' losses."""
    both = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    return {"scale": 1 / setting.temperature} | (both if setting.symmetric else {})


def ranking(setting: Setting) -> Loss:
    """Return sentence-transformers' loss of embeddings."""
    from sentence_transformers.sentence_transformer import losses

    module = losses.MultipleNegativesRankingLoss(torch.nn.Identity(), **ranking_settings(setting))

    def loss(query: Tensor, key: Tensor) -> Tensor:
        found: Tensor = module.compute_loss_from_embeddings([query, key], None)
        return found

    return loss


def cached_ranking(setting: Setting, inputs: Inputs) -> Run:
    """Prepare sentence-transformers' cached loss of embeddings, which is its second stage."""
    from sentence_transformers.sentence_transformer import losses

    def prepared(made: Inputs, chunk: int) -> Run:
        module = losses.CachedMultipleNegativesRankingLoss(
            torch.nn.Sequential(torch.nn.Identity()),  # it looks at the model's first module
            mini_batch_size=chunk,
            **ranking_settings(setting),
        )
        leaves = [made[n].detach().requires_grad_(setting.training) for n in ("query", "key")]

        def run() -> Any:
            for leaf in leaves:
                leaf.grad = None
            reps = [[leaf] for leaf in leaves]
            found = module.calculate_loss(reps, with_backward=setting.training)
            return [found, *(leaf.grad for leaf in leaves)] if setting.training else [found]

        return run

    some = {name: value[:TRIAL_ROWS] for name, value in inputs.items()}
    chunks = {f"chunks of {c:,}": c for c in CHUNKS if c <= setting.rows} or {"": setting.rows}
    ways = {note: prepared(some, chunk) for note, chunk in chunks.items()}
    note = peers.quickest(inputs["query"].device.type, ways)
    return Noted(prepared(inputs, chunks[note]), note)

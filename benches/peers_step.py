"""One step of k-means, and whole fits of one level, in torch and by the libraries of CPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from livrec_fast.benchmarking import Absent, Contestant, Options

from .peers import Inputs, Noted, Run, absence, in_blocks, quickest
from .peers_encode import assignment, superkmeans_absence

Step = tuple[Tensor, Tensor, Tensor]


def nearest(x: Tensor, codebook: Tensor) -> Tensor:
    """argmin_j |x - C[j]|^2."""
    return (x @ codebook.T - codebook.square().sum(1) / 2).argmax(1)


def sums_by_index_add(x: Tensor, codes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Add up the rows of each code, and count them."""
    sums = x.new_zeros(size, x.shape[1]).index_add(0, codes, x)
    return sums, x.new_zeros(size).index_add(0, codes, x.new_ones(len(x)))


def sums_by_scatter(x: Tensor, codes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """As `sums_by_index_add`; torch has its own kernel for an expanded index."""
    sums = x.new_zeros(size, x.shape[1]).scatter_add_(0, codes[:, None].expand_as(x), x)
    return sums, codes.bincount(minlength=size).to(x.dtype)


def sums_by_product(x: Tensor, codes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """As `sums_by_index_add`, by a matrix product: quick for few codes."""
    member = x.new_zeros(size, len(x)).scatter_(0, codes[None], 1.0)
    return member @ x, member.sum(1)


SUMS = {"index_add": sums_by_index_add, "scatter": sums_by_scatter, "product": sums_by_product}


def step_by_index_add(x: Tensor, codebook: Tensor) -> Step:
    """The step as it is mostly written."""
    codes = nearest(x, codebook)
    return (codes, *sums_by_index_add(x, codes, len(codebook)))


def added(parts: Sequence[Step]) -> Step:
    """Join the steps of blocks of rows."""
    codes, sums, mass = zip(*parts, strict=True)
    return torch.cat(codes), torch.stack(sums).sum(0), torch.stack(mass).sum(0)


def step_ways(codebook: Tensor) -> dict[str, Callable[[Tensor], Step]]:
    """Return the step of a block of rows with each way to add; the product only for few codes."""

    def way(
        add: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]],
    ) -> Callable[[Tensor], Step]:
        def step(x: Tensor) -> Step:
            codes = nearest(x, codebook)
            return (codes, *add(x, codes, len(codebook)))

        return step

    few = len(codebook) <= 1024
    return {name: way(add) for name, add in SUMS.items() if few or name != "product"}


def eager_in_blocks(options: Options) -> Contestant:
    """Return eager torch over blocks of rows, adding the quickest way."""

    def prepare(inputs: Inputs) -> Run:
        ways = step_ways(inputs["codebook"])
        return in_blocks(ways, inputs["x"], options, added, whole=False)

    return Contestant("torch eager, chunked", prepare)


def with_sums(search: Callable[[Tensor], Tensor], inputs: Inputs, options: Options) -> Noted:
    """Return a library's search followed by the quickest of our sums."""
    x, size = inputs["x"], len(inputs["codebook"])
    few, codes = x[:65_536], search(x[:65_536])
    ways = {name: (lambda add=add: add(few, codes, size)) for name, add in SUMS.items()}
    if size > 1024:
        del ways["product"]
    note = quickest(options.device, ways)

    def run() -> Step:
        codes = search(x)
        return (codes, *SUMS[note](x, codes, size))

    return Noted(run, note)


def faiss_step(options: Options) -> Contestant | Absent:
    """Return faiss's exact index, and the quickest of our sums."""
    name = "faiss search, our sums"
    if reason := absence("faiss", "faiss-cpu", options):
        return Absent(name, reason)

    def prepare(inputs: Inputs) -> Run:
        import faiss

        faiss.omp_set_num_threads(options.threads)
        index = faiss.IndexFlatL2(inputs["codebook"].shape[1])
        index.add(inputs["codebook"].numpy())
        return with_sums(
            lambda x: torch.from_numpy(index.search(x.numpy(), 1)[1][:, 0]), inputs, options
        )

    return Contestant(name, prepare)


def superkmeans_step(options: Options) -> Contestant | Absent:
    """Return superkmeans's exact assignment, and the quickest of our sums."""
    name = "superkmeans, our sums"
    if reason := superkmeans_absence(options):
        return Absent(name, reason)

    def prepare(inputs: Inputs) -> Run:
        book = inputs["codebook"]
        assign = assignment(*book.shape)
        return with_sums(
            lambda x: torch.from_numpy(assign(x.numpy(), book.numpy()).astype("int64")),
            inputs, options,
        )  # fmt: skip

    return Contestant(name, prepare)

"""Residual k-means codebooks: fitted, kept up to date, measured, saved."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from .._checks import check_choice, named_items
from ..ops.residual_kmeans import residual_kmeans_decode, residual_kmeans_encode
from ._exchange import Exchange
from ._fit import Plan, fit_levels, learn_levels, open_shard
from ._lloyd import LevelFit
from ._quality import Quality, measure
from ._rows import Source, open_rows
from ._shard import check_enough


class ResidualKMeans(Exchange):
    r"""Codebooks that turn vectors into short codes: k-means, then k-means of what it leaves.

    $c_l = \arg\min_j \|r_{l-1} - C_l[j]\|^2,\quad r_l = r_{l-1} - C_l[c_l],\quad r_0 = x$.

    `fit` learns C_1 from the rows by Lloyd's iterations, C_2 from their residuals, and so on. The
    codebooks are buffers (float32, or float64 where fitted on float64): `.to()` and `state_dict`
    include them, and a new module of the same levels loads the state of a fitted one.

    Every sum of the fit is exact (see `kmeans_step`), so the same rows, weights, settings and seed
    give the same bits for any number of threads, in memory and out of core, and on any number of
    ranks; the codes are then those of one backend on one kind of device.

    Workspace of `fit`: for a tensor a float32 copy, made when the first level is done; for a
    memory-mapped array 1 to 4 bytes per row and level; 8 bytes per row and O(sum N_l D) besides.
    Nothing of size rows x codewords, but for chunks of it in the reference.

    Source: FLUID, section 3.2 (4 levels of 64, 128-d); LARM, equations 3-4 (512, 256, 128; 256-d);
    Arthur and Vassilvitskii, "k-means++" (2007); Vitter, "Random sampling with a reservoir" (1985);
    Sculley, "Web-scale k-means clustering" (2010), for `partial_fit`.

    Example:
        >>> quantizer = ResidualKMeans((64, 64, 64, 64)).fit(embeddings)  # [M, 128]
        >>> codes = quantizer.encode(embeddings)  # uint8 [M, 4]
        >>> quantizer.quality(embeddings).relative_error
    """

    history: list[LevelFit]
    _SETTINGS = ("iterations", "init", "seed", "tolerance", "balance", "sample")

    def __init__(
        self,
        levels: Sequence[int] = (512, 256, 128),
        *,
        iterations: int = 20,
        init: str | Sequence[Tensor] = "k-means++",
        seed: int = 0,
        tolerance: float = 1e-4,
        balance: float | None = None,
        sample: int | None = None,
        backend: str = "auto",
    ):
        """Make empty codebooks.

        Args:
            levels: (N_1, ..., N_L), codewords per level, 1 to 65,536 each.
            iterations: the most updates per level.
            init: "k-means++", drawn from at most max(32,768, 32 N_l) rows; "random" rows; or L
                tensors [N_l, D] to start from, which `save` leaves out.
            seed: of every random draw.
            tolerance: a level is done when an update lowers its inertia by no more than this share.
            balance: at least 1; no cluster of the assignment that the codewords become means of
                weighs as much as balance W / N_l plus one row (the heaviest), W being the weight of
                all rows: at most ceil(balance M / N_l) rows without weights. None sets no bound.
                `encode` finds the nearest codewords, balanced or not: see `Quality.heaviest`.
            sample: fit on a uniform sample of so many rows, drawn by the seed. None takes all.
            backend: of every op called, "auto" or one that all of them have.
        """
        super().__init__(levels)
        self._start = _check_init(init, len(self.levels))
        _check_count("iterations", iterations)
        if sample is not None:
            _check_count("sample", sample)
        if not 0 <= tolerance < 1:
            raise ValueError(f"tolerance: must be in [0, 1), got {tolerance}")
        if balance is not None and not 1 <= balance < float("inf"):
            raise ValueError(f"balance: must be at least 1 and finite, got {balance}")
        self.iterations, self.seed, self.tolerance = iterations, seed, tolerance
        self.init = init if isinstance(init, str) else "k-means++"
        self.balance, self.sample, self.backend = balance, sample, backend
        self.history = []

    @torch.no_grad()
    def fit(
        self,
        x: Source | Iterable[Any],
        *,
        weights: Any = None,
        group: Any = None,
        progress: bool = False,
    ) -> Self:
        """Learn the codebooks from scratch, level by level; they land on x's device.

        Args:
            x: [M, D] floating, finite; at least as many rows as the largest level has codewords. A
                tensor; a NumPy array, of which a memory-mapped file is read in chunks and never
                held whole; or an iterable of such batches, of which `sample` rows are kept.
            weights: [M] float32 or float64, not negative: a row of weight 2 counts as two rows, one
                of weight 0 as none.
            group: a torch.distributed group, such as `torch.distributed.group.WORLD`, of which
                every rank calls with its own consecutive part of the rows, by rank, and gets the
                codebooks that one process gets from all of them. None: this process has all rows.
            progress: show a progress bar.

        Returns:
            self. `history` holds the inertia of every assignment, which never rises, unless
            balanced.

        Raises:
            TypeError: a wrong type or dtype. ValueError: a wrong shape or device, too few rows, x
            not finite or so large that squared distances overflow, weights negative or not finite.
        """
        plan = self._plan()
        shard = open_shard(x, weights, group, plan)
        check_enough(shard, max(self.levels))
        books, counts, self.history = fit_levels(shard, plan, progress)
        self._set(books, counts)
        return self

    @torch.no_grad()
    def partial_fit(self, x: Source, *, weights: Any = None, decay: float = 1.0) -> Self:
        """Move the codewords towards a batch of new rows, each at a rate of 1 / its row count.

        A codeword so becomes the mean of all the rows it has won, those of `fit` included; one that
        has won none yet (those of `from_faiss`) is replaced by its first rows. Later levels learn
        from what the moved codewords leave. The first batch of an unfitted module also chooses the
        codewords, so it needs as many rows as the largest level.

        Args:
            x: [M, D], a tensor or an array, as in `fit`.
            weights: [M], as in `fit`.
            decay: in (0, 1], by which the counts are multiplied before: a row t batches ago counts
                decay^t. Below 1 the codewords follow a drifting stream.

        Raises: as `fit`.
        """
        if not 0 < decay <= 1:
            raise ValueError(f"decay: must be in (0, 1], got {decay}")
        plan = replace(self._plan(), sample=None)
        open_rows(x, self.dim or "D")
        shard = open_shard(x, weights, None, plan)
        if self.dim == 0:
            check_enough(shard, max(self.levels))
        books, counts, _ = learn_levels(shard, plan, self.codebooks, self.counts, decay)
        self._set(books, counts)
        return self

    def encode(self, x: Tensor) -> Tensor:
        """Return the codes [M, L] of rows [M, D]; see `residual_kmeans_encode`."""
        return residual_kmeans_encode(x, self._fitted(), backend=self.backend)

    def forward(self, x: Tensor) -> Tensor:
        """Encode."""
        return self.encode(x)

    def decode(self, codes: Tensor, *, version: str | None = None) -> Tensor:
        """Return the rows [M, D] that codes [M, L] stand for; see `residual_kmeans_decode`.

        version: of the codebooks that the codes are of, where it is known. Raises: ValueError where
        that is not the version of these.
        """
        self._check_version(version)
        return residual_kmeans_decode(codes, self._fitted())

    @torch.no_grad()
    def quality(self, x: Source) -> Quality:
        """Measure how well the codes of rows [M, D], M >= 1, stand for them.

        x: as in `encode`, or a NumPy array; a memory-mapped file is read in chunks, twice.
        """
        rows = open_rows(x, self._fitted()[0].shape[1])
        if not rows.count:
            raise ValueError("x: quality needs at least one row, got none")
        return measure(rows, self.codebooks, self.backend)

    def _plan(self) -> Plan:
        return Plan(
            self.levels,
            self.iterations,
            self._start or self.init,
            self.seed,
            self.tolerance,
            self.balance,
            self.sample,
            self.backend,
        )


def _check_init(init: str | Sequence[Tensor], depth: int) -> list[Tensor] | None:
    """Return the codebooks to start from, if they are given."""
    if isinstance(init, str):
        check_choice("init", init, ("k-means++", "random"))
        return None
    start = list(named_items("init", init).values())
    if len(start) != depth:
        raise ValueError(f"init: {depth} are needed, got {len(start)}")
    return start


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: must be at least 1, got {value}")

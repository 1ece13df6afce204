"""Residual k-means codebooks: fitted, kept up to date, measured, saved."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from .._checks import FLOATS, check_choice, check_finite, check_levels, check_tensor
from .._files import replacing
from ..ops.residual_kmeans import residual_kmeans_decode, residual_kmeans_encode
from . import _faiss
from ._lloyd import LevelFit, check_rows, gather_clusters, initial_codebook, lloyd, subtract
from ._progress import progress_bars
from ._quality import Quality, measure

_FORMAT = "livrec_fast.ResidualKMeans"


class ResidualKMeans(nn.Module):
    r"""Codebooks that turn vectors into short codes: k-means, then k-means of what it leaves.

    $c_l = \arg\min_j \|r_{l-1} - C_l[j]\|^2,\quad r_l = r_{l-1} - C_l[c_l],\quad r_0 = x$.

    `fit` learns C_1 from the rows by Lloyd's iterations, C_2 from their residuals, and so on. The
    codebooks are buffers (float32, or float64 where fitted on float64): `.to()` and `state_dict`
    include them, and a new module of the same levels loads the state of a fitted one.

    Determinism: the same rows, weights, settings and seed on the same device give the same bits.
    Workspace of `fit`: a float32 copy of x, about 32 bytes per row, and O(2,048 D) more; nothing
    of size rows x codewords.

    Source: FLUID, section 3.2 (4 levels of 64, 128-d); LARM, equations 3-4 (512, 256, 128; 256-d);
    Sculley, "Web-scale k-means clustering" (2010), for `partial_fit`.

    Example:
        >>> quantizer = ResidualKMeans((64, 64, 64, 64)).fit(embeddings)  # [M, 128]
        >>> codes = quantizer.encode(embeddings)  # uint8 [M, 4]
        >>> quantizer.quality(embeddings).relative_error
    """

    history: list[LevelFit]

    def __init__(
        self,
        levels: Sequence[int] = (512, 256, 128),
        *,
        iterations: int = 20,
        init: str = "k-means++",
        seed: int = 0,
        tolerance: float = 1e-4,
        backend: str = "auto",
    ):
        """Make empty codebooks.

        Args:
            levels: (N_1, ..., N_L), codewords per level, 1 to 65,536 each.
            iterations: the most updates per level.
            init: "k-means++", drawn from at most max(32,768, 32 N_l) rows, or "random" rows.
            seed: of every random draw.
            tolerance: a level is done when an update lowers its inertia by no more than this share.
            backend: of `residual_kmeans_encode`, which does every assignment too.
        """
        super().__init__()
        self.levels = tuple(check_levels(levels, most=65_536))
        check_choice("init", init, ("k-means++", "random"))
        if isinstance(iterations, bool) or not isinstance(iterations, int):
            raise TypeError(f"iterations: must be an int, got {type(iterations).__name__}")
        if iterations < 1:
            raise ValueError(f"iterations: must be at least 1, got {iterations}")
        if not 0 <= tolerance < 1:
            raise ValueError(f"tolerance: must be in [0, 1), got {tolerance}")
        self.iterations, self.init, self.seed = iterations, init, seed
        self.tolerance, self.backend = tolerance, backend
        self.history = []
        for level, size in enumerate(self.levels):
            self.register_buffer(f"codebook_{level}", torch.empty(size, 0))
            self.register_buffer(f"count_{level}", torch.zeros(size, dtype=torch.int64))

    @property
    def codebooks(self) -> list[Tensor]:
        """The codebooks, [N_l, D] each; D is 0 before the fit."""
        return [self.get_buffer(f"codebook_{level}") for level in range(len(self.levels))]

    @property
    def counts(self) -> list[Tensor]:
        """Rows that each codeword is the mean of so far, int64 [N_l] each."""
        return [self.get_buffer(f"count_{level}") for level in range(len(self.levels))]

    @property
    def dim(self) -> int:
        """D, or 0 before the fit."""
        return self.codebooks[0].shape[1]

    @property
    def version(self) -> str:
        """16 hex digits that identify what the codebooks hold: codes belong to one version."""
        digest = hashlib.sha256()
        for codebook in self.codebooks:
            digest.update(f"{codebook.dtype} {list(codebook.shape)}".encode())
            digest.update(
                codebook.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            )
        return digest.hexdigest()[:16]

    @torch.no_grad()
    def fit(self, x: Tensor, *, weights: Tensor | None = None, progress: bool = False) -> Self:
        """Learn the codebooks from scratch, level by level; they land on x's device.

        Args:
            x: [M, D] floating, finite; at least as many rows as the largest level has codewords.
            weights: [M] float32 or float64, not negative: a row of weight 2 counts as two rows, one
                of weight 0 as none.
            progress: show a progress bar.

        Returns:
            self. `history` holds the inertia of every iteration, which never rises.

        Raises:
            TypeError: a wrong type or dtype. ValueError: a wrong shape or device, too few rows, x
            not finite, weights negative or not finite.
        """
        residual = self._own_residual(x, "D")
        check_rows(x, weights, max(self.levels))
        generator = torch.Generator().manual_seed(self.seed)
        books, counts, history = [], [], []
        with progress_bars(progress, self.levels, self.iterations) as steps:
            for size, step in zip(self.levels, steps, strict=True):
                book = initial_codebook(residual, weights, size, self.init, generator)
                book, codes, course = lloyd(
                    residual, weights, book, self._assign,
                    iterations=self.iterations, tolerance=self.tolerance, step=step,
                )  # fmt: skip
                subtract(residual, book, codes)
                books.append(book)
                counts.append(codes.bincount(minlength=size))
                history.append(course)
        self._set(books, counts)
        self.history = history
        return self

    @torch.no_grad()
    def partial_fit(self, x: Tensor) -> Self:
        """Move the codewords towards a batch of new rows, each at a rate of 1 / its row count.

        A codeword so becomes the mean of all the rows it has won, those of `fit` included, each
        counted once; a codeword that has won none yet (those of `from_faiss`) is replaced by its
        first rows. Later levels learn from what the moved codewords leave. The first batch of an
        unfitted module also chooses the codewords, so it needs as many rows as the largest level.

        Raises: as `fit`.
        """
        residual = self._own_residual(x, self.dim or "D")
        if self.dim == 0:
            check_rows(x, None, max(self.levels))
        generator = torch.Generator().manual_seed(self.seed)
        books, counts = [], []
        for old, count in zip(self.codebooks, self.counts, strict=True):
            if self.dim == 0:
                old = initial_codebook(residual, None, len(old), self.init, generator)
            codes = self._assign(residual, old)
            count = count.to(x.device) + codes.bincount(minlength=len(old))
            clusters = gather_clusters(residual, None, old, codes)
            shift = clusters.sums - clusters.mass[:, None] * old.double()
            book = (old.double() + shift / count.clamp_min(1)[:, None]).to(old.dtype)
            subtract(residual, book, self._assign(residual, book))
            books.append(book)
            counts.append(count)
        self._set(books, counts)
        return self

    def encode(self, x: Tensor) -> Tensor:
        """Return the codes [M, L] of rows [M, D]; see `residual_kmeans_encode`."""
        return residual_kmeans_encode(x, self._fitted(), backend=self.backend)

    def forward(self, x: Tensor) -> Tensor:
        """Encode."""
        return self.encode(x)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the rows [M, D] that codes [M, L] stand for; see `residual_kmeans_decode`."""
        return residual_kmeans_decode(codes, self._fitted())

    @torch.no_grad()
    def quality(self, x: Tensor) -> Quality:
        """Measure how well the codes of rows [M, D], M >= 1, stand for them."""
        codes = self.encode(x)
        if not len(x):
            raise ValueError("x: quality needs at least one row, got none")
        return measure(x, codes, self.codebooks)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write codebooks, counts and settings to a safetensors file, whole or not at all."""
        from safetensors.torch import save

        self._fitted()
        settings = {key: getattr(self, key) for key in ("iterations", "init", "seed", "tolerance")}
        metadata = {
            "format": _FORMAT,
            "levels": json.dumps(self.levels),
            "dim": str(self.dim),
            "version": self.version,
            "settings": json.dumps(settings),
        }
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        with replacing(path) as file:
            file.write(save(tensors, metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, backend: str = "auto") -> Self:
        """Read what `save` wrote, onto the CPU.

        Raises: ValueError where the file is not one of ours, or its codebooks are not of the
        version that it names.
        """
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"path: {path} was not written by ResidualKMeans.save")
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        levels, settings = json.loads(metadata["levels"]), json.loads(metadata["settings"])
        module = cls(levels, **settings, backend=backend)
        module.load_state_dict(tensors)
        if module.version != metadata["version"]:
            raise ValueError(
                f"path: the codebooks of {path} are version {module.version}, its header says "
                f"{metadata['version']}"
            )
        return module

    @classmethod
    def from_faiss(cls, quantizer: Any, **settings: Any) -> Self:
        """Take over the codebooks of a trained faiss.ResidualQuantizer; `settings` as in the class.

        Codes are those that faiss finds with max_beam_size = 1; wider beams choose differently.
        """
        books = _faiss.from_faiss(quantizer)
        module = cls([len(book) for book in books], **settings)
        module._set(books, module.counts)
        return module

    def to_faiss(self) -> Any:
        """Return a faiss.ResidualQuantizer of these codebooks, max_beam_size = 1.

        Its codes equal ours but for near ties. Raises: ValueError where a level is no power of two.
        """
        return _faiss.to_faiss(self._fitted())

    def _fitted(self) -> list[Tensor]:
        if self.dim == 0:
            raise RuntimeError("codebooks: there are none yet; call fit, partial_fit or load")
        return self.codebooks

    def _set(self, books: list[Tensor], counts: list[Tensor]) -> None:
        for level, (book, count) in enumerate(zip(books, counts, strict=True)):
            self.register_buffer(f"codebook_{level}", book)
            self.register_buffer(f"count_{level}", count.to(book.device))

    def _assign(self, x: Tensor, codebook: Tensor) -> Tensor:
        return residual_kmeans_encode(x, [codebook], backend=self.backend)[:, 0].long()

    @staticmethod
    def _own_residual(x: Tensor, dim: int | str) -> Tensor:
        """Check rows to learn from; copy them, in float32 or 64, to subtract codewords from."""
        check_tensor("x", x, ("M", dim), FLOATS)
        if x.shape[1] < 1:
            raise ValueError(f"x: D must be at least 1, got shape {list(x.shape)}")
        check_finite("x", x)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return x.to(wide, copy=True, memory_format=torch.contiguous_format)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Take the dimension of the state's codebooks before torch compares shapes."""
        empty = self.dim == 0
        for level, book in enumerate(self.codebooks):
            given = state.get(f"{prefix}codebook_{level}")
            if isinstance(given, Tensor) and given.dim() == 2 and len(given) == len(book):
                like = given if empty else book
                fresh = given.new_empty(given.shape, dtype=like.dtype, device=book.device)
                self.register_buffer(f"codebook_{level}", fresh)
        super()._load_from_state_dict(state, prefix, *rest)

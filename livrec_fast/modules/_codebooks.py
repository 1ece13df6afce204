"""Codebooks as a module's buffers, and the version that names what they hold."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from .._checks import FLOATS, check_finite, check_levels, check_same, check_tensor, named_items


class Codebooks(nn.Module):
    """L codebooks [N_l, D] and how many rows each codeword is the mean of."""

    def __init__(self, levels: Sequence[int], **settings: Any):
        """Make empty codebooks of (N_1, ..., N_L) codewords; `settings` are for a subclass."""
        super().__init__()
        self.levels = tuple(check_levels(levels, most=65_536))
        for level, size in enumerate(self.levels):
            self.register_buffer(f"codebook_{level}", torch.empty(size, 0))
            self.register_buffer(f"count_{level}", torch.zeros(size, dtype=torch.float64))

    @classmethod
    def from_codebooks(cls, codebooks: Sequence[Tensor], **settings: Any) -> Self:
        """Make a module of these codebooks.

        Args:
            codebooks: L tensors [N_l, D] of one D and device, finite; float64 stays float64, all
                else becomes float32. They are copied.
            settings: as of the class.

        Raises: TypeError, ValueError: an argument is not as above.
        """
        books = named_items("codebooks", codebooks)
        dim: int | str = "D"
        for name, book in books.items():
            check_tensor(name, book, ("N", dim), FLOATS)
            if not 1 <= len(book) <= 65_536 or book.shape[1] < 1:
                raise ValueError(
                    f"{name}: N must be 1 to 65536 and D at least 1, got shape {list(book.shape)}"
                )
            dim = book.shape[1]
        check_same("device", **books)
        for name, book in books.items():
            check_finite(name, book)
        given = list(books.values())
        wide = torch.float64 if any(b.dtype == torch.float64 for b in given) else torch.float32
        module = cls([len(book) for book in given], **settings)
        own = [book.detach().to(wide, copy=True).contiguous() for book in given]
        module._set(own, module.counts)
        return module

    @property
    def codebooks(self) -> list[Tensor]:
        """The codebooks, [N_l, D] each; D is 0 before the fit."""
        return [self.get_buffer(f"codebook_{level}") for level in range(len(self.levels))]

    @property
    def counts(self) -> list[Tensor]:
        """The weight of the rows that each codeword is the mean of so far, float64 [N_l] each."""
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

    def _fitted(self) -> list[Tensor]:
        if self.dim == 0:
            raise RuntimeError("codebooks: there are none yet; call fit, partial_fit or load")
        return self.codebooks

    def _set(self, books: list[Tensor], counts: list[Tensor]) -> None:
        for level, (book, count) in enumerate(zip(books, counts, strict=True)):
            self.register_buffer(f"codebook_{level}", book)
            self.register_buffer(f"count_{level}", count.to(book.device))

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Move and convert as torch does, but keep the counts in float64."""
        counts = self.counts
        super()._apply(fn, recurse)
        self._set(self.codebooks, counts)
        return self

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

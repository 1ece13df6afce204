"""What the encoder reads: frames and texts of slices, videos and queries, as tensors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..._checks import FLOATS, check_offsets, check_tensor

INSTALL = "pip install 'transformers>=5' 'pillow>=10'"
_TEXTS = ("title", "screen", "speech", "author", "comments", "tags")


def transformers() -> Any:
    """Import transformers. Raises: ImportError, with the command that installs it."""
    try:
        import transformers as library
    except ImportError as error:
        raise ImportError(f"FLUID's encoder needs transformers 5 or later: {INSTALL}") from error
    return library


@dataclass(frozen=True)
class Content:
    """B slices, videos or queries; F frames of at most P patches in all.

    Attributes:
        tokens: int64 [B, T]. token_mask: bool [B, T]; padding may be on either side.
        pixels: floating [F, P, C p p], patches row by row, as SigLIP2's image processor makes them.
        pixel_mask: bool [F, P], False for padding, which comes last.
        grids: int64 [F, 2], patches down and across.
        offsets: int64 [B + 1]: row b has the frames from offsets[b] up to offsets[b + 1], in the
            order of time.
    """

    tokens: Tensor
    token_mask: Tensor
    pixels: Tensor
    pixel_mask: Tensor
    grids: Tensor
    offsets: Tensor

    @classmethod
    def of_texts(cls, tokens: Tensor, token_mask: Tensor) -> Self:
        """Make content without frames, such as queries."""
        none, rows = tokens.new_zeros(0, dtype=torch.int64), len(tokens)
        return cls(
            tokens, token_mask, none.new_zeros(0, 0, 0, dtype=torch.float32),
            none.new_zeros(0, 0, dtype=torch.bool), none.new_zeros(0, 2), none.new_zeros(rows + 1),
        )  # fmt: skip

    def __len__(self) -> int:
        """Return B."""
        return len(self.tokens)

    def to(self, device: torch.device | str) -> Self:
        """Return the content on a device."""
        moved = {field.name: getattr(self, field.name).to(device) for field in fields(self)}
        return type(self)(**moved)

    def check(self) -> None:
        """Raise TypeError or ValueError where the tensors are not as above."""
        check_tensor("tokens", self.tokens, ("B", "T"), (torch.int64,))
        check_tensor("token_mask", self.token_mask, tuple(self.tokens.shape), (torch.bool,))
        check_tensor("pixels", self.pixels, ("F", "P", "C p p"), FLOATS)
        frames, patches = self.pixels.shape[:2]
        check_tensor("pixel_mask", self.pixel_mask, (frames, patches), (torch.bool,))
        check_tensor("grids", self.grids, (frames, 2), (torch.int64,))
        check_tensor("offsets", self.offsets, (len(self) + 1,), (torch.int64,))
        check_offsets(self.offsets, frames)
        count = self.grids.prod(1)[:, None]
        wanted = torch.arange(patches, device=count.device) < count
        bad = ((wanted != self.pixel_mask).any(1) | (self.grids < 1).any(1)).nonzero()
        if len(bad):
            at = int(bad[0])
            raise ValueError(
                f"grids: grids[{at}] = {self.grids[at].tolist()} does not fit a pixel_mask of "
                f"{int(self.pixel_mask[at].sum())} patches, which must be the first ones"
            )


@dataclass(frozen=True)
class RawContent:
    """Two minutes of a live room, or a short video, as they come.

    frames: images that the image processor takes (PIL images, or uint8 arrays [H, W, 3]). screen:
    the text on screen. speech: what was said. author: the author's description of themselves.
    comments: of the audience. tags: of stickers.
    """

    frames: Sequence[Any] = ()
    title: str = ""
    screen: str = ""
    speech: str = ""
    author: str = ""
    comments: Sequence[str] = ()
    tags: Sequence[str] = ()


class ContentReader:
    """Turns raw content and queries into tensors, with a tokenizer and an image processor.

    A slice's text is "title: ...", "screen: ..." and so on, a line for each field that is not
    empty. Where the lines are longer than `most` tokens, the longest are cut until they fit, so
    that long speech does not push the comments out. The encoder adds the token that ends a text.

    Example:
        >>> reader = ContentReader.from_pretrained(siglip2_folder, qwen3_folder)
        >>> encoder.encode(reader.slices([RawContent(frames, title="ramen", speech="...")]))
    """

    def __init__(self, tokenizer: Any, images: Any = None, *, most: int = 512, task: str = ""):
        """Set the reader up.

        Args:
            tokenizer: of transformers, called with add_special_tokens=False.
            images: SigLIP2's image processor; None where no content has frames.
            most: tokens of a text at most.
            task: an instruction of one sentence, which Qwen3-Embedding expects before a query.
        """
        if most < 1:
            raise ValueError(f"most: must be at least 1, got {most}")
        self.tokenizer, self.images, self.most, self.task = tokenizer, images, most, task

    @classmethod
    def from_pretrained(
        cls,
        vision: str | os.PathLike[str],
        language: str | os.PathLike[str],
        *,
        download: bool = False,
        **settings: Any,
    ) -> Self:
        """Read the tokenizer and the image processor that came with pretrained models.

        Args:
            vision: a folder, or a name that the cache of transformers holds.
            language: likewise.
            download: fetch what is not there.
            settings: as of the class.
        """
        library = transformers()
        local = {"local_files_only": not download}
        images = library.AutoImageProcessor.from_pretrained(vision, **local)
        tokenizer = library.AutoTokenizer.from_pretrained(language, **local)
        return cls(tokenizer, images, **settings)

    def queries(self, texts: Sequence[str]) -> Content:
        """Return queries as content; in training, the other side of a pair."""
        before = f"Instruct: {self.task}\nQuery:" if self.task else ""
        ids = self._ids([before + text for text in texts])
        return Content.of_texts(*_padded([row[: self.most] for row in ids]))

    def slices(self, raw: Sequence[RawContent]) -> Content:
        """Return slices or videos as content."""
        lines = [_lines(one) for one in raw]
        ids = iter(self._ids([line for some in lines for line in some]))
        texts = []
        for some in lines:
            own = [next(ids) for _ in some]
            kept = shares([len(line) for line in own], self.most)
            texts.append([i for line, n in zip(own, kept, strict=True) for i in line[:n]])
        content = Content.of_texts(*_padded(texts))
        frames = [frame for one in raw for frame in one.frames]
        if not frames:
            return content
        if self.images is None:
            raise ValueError("images: there are frames and no image processor to read them")
        counts = torch.tensor([0, *(len(one.frames) for one in raw)])
        found = self.images(images=frames, return_tensors="pt")
        return Content(
            content.tokens, content.token_mask, found["pixel_values"],
            found["pixel_attention_mask"].bool(), found["spatial_shapes"].long(), counts.cumsum(0),
        )  # fmt: skip

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        found: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return found


def shares(lengths: Sequence[int], most: int) -> list[int]:
    """Cut the greatest of these lengths down, to one bound, so that their sum is at most `most`.

    The bound is as great as it can be; what it leaves over goes to the last of the greatest.
    """
    left, kept = most, [0] * len(lengths)
    for done, at in enumerate(sorted(range(len(lengths)), key=lengths.__getitem__)):
        kept[at] = min(lengths[at], left // (len(lengths) - done))
        left -= kept[at]
    return kept


def _lines(raw: RawContent) -> list[str]:
    """Return a line for each text that there is."""
    lines = []
    for name in _TEXTS:
        value = getattr(raw, name)
        text = value if isinstance(value, str) else " | ".join(value)
        if text:
            lines.append(f"{name}: {text}\n")
    return lines


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return rows of tokens [B, T], padded with 0, and where they are."""
    if not rows:
        return torch.zeros(0, 0, dtype=torch.int64), torch.zeros(0, 0, dtype=torch.bool)
    tokens = pad_sequence([torch.tensor(row, dtype=torch.int64) for row in rows], True)
    lengths = torch.tensor([len(row) for row in rows])
    return tokens, torch.arange(tokens.shape[1]) < lengths[:, None]

"""FLUID's encoder: SigLIP2 sees the frames, Qwen3-Embedding reads them with the texts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import checkpoints
from .encoder_inputs import Content, transformers

_KIND = "encoder"


class Encoder(nn.Module):
    r"""One vector for what a slice, a video or a query shows and says.

    $T_v = \mathrm{MLP}(\mathrm{ViT}(\text{frames})),\quad
    h = \mathrm{LM}([T_v, T_t, \mathrm{EOS}])_{\mathrm{EOS}},\quad z = W h / \|W h\|$,
    with T_t the embeddings of the text's tokens. Queries have no frames; rows without text or
    without both are content, too.

    One tower: frames and text meet in every layer of the causal language model, whose last token,
    EOS, sees all of them. Patches that are padding are left out of the sequence, and what fills a
    shorter row up comes after its EOS, where it is seen by nobody.

    Parts: `vision` (transformers' Siglip2VisionModel, without its pooling head), `projector` (two
    layers), `language` (Qwen3Model), `output` (W). `from_settings` makes small or full-sized ones
    of random weights, `from_pretrained` reads trained weights of both models; the other two parts
    are then still to be trained, by `encoder_training`. The projector and the output are float32,
    whatever the models are.

    Memory: all frames of a call pass through `vision` together. Both models have transformers'
    `gradient_checkpointing_enable()`.

    Source: FLUID, section 3.1.2; SigLIP2 (Tschannen et al. 2025); Qwen3 Embedding (Zhang et al.
    2025).

    Example:
        >>> encoder = Encoder.from_pretrained(siglip2_folder, qwen3_folder)
        >>> encoder.encode(reader.slices(raw))  # float32 [B, 128]
    """

    def __init__(self, vision: Any, language: Any, *, dim: int = 128, eos: int | None = None):
        """Join two models; the projector and the output start from torch's random numbers.

        Args:
            vision: Siglip2VisionModel.
            language: Qwen3Model.
            dim: of the vectors.
            eos: the token that ends a sequence; that of the language model's settings where None.

        Raises: ValueError: no such token.
        """
        super().__init__()
        eos = language.config.eos_token_id if eos is None else eos
        words = language.config.vocab_size
        if isinstance(eos, bool) or not isinstance(eos, int) or not 0 <= eos < words:
            raise ValueError(f"eos: must be a token in [0, {words}), got {eos!r}")
        if dim < 1:
            raise ValueError(f"dim: must be at least 1, got {dim}")
        self.vision, self.language, self.eos, self.dim = vision, language, eos, dim
        width = language.config.hidden_size
        self.projector = nn.Sequential(
            nn.Linear(vision.config.hidden_size, width), nn.GELU(), nn.Linear(width, width)
        )
        self.output = nn.Linear(width, dim, bias=False)

    @classmethod
    def from_settings(
        cls, vision: dict[str, Any], language: dict[str, Any], *, seed: int = 0, **settings: Any
    ) -> Self:
        """Make an encoder of random weights.

        Args:
            vision: settings of Siglip2VisionConfig, whose defaults are those of SigLIP2-base.
            language: of Qwen3Config, whose defaults are a much larger model than the 0.6B one.
            seed: of all weights.
            settings: as of the class.
        """
        library = transformers()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            seen = library.Siglip2VisionConfig(**{**vision, "vision_use_head": False})
            read = library.Qwen3Config(**language)
            models = library.Siglip2VisionModel(seen), library.Qwen3Model(read)
            return cls(*models, **settings)

    @classmethod
    def from_pretrained(
        cls,
        vision: str | os.PathLike[str],
        language: str | os.PathLike[str],
        *,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        download: bool = False,
        **settings: Any,
    ) -> Self:
        """Read pretrained models, from safetensors files only.

        Args:
            vision: a folder with a SigLIP2 of native resolution (NaFlex), whole or its vision model
                alone, or a name that the cache of transformers holds.
            language: likewise, with a Qwen3 embedding model.
            dtype: of both models' weights.
            seed: of the projector's and the output's weights.
            download: fetch what is not there.
            settings: as of the class.

        Raises: ValueError: the weights do not fill the model. OSError: there are none.
        """
        library = transformers()
        options = {"dtype": dtype, "local_files_only": not download, "use_safetensors": True}
        seen = _read(library.Siglip2VisionModel, vision, vision_use_head=False, **options)
        read = _read(library.Qwen3Model, language, **options)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(seen, read, **settings)

    def forward(self, content: Content) -> Tensor:
        """Return the vectors of content, float32 [B, dim], of length 1.

        Raises: TypeError, ValueError: a tensor that is not as `Content` has it, or pixels of
        another patch size. IndexError: a token that is none.
        """
        content.check()
        self._check_tokens(content)
        if not len(content):
            return self.output.weight.new_zeros(0, self.dim)
        sequence, last = self._sequence(content)
        read = self.language(inputs_embeds=sequence, use_cache=False).last_hidden_state
        ends = read[torch.arange(len(content), device=last.device), last]
        return F.normalize(self.output(ends.to(self.output.weight.dtype)).float(), dim=1)

    @torch.no_grad()
    def encode(self, content: Content, rows: int | None = None) -> Tensor:
        """Return the vectors of content that may lie elsewhere, without gradients or dropout.

        rows: of the content at a time; all where None.
        """
        modes = [(part, part.training) for part in self.modules()]
        self.eval()
        try:
            size = max(1, len(content)) if rows is None else rows
            parts = [_rows(content, at, at + size) for at in range(0, max(1, len(content)), size)]
            return torch.cat([self(part.to(self.output.weight.device)) for part in parts])
        finally:
            for part, training in modes:
                part.training = training

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights and settings to one safetensors file, whole or not at all."""
        models = {"vision": self.vision, "language": self.language}
        settings = {n: json.loads(m.config.to_json_string(False)) for n, m in models.items()}
        facts = {"kind": _KIND, "dim": self.dim, "eos": self.eos, **settings}
        checkpoints.write(Path(path), self.state_dict(), **facts)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote, onto the CPU. Raises: ValueError where the file is none."""
        tensors, facts = checkpoints.read(Path(path))
        if facts.get("kind") != _KIND:
            raise ValueError(f"path: {path} was not written by Encoder.save")
        encoder = cls.from_settings(
            facts["vision"], facts["language"], dim=facts["dim"], eos=facts["eos"]
        )
        encoder.load_state_dict(tensors, assign=True)  # keeps the dtypes of the file
        return encoder

    def _sequence(self, content: Content) -> tuple[Tensor, Tensor]:
        """Return [T_v, T_t, EOS] and what fills up [B, S, D_h], and where each EOS is [B]."""
        words = self.language.embed_tokens(content.tokens[content.token_mask])
        visual = self._visual(content).to(words.dtype)
        patches = F.pad(content.grids.prod(1).cumsum(0), (1, 0))[content.offsets].diff()
        last = patches + content.token_mask.sum(1)
        at = torch.arange(int(last.max()) + 1, device=last.device)
        sequence = words.new_zeros(len(content), len(at), words.shape[1])
        sequence[at < patches[:, None]] = visual
        sequence[(at >= patches[:, None]) & (at < last[:, None])] = words
        sequence[at == last[:, None]] = self.language.embed_tokens.weight[self.eos]
        return sequence, last

    def _visual(self, content: Content) -> Tensor:
        """Return T_v of all frames, one after the other, [patches, D_h]."""
        if not len(content.pixels):
            return self.output.weight.new_zeros(0, self.output.in_features)
        seen = self.vision(
            pixel_values=content.pixels, pixel_attention_mask=content.pixel_mask,
            spatial_shapes=content.grids,
        ).last_hidden_state  # fmt: skip
        kept = seen[content.pixel_mask]
        made: Tensor = self.projector(kept.to(self.output.weight.dtype))
        return made

    def _check_tokens(self, content: Content) -> None:
        tokens, words = content.tokens[content.token_mask], self.language.config.vocab_size
        bad = ((tokens < 0) | (tokens >= words)).nonzero()
        if len(bad):
            raise IndexError(f"tokens: {int(tokens[bad[0]])} is outside [0, {words})")
        wanted = self.vision.embeddings.patch_embedding.in_features
        if len(content.pixels) and content.pixels.shape[2] != wanted:
            raise ValueError(
                f"pixels: a patch must have {wanted} values, got {content.pixels.shape[2]}"
            )


def _read(model: Any, source: str | os.PathLike[str], **options: Any) -> Any:
    """Read a pretrained model, and refuse another one and one that is not all there."""
    local = {"local_files_only": options["local_files_only"]}
    found = transformers().AutoConfig.from_pretrained(source, **local).model_type
    wanted = model.config_class.model_type
    if found not in (wanted, wanted.removesuffix("_vision_model")):
        raise ValueError(f"{source}: holds a model of type {found!r}, not {wanted!r}")
    read, report = model.from_pretrained(source, output_loading_info=True, **options)
    missing = sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"]))
    if missing:
        raise ValueError(
            f"{source}: not the weights of a {model.__name__}; {len(missing)} are missing, such as "
            f"{missing[0]}"
        )
    return read


def _rows(content: Content, first: int, last: int) -> Content:
    """Return some rows of content."""
    offsets = content.offsets[first : last + 1]
    frames = slice(int(offsets[0]), int(offsets[-1]))
    return Content(
        content.tokens[first:last], content.token_mask[first:last], content.pixels[frames],
        content.pixel_mask[frames], content.grids[frames], offsets - offsets[0],
    )  # fmt: skip

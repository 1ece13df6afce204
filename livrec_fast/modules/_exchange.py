"""Codebooks and codes to files and to other libraries, and back."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from torch import Tensor

from .._checks import INTEGERS, check_codes, check_tensor
from .._files import replacing
from ..ops.pack_codes import pack_codes, unpack_codes
from ..reference.residual_kmeans import code_dtype
from . import _codebook_files as files
from . import _faiss
from ._codebooks import Codebooks

_FORMAT, _CODES_FORMAT = "livrec_fast.ResidualKMeans", "livrec_fast.codes"
Path = str | os.PathLike[str]


class Exchange(Codebooks):
    """Codebooks that go to files and to faiss, and come back."""

    _SETTINGS: ClassVar[tuple[str, ...]] = ()  # the arguments of the class that `save` keeps

    def save(self, path: Path) -> None:
        """Write codebooks, counts and settings to a safetensors file, whole or not at all."""
        self._fitted()
        settings = {key: getattr(self, key) for key in self._SETTINGS}
        metadata = {
            "format": _FORMAT,
            "levels": json.dumps(self.levels),
            "dim": str(self.dim),
            "version": self.version,
            "settings": json.dumps(settings),
        }
        _write(path, {name: t.contiguous() for name, t in self.state_dict().items()}, metadata)

    @classmethod
    def load(cls, path: Path, *, backend: str = "auto") -> Self:
        """Read what `save` wrote, onto the CPU.

        Raises: ValueError where the file is not one of ours, or its codebooks are not of the
        version that it names.
        """
        tensors, metadata = _read(path, _FORMAT, "ResidualKMeans.save")
        levels, settings = json.loads(metadata["levels"]), json.loads(metadata["settings"])
        module = cls(levels, **settings, backend=backend)
        module.load_state_dict(tensors)
        if module.version != metadata["version"]:
            raise ValueError(
                f"path: the codebooks of {path} are version {module.version}, its header says "
                f"{metadata['version']}"
            )
        return module

    def save_codes(self, path: Path, codes: Tensor, *, packed: bool = False) -> None:
        """Write codes to a safetensors file that names the version of the codebooks.

        Args:
            path: of the file, which appears whole or not at all. It holds one tensor, "codes", and
                the metadata "format", "version", "levels" and "packed".
            codes: [M, L] integers, column l in [0, N_l).
            packed: keep them as `pack_codes` lays them out, in the fewest bits.

        Raises: TypeError, ValueError, IndexError: codes are none of these codebooks.
        """
        self._fitted()
        check_tensor("codes", codes, ("M", len(self.levels)), INTEGERS)
        check_codes(codes, self.levels)
        codes = codes.cpu()
        kept = pack_codes(codes, self.levels) if packed else codes.to(code_dtype(max(self.levels)))
        metadata = {
            "format": _CODES_FORMAT,
            "version": self.version,
            "levels": json.dumps(self.levels),
            "packed": json.dumps(packed),
        }
        _write(path, {"codes": kept.contiguous()}, metadata)

    def load_codes(self, path: Path) -> Tensor:
        """Read what `save_codes` wrote: codes [M, L] as `encode` gives them, on the CPU.

        Raises: ValueError where the file is none of ours, or its codes are of codebooks of another
        version or other levels. IndexError: a code out of range.
        """
        self._fitted()
        tensors, metadata = _read(path, _CODES_FORMAT, "ResidualKMeans.save_codes")
        levels = json.loads(metadata["levels"])
        if levels != list(self.levels):
            raise ValueError(
                f"path: the codes of {path} are of levels {levels}, version "
                f"{metadata['version']}, not of {list(self.levels)}, {self.version}"
            )
        self._check_version(metadata["version"], f"path: the codes of {path}")
        codes = tensors["codes"]
        if json.loads(metadata["packed"]):
            return unpack_codes(codes, self.levels)
        check_tensor("codes", codes, ("M", len(levels)), (code_dtype(max(levels)),))
        check_codes(codes, levels)
        return codes

    def to_npy(self, folder: Path) -> None:
        """Write codebook_0.npy, codebook_1.npy, ... [N_l, D], and codebooks.json with the version.

        float32, or float64 where the codebooks are. The folder is made if need be. Each file
        appears whole or not at all; should writing stop half way, `from_npy` sees by the version
        that the files do not belong together.

        Raises: ValueError where the folder holds a codebook of a further level.
        """
        kept = Codebooks.from_codebooks(self._fitted())
        books = [book.cpu().numpy() for book in kept.codebooks]
        files.write_npy(folder, books, {"version": kept.version, "levels": list(self.levels)})

    @classmethod
    def from_npy(cls, paths: Path | Sequence[Path], **settings: Any) -> Self:
        """Take over codebooks kept as plain arrays of float16, float32 or float64.

        Args:
            paths: a folder as `to_npy` writes it, codebooks.json optional; or one .npy of shape
                [L, N, D], or [N, D] for one level; or a list of .npy files, [N_l, D] each.
            settings: as of the class.

        Raises: ValueError: a file that is no such array, or a folder whose files are not of the
        version that its codebooks.json names. FileNotFoundError: no such file.
        """
        books, version = files.read_npy(paths)
        module = cls.from_codebooks(books, **settings)
        if version not in (None, module.version):
            raise ValueError(
                f"paths: the codebooks of {paths} are version {module.version}, its codebooks.json "
                f"says {version}"
            )
        return module

    @classmethod
    def from_checkpoint(cls, source: Path | Mapping[str, Any], **settings: Any) -> Self:
        """Take over the codebooks of OpenOneRec's residual k-means or of GRID's.

        Args:
            source: a checkpoint of OpenOneRec (the state dict, with tensors "centroids.<l>") or of
                GRID ("state_dict" in it, with "quantization_layer_list.<l>.centroids"): the path of
                the file, which is read without running code from it, or what torch.load gave.
            settings: as of the class.

        Both choose the nearest centroid of the residual, so that codes are the same but for near
        ties. GRID can also scale each residual to length 1, which this class does not: such a
        checkpoint is refused where it says so.

        Raises: ValueError: a file that torch cannot read so, or without such tensors.
        """
        return cls.from_codebooks(files.centroids(source), **settings)

    @classmethod
    def from_faiss(cls, quantizer: Any, **settings: Any) -> Self:
        """Take over the codebooks of a trained faiss.ResidualQuantizer; `settings` as in the class.

        Codes are those that faiss finds with max_beam_size = 1; wider beams choose differently.
        """
        return cls.from_codebooks(_faiss.from_faiss(quantizer), **settings)

    def to_faiss(self, like: Any = None) -> Any:
        """Return a faiss.ResidualQuantizer of these codebooks.

        Args:
            like: a trained faiss.ResidualQuantizer of the same levels, such as `from_faiss` read,
                whose beam, search type and quantisation of norms are taken over. None gives beam 1,
                whose codes equal ours but for near ties, and codes without norms.

        Raises: ValueError where a level is no power of two, or `like` has others.
        """
        return _faiss.to_faiss(self._fitted(), like)

    def codes_to_faiss(self, codes: Tensor, quantizer: Any = None) -> Tensor:
        """Return codes [M, L] as faiss stores them, uint8 [M, quantizer.code_size].

        The bits of `pack_codes`; where `quantizer`, which must hold these codebooks, keeps norms,
        those of the decoded rows follow as faiss computes them.
        """
        check_tensor("codes", codes, ("M", len(self.levels)), INTEGERS)
        check_codes(codes, self.levels)
        return _faiss.pack(codes, self._fitted(), quantizer)

    def codes_from_faiss(self, packed: Tensor, quantizer: Any = None) -> Tensor:
        """Return the codes [M, L] in what faiss stores, uint8 [M, quantizer.code_size].

        quantizer: the faiss.ResidualQuantizer that made them, needed where it keeps norms.
        """
        return _faiss.unpack(packed, self._fitted(), quantizer)

    def _check_version(self, version: str | None, what: str = "version: these codes") -> None:
        if version is not None and version != self.version:
            raise ValueError(f"{what} are of codebooks {version}, not of {self.version}")


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    from safetensors.torch import save

    with replacing(path) as file:
        file.write(save(tensors, metadata))


def _read(path: Path, wanted: str, writer: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file of the wanted format."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != wanted:
                raise ValueError(f"path: {path} was not written by {writer}")
            return {key: file.get_tensor(key) for key in file.keys()}, metadata
    except SafetensorError as error:
        raise ValueError(f"path: {path} is not a readable safetensors file ({error})") from error

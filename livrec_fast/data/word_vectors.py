"""Frozen token vectors of a language model (WordLlama), averaged into vectors of short texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .wheels import Wheel, fetch

# The data are the same in all builds, so any one build serves every Python and every system.
WHEEL = Wheel(
    "wordllama",
    "0.4.0.post1",
    {
        "wordllama/weights/l2_supercat_256.safetensors": (
            "64b47a2dc493cb8e85944076601189739852d7b64e0e1eedcb1937a251cd9fd5"
        ),
        "wordllama/tokenizers/l2_supercat_tokenizer_config.json": (
            "93248f2a9ec36c7b35f700a033d5f36228aae48db61aee31007fa49062cdeb68"
        ),
    },
    target=(
        *("--implementation", "cp", "--python-version", "3.11", "--abi", "cp311"),
        *("--platform", "manylinux2014_x86_64"),
    ),
)


@dataclass(frozen=True)
class WordVectors:
    """A token table [tokens, D] float32 and the tokenizer that it belongs to."""

    table: np.ndarray
    tokenizer: Any

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Return the mean of each text's token vectors, [texts, D]; no tokens give zeros."""
        vectors = np.zeros((len(texts), self.table.shape[1]), dtype=np.float32)
        for row, encoding in enumerate(
            self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        ):
            if encoding.ids:
                vectors[row] = self.table[encoding.ids].mean(0)
        return vectors


def load(cache: Path, fetch_files: Callable[[Wheel, Path], dict[str, Path]] = fetch) -> WordVectors:
    """Read the vectors, downloading them into `cache` if they are not there."""
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    paths = fetch_files(WHEEL, cache)
    weights = load_file(paths["l2_supercat_256.safetensors"])
    (table,) = weights.values()
    tokenizer = Tokenizer.from_file(str(paths["l2_supercat_tokenizer_config.json"]))
    return WordVectors(table.astype(np.float32), tokenizer)

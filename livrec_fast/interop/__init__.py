"""Other libraries behind this one's calls, to compare with or to exchange data with.

`livrec_fast.interop.sentence_transformers` is imported by name: it imports that library.
"""

from .faiss import history_search_faiss
from .open_clip import ClipLoss

__all__ = ["ClipLoss", "history_search_faiss"]

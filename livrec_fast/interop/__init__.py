"""Other libraries behind this one's calls, to compare with or to exchange data with."""

from .faiss import history_search_faiss

__all__ = ["history_search_faiss"]

"""Modules over the ops: what a model is built from."""

from .prefix_ngram import PrefixNgramEmbedding
from .residual_kmeans import ResidualKMeans

__all__ = ["PrefixNgramEmbedding", "ResidualKMeans"]

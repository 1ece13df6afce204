"""Modules over the ops: what a model is built from."""

from .prefix_ngram import PrefixNgramEmbedding
from .residual_kmeans import ResidualKMeans
from .room_votes import RoomVotes

__all__ = ["PrefixNgramEmbedding", "ResidualKMeans", "RoomVotes"]

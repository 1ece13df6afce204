"""Modules over the ops: what a model is built from."""

from ._row_optimizers import RowAdagrad, RowSGD, RowwiseAdagrad
from ._sharded import shard_rows
from .prefix_ngram import PairedPrefixNgramEmbedding, PrefixNgramEmbedding
from .residual_kmeans import ResidualKMeans
from .room_votes import RoomVotes

__all__ = [
    "PairedPrefixNgramEmbedding",
    "PrefixNgramEmbedding",
    "ResidualKMeans",
    "RoomVotes",
    "RowAdagrad",
    "RowSGD",
    "RowwiseAdagrad",
    "shard_rows",
]

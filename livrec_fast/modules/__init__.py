"""Modules over the ops: what a model is built from."""

from ._code_items import gap_bucket
from ._row_optimizers import RowAdagrad, RowSGD, RowwiseAdagrad
from ._sharded import shard_rows
from .code_target_attention import CodeTargetAttention
from .cross_batch_queue import CrossBatchQueue
from .extract_unit import ExtractUnit
from .in_batch_contrastive import InBatchContrastive
from .prefix_ngram import PairedPrefixNgramEmbedding, PrefixNgramEmbedding
from .residual_kmeans import ResidualKMeans
from .room_votes import RoomVotes
from .search_unit import SearchUnit
from .target_attention import TargetAttention

__all__ = [
    "CodeTargetAttention",
    "CrossBatchQueue",
    "ExtractUnit",
    "InBatchContrastive",
    "PairedPrefixNgramEmbedding",
    "PrefixNgramEmbedding",
    "ResidualKMeans",
    "RoomVotes",
    "RowAdagrad",
    "RowSGD",
    "RowwiseAdagrad",
    "SearchUnit",
    "TargetAttention",
    "gap_bucket",
    "shard_rows",
]

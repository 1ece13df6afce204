"""Fast kernels for live-streaming recommendation, with readable references for each."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._dispatch import BackendError, explain
from .ops.code_attention import code_attention
from .ops.code_attention_gradient import code_attention_gradient
from .ops.contrastive import in_batch_contrastive
from .ops.contrastive_multi import in_batch_contrastive_multi
from .ops.din_attention import din_attention
from .ops.history_search import history_search, history_search_codes
from .ops.kmeans_step import KMeansStep, kmeans_quanta, kmeans_step
from .ops.majority_vote import majority_vote
from .ops.pack_codes import pack_codes, unpack_codes
from .ops.prefix_ngram import prefix_ngram_lookup
from .ops.prefix_ngram_gradient import prefix_ngram_gradient
from .ops.prefix_ngram_keys import prefix_ngram_keys
from .ops.prefix_ngram_update import prefix_ngram_update
from .ops.residual_kmeans import (
    ResidualKMeansDetails,
    residual_kmeans_decode,
    residual_kmeans_details,
    residual_kmeans_encode,
)
from .ops.row_update import row_update
from .ops.search_rows import search_rows
from .ops.target_attention import target_attention
from .ops.target_attention_features import shared_attention, target_attention_features

if TYPE_CHECKING:
    from .modules import (
        CodeTargetAttention,
        CrossBatchQueue,
        ExtractUnit,
        InBatchContrastive,
        PairedPrefixNgramEmbedding,
        PrefixNgramEmbedding,
        ResidualKMeans,
        RoomVotes,
        RowAdagrad,
        RowSGD,
        RowwiseAdagrad,
        SearchUnit,
        TargetAttention,
        gap_bucket,
        shard_rows,
    )

__version__ = "0.1.0"
__all__ = [
    "BackendError",
    "CodeTargetAttention",
    "CrossBatchQueue",
    "ExtractUnit",
    "InBatchContrastive",
    "KMeansStep",
    "PairedPrefixNgramEmbedding",
    "PrefixNgramEmbedding",
    "ResidualKMeans",
    "ResidualKMeansDetails",
    "RoomVotes",
    "RowAdagrad",
    "RowSGD",
    "RowwiseAdagrad",
    "SearchUnit",
    "TargetAttention",
    "code_attention",
    "code_attention_gradient",
    "din_attention",
    "explain",
    "gap_bucket",
    "history_search",
    "history_search_codes",
    "in_batch_contrastive",
    "in_batch_contrastive_multi",
    "kmeans_quanta",
    "kmeans_step",
    "majority_vote",
    "pack_codes",
    "prefix_ngram_gradient",
    "prefix_ngram_keys",
    "prefix_ngram_lookup",
    "prefix_ngram_update",
    "residual_kmeans_decode",
    "residual_kmeans_details",
    "residual_kmeans_encode",
    "row_update",
    "search_rows",
    "shard_rows",
    "shared_attention",
    "target_attention",
    "target_attention_features",
    "unpack_codes",
]


def __getattr__(name: str) -> Any:
    """Load the modules over the ops when one is first asked for: whoever calls ops needs none."""
    if name in __all__:
        value = getattr(import_module(".modules", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

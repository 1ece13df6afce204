"""Fast kernels for live-streaming recommendation, with readable references for each."""

from ._dispatch import BackendError, explain
from .modules.prefix_ngram import PrefixNgramEmbedding
from .modules.residual_kmeans import ResidualKMeans
from .modules.room_votes import RoomVotes
from .ops.code_attention import code_attention
from .ops.contrastive import in_batch_contrastive
from .ops.history_search import history_search, history_search_codes
from .ops.kmeans_step import KMeansStep, kmeans_quanta, kmeans_step
from .ops.majority_vote import majority_vote
from .ops.pack_codes import pack_codes, unpack_codes
from .ops.prefix_ngram import prefix_ngram_lookup
from .ops.prefix_ngram_gradient import prefix_ngram_gradient
from .ops.residual_kmeans import (
    ResidualKMeansDetails,
    residual_kmeans_decode,
    residual_kmeans_details,
    residual_kmeans_encode,
)
from .ops.target_attention import target_attention

__version__ = "0.1.0"
__all__ = [
    "BackendError",
    "KMeansStep",
    "PrefixNgramEmbedding",
    "ResidualKMeans",
    "ResidualKMeansDetails",
    "RoomVotes",
    "code_attention",
    "explain",
    "history_search",
    "history_search_codes",
    "in_batch_contrastive",
    "kmeans_quanta",
    "kmeans_step",
    "majority_vote",
    "pack_codes",
    "prefix_ngram_gradient",
    "prefix_ngram_lookup",
    "residual_kmeans_decode",
    "residual_kmeans_details",
    "residual_kmeans_encode",
    "target_attention",
    "unpack_codes",
]

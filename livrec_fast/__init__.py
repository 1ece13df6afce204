"""Fast kernels for live-streaming recommendation, with readable references and honest benchmarks."""

from ._dispatch import BackendError, explain
from .ops.residual_kmeans import residual_kmeans_decode, residual_kmeans_encode

__version__ = "0.1.0"
__all__ = ["BackendError", "explain", "residual_kmeans_decode", "residual_kmeans_encode"]

"""Features and labels from logs: array code, in numba where it is installed, else in NumPy."""

from .votes import running_votes

__all__ = ["running_votes"]

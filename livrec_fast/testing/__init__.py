"""The contract that every op is held to, as plain functions that raise AssertionError.

`livrec-fast validate` runs them on a user's machine, tests/test_contract.py in the repository.
"""

from .checks import (
    check_forward,
    check_gradients,
    check_poisoned,
    check_repeat,
    check_strided,
    check_threads,
)
from .subjects import FORMULA, Subject, Target, corners, inputs_for, subjects, targets
from .validation import command, validate

__all__ = [
    "FORMULA",
    "Subject",
    "Target",
    "check_forward",
    "check_gradients",
    "check_poisoned",
    "check_repeat",
    "check_strided",
    "check_threads",
    "command",
    "corners",
    "inputs_for",
    "subjects",
    "targets",
    "validate",
]

"""What a method, its file or its loader raises when it fails, and how a table says so."""

from __future__ import annotations

from bayesdl.errors import BayesDLError

# An interrupt or a failed assertion is not among them.
FAILURES = (
    BayesDLError, ArithmeticError, AttributeError, ImportError, LookupError, MemoryError, OSError, RuntimeError,
    TypeError, ValueError,
)  # fmt: skip


def reason(error: BaseException) -> str:
    """Kind and message of an error on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__

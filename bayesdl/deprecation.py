"""What goes away warns first: one decorator for functions and classes."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from bayesdl.errors import ArgumentError

Thing = TypeVar("Thing", bound=Callable[..., Any])


def deprecated(*, since: str, removed_in: str, instead: str) -> Callable[[Thing], Thing]:
    """Warn, with a `FutureWarning` at the caller's line, when a function is called or a class is made.

    Args:
        since: version that warns first.
        removed_in: version without it, at least two minor releases later (or a new major one).
        instead: what to write in its place.

    Raises:
        ArgumentError: versions that are no versions, or less than two minor releases between them.
    """
    first, last = _version(since), _version(removed_in)
    if not (last[0] > first[0] or (last[0] == first[0] and last[1] >= first[1] + 2)):
        raise ArgumentError(
            f"deprecated since {since} and removed in {removed_in}; a name warns for at least two minor releases"
        )

    def decorate(thing: Thing) -> Thing:
        text = f"{thing.__qualname__} is deprecated since {since} and goes away in {removed_in}; use {instead}"
        if isinstance(thing, type):
            made: Any = thing
            original = made.__init__

            @functools.wraps(original)
            def initialise(self: Any, *args: Any, **options: Any) -> None:
                if type(self) is thing:  # not for subclasses, whose users cannot change it
                    warnings.warn(text, FutureWarning, stacklevel=2)
                original(self, *args, **options)

            made.__init__ = initialise
            return made

        @functools.wraps(thing)
        def call(*args: Any, **options: Any) -> Any:
            warnings.warn(text, FutureWarning, stacklevel=2)
            return thing(*args, **options)

        return call  # type: ignore[return-value]

    return decorate


def _version(text: str) -> tuple[int, int]:
    parts = text.split(".")
    if len(parts) < 2 or not all(part.isdigit() for part in parts):
        raise ArgumentError(f'{text!r} is no version; expected "1.2" or "1.2.0"')
    return int(parts[0]), int(parts[1])

"""What goes away warns at the caller's line, and goes on working."""

from __future__ import annotations

import inspect
import warnings

import pytest

from bayesdl.deprecation import deprecated
from bayesdl.errors import ArgumentError


def test_a_function_warns_where_it_is_called_and_still_works() -> None:
    @deprecated(since="1.2", removed_in="1.4", instead="new(x)")
    def old(x: int) -> int:
        """Twice x."""
        return 2 * x

    with pytest.warns(FutureWarning, match=r"old is deprecated since 1.2 and goes away in 1.4; use new\(x\)") as seen:
        assert old(3) == 6
    assert seen[0].filename == __file__
    assert old.__doc__ == "Twice x."
    assert list(inspect.signature(old).parameters) == ["x"]


def test_a_class_warns_when_it_is_made_and_stays_a_class() -> None:
    @deprecated(since="0.3", removed_in="1.0", instead="New()")
    class Old:
        def __init__(self, x: int) -> None:
            self.x = x

    with pytest.warns(FutureWarning, match="goes away in 1.0") as seen:
        made = Old(4)
    assert seen[0].filename == __file__
    assert isinstance(made, Old)
    assert made.x == 4

    class Own(Old):
        pass

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Own(5).x == 5


@pytest.mark.parametrize(
    ("since", "removed"), [("1.2", "1.3"), ("1.2", "1.2"), ("2.0", "1.9"), ("1", "2"), ("1.x", "2.0")]
)
def test_time_to_change(since: str, removed: str) -> None:
    with pytest.raises(ArgumentError, match=r"two minor releases|no version"):
        deprecated(since=since, removed_in=removed, instead="it")

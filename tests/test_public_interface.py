"""Nothing public vanishes or changes its defaults by accident; what is new is free.

After a change on purpose (a line in the changelog, a `deprecated` where users must change their code):
`python -m tests.public_interface`.
"""

from __future__ import annotations

import json

from tests.public_interface import RECORD, interface


def test_what_was_public_still_is() -> None:
    before, now = json.loads(RECORD.read_text(encoding="utf-8")), interface()
    assert len(before) > 300
    assert [name for name in before if name not in now] == [], "public names are gone"


def test_parameters_keep_their_names_and_defaults() -> None:
    before, now = json.loads(RECORD.read_text(encoding="utf-8")), interface()
    for name in before.keys() & now.keys():
        changed = {
            key: (value, now[name].get(key)) for key, value in before[name].items() if now[name].get(key) != value
        }
        assert not changed, f"{name}: {changed}; parameters were (before, now)"


def test_new_parameters_come_last_or_by_keyword() -> None:
    """So that calls by position keep their meaning."""
    before, now = json.loads(RECORD.read_text(encoding="utf-8")), interface()
    for name in before.keys() & now.keys():
        order = [key for key, kind in before[name].items() if not kind.startswith("*")]
        present = [key for key, kind in now[name].items() if not kind.startswith("*")]
        if not name.endswith("[]"):
            assert present[: len(order)] == order, name

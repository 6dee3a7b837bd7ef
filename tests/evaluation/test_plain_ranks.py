"""The short ways to AUROC and AURC without weights give what the general ones give, whatever ties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bayesdl.evaluation import ranking, selective


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=30))
def test_any_ties(pairs: list[tuple[int, bool]]) -> None:
    scores = torch.tensor([float(s) for s, _ in pairs])
    flags = torch.tensor([f for _, f in pairs])
    ones = torch.ones(len(pairs))
    for loss in (flags, torch.linspace(0, 1, len(pairs))):
        found = selective.aurc(scores, loss)
        assert found == pytest.approx(selective.aurc(scores, loss, weights=ones), abs=1e-12)
        assert selective.aurc(scores.long(), loss) == pytest.approx(found, abs=1e-12)
    if 0 < int(flags.sum()) < len(flags):
        found = ranking.auroc(scores, flags)
        assert found == pytest.approx(ranking.auroc(scores, flags, weights=ones), abs=1e-12)
        assert ranking.auroc(scores.long(), flags) == pytest.approx(found, abs=1e-12)

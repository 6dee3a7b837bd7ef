"""Held-out tuning of a Laplace posterior against brute force: every candidate predicted anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import bayesdl as bdl
from bayesdl.curvature.registry import STRUCTURES
from bayesdl.errors import ArgumentError, NonFiniteError, ShapeError, UnknownNameError, UnsupportedError
from bayesdl.model import BayesianModel
from bayesdl.tuning.grid import least, losses, passes
from bayesdl.tuning.scores import SCORES
from tests.tuning.test_evidence import data, fitted, gaussian, trained

GRID = [0.001, 0.01, 0.1, 1.0, 10.0]


def validation(likelihood: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(30, 2, dtype=torch.float64, generator=g)
    if likelihood == "categorical":
        y = (torch.sin(2 * x[:, 0]) + 0.3 * torch.randn(30, dtype=torch.float64, generator=g) > 0).long()
    else:
        y = torch.stack([torch.sin(2 * x[:, 0]), x[:, 0] * x[:, 1]], 1)
        y = y + torch.randn(30, 2, dtype=torch.float64, generator=g) * torch.tensor([0.1, 0.5], dtype=torch.float64)
    return [(x[:11], y[:11]), (x[11:], y[11:])]


def nll(model: BayesianModel, loader: Any) -> float:
    """Mean NLL by prediction."""
    y = torch.cat([target for _, target in loader])
    return float(-model.predict(loader).log_prob(y).mean())


def at(model: BayesianModel, precision: float, noise: torch.Tensor | None = None) -> BayesianModel:
    posterior = gaussian(model).with_prior(torch.tensor(precision, dtype=torch.float64), noise)
    likelihood = model.likelihood if noise is None else bdl.Gaussian(noise)
    return model.replaced(posterior=posterior, likelihood=likelihood)


@pytest.mark.parametrize("link", ["probit", "bridge", "mc"])
@pytest.mark.parametrize("structure", sorted(STRUCTURES))
def test_prior_precision_is_the_best_of_the_grid(structure: str, link: str) -> None:
    bayes = fitted("categorical", structure=structure, temperature=0.7)
    bayes = bayes.replaced(likelihood=bdl.Categorical(link=link))
    loader = validation("categorical")
    scores = [nll(at(bayes, value), loader) for value in GRID]
    tuned = bayes.tune("heldout", loader, grid=GRID)
    best = min(range(len(GRID)), key=scores.__getitem__)
    assert float(gaussian(tuned).precision) == GRID[best]
    assert nll(tuned, loader) == pytest.approx(scores[best], rel=1e-10)
    assert min(abs(a - b) for i, a in enumerate(scores) for b in scores[:i]) > 1e-6  # the choice is no tie


@pytest.mark.parametrize("structure", sorted(STRUCTURES))
def test_given_noise_is_kept(structure: str) -> None:
    bayes = fitted("gaussian", 0.3, structure=structure)
    loader = validation("gaussian")
    scores = [nll(at(bayes, value), loader) for value in GRID]
    tuned = bayes.tune("heldout", loader, grid=GRID)
    assert float(gaussian(tuned).precision) == GRID[min(range(len(GRID)), key=scores.__getitem__)]
    assert tuned.likelihood.noise == 0.3  # type: ignore[attr-defined]


@pytest.mark.parametrize(("kind", "power"), [("ggn", 2), ("mc", 2), ("empirical", 4)])
@pytest.mark.parametrize("structure", sorted(STRUCTURES))
def test_prior_and_noise_together_are_the_best_of_the_grid(structure: str, kind: str, power: int) -> None:
    # the grid holds values of noise^power * precision; each is tried here with 40 noises, then 20 around the best
    bayes = fitted("gaussian", structure=structure, kind=kind, temperature=0.7)
    posterior, loader = gaussian(bayes), validation("gaussian")
    assert posterior.noise is not None
    relative = posterior.noise if posterior.parts else torch.ones_like(posterior.noise)
    tuned = bayes.tune("heldout", loader, grid=GRID)
    found = nll(tuned, loader)

    def score(k: float, log_s: float) -> float:
        return nll(at(bayes, k / 10 ** (log_s * power), 10**log_s * relative), loader)

    scores = []
    for k in GRID:
        coarse = torch.linspace(-1.5, 1.0, 40, dtype=torch.float64).tolist()
        middle = min(coarse, key=lambda log_s: score(k, log_s))
        fine = torch.linspace(middle - 0.065, middle + 0.065, 20, dtype=torch.float64).tolist()
        scores.append(min(score(k, log_s) for log_s in fine))
    assert found <= min(scores) + 1e-9
    assert found > min(scores) - 1e-3  # and is what a prediction gives, not less
    factor = (gaussian(tuned).noise / relative)[0]  # type: ignore[operator]
    candidate = float(gaussian(tuned).precision * factor**power)
    assert candidate == pytest.approx(GRID[scores.index(min(scores))], rel=1e-9)


def test_default_grid_and_the_end_of_a_grid_is_said() -> None:
    bayes = fitted("categorical", structure="diag")
    loader = validation("categorical")
    wide = bayes.tune("heldout", loader)
    assert nll(wide, loader) <= min(nll(at(bayes, value), loader) for value in GRID) + 1e-3
    narrow = bayes.tune("heldout", loader, grid=[1e-3])
    assert any("end of the grid" in finding.text for finding in narrow.diagnose().warnings)


def test_batches_of_the_held_out_data_do_not_matter() -> None:
    bayes = fitted("gaussian", structure="kron")
    loader = validation("gaussian")
    whole = [tuple(torch.cat(parts) for parts in zip(*loader, strict=True))]
    first, second = bayes.tune("heldout", loader), bayes.tune("heldout", whole)
    torch.testing.assert_close(gaussian(first).precision, gaussian(second).precision, rtol=1e-8, atol=0.0)
    torch.testing.assert_close(gaussian(first).noise, gaussian(second).noise, rtol=1e-8, atol=0.0)


def test_refusals() -> None:
    bayes = fitted("categorical")
    with pytest.raises(ArgumentError, match="val_loader"):
        bayes.tune("heldout")
    for grid in ([], [1.0, -1.0], [[1.0]]):
        with pytest.raises(ArgumentError, match="positive"):
            bayes.tune("heldout", [data("categorical")], grid=grid)


@pytest.mark.parametrize("link", ["probit", "bridge", "mc"])
@pytest.mark.parametrize("structure", sorted(STRUCTURES))
def test_losses_of_a_fine_grid_are_those_of_every_candidate(structure: str, link: str) -> None:
    # covariances between few precisions are combinations, right to one part in a million
    bayes = fitted("categorical", structure=structure, temperature=0.7)
    bayes = bayes.replaced(likelihood=bdl.Categorical(link=link))
    loader, grid = validation("categorical"), torch.logspace(-3, 3, 60, dtype=torch.float64)
    table = losses(bayes, gaussian(bayes), grid, passes(bayes, gaussian(bayes), loader, "", False))
    assert table.shape == (60, 30)
    for i in range(0, 60, 7):
        model = at(bayes, float(grid[i]))
        truth = torch.cat([-model(x).log_prob(y) for x, y in loader])
        torch.testing.assert_close(table[i], truth, rtol=0.0, atol=3e-6)


def test_losses_in_pieces_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    bayes, loader = fitted("categorical", structure="kron"), validation("categorical")
    grid = torch.logspace(-3, 3, 60, dtype=torch.float64)
    whole = losses(bayes, gaussian(bayes), grid, passes(bayes, gaussian(bayes), loader, "", False, candidates=60))
    monkeypatch.setattr("bayesdl.tuning.grid.HELD", 1000)
    rows = list(passes(bayes, gaussian(bayes), loader, "", False, candidates=60))
    assert max(len(mean) for mean, _, _ in rows) == 4  # 60 covariances of 2 x 2
    torch.testing.assert_close(losses(bayes, gaussian(bayes), grid, rows), whole, rtol=1e-9, atol=1e-9)


def test_one_standard_error_takes_the_largest_precision_that_is_not_clearly_worse() -> None:
    bayes, loader = fitted("categorical", structure="kron"), validation("categorical")
    table = torch.stack([torch.cat([-at(bayes, p)(x).log_prob(y) for x, y in loader]) for p in GRID])
    gap = table - table[table.mean(1).argmin()]
    near = gap.mean(1) <= gap.std(1) / 30**0.5
    assert 1 < int(near.sum()) < len(GRID)
    tuned = bayes.tune("heldout", loader, grid=GRID, standard_errors=1.0)
    assert float(gaussian(tuned).precision) == max(p for p, ok in zip(GRID, near, strict=True) if ok)
    assert "within 1 standard errors" in str([f.text for f in tuned.record.findings])
    with pytest.raises(ArgumentError, match="standard_errors=-1"):
        bayes.tune("heldout", loader, standard_errors=-1)


def test_losses_that_are_not_numbers_are_never_the_least() -> None:
    assert least(torch.tensor([torch.nan, 3.0, 2.0, torch.inf])) == 2
    with pytest.raises(NonFiniteError, match="every prior precision"):
        least(torch.tensor([torch.nan, torch.inf]))


@pytest.mark.parametrize("rule", ["evidence", "heldout", "loo", "training"])
def test_all_rules_take_progress_and_name_options_that_they_do_not_take(rule: str) -> None:
    model = fitted("categorical", structure="diag")
    model.tune(rule, validation("categorical"), progress=False)
    with pytest.raises(ArgumentError, match=rf"tune\(\"{rule}\"\) was given metric; it takes"):
        model.tune(rule, validation("categorical"), metric="brier")


@pytest.mark.parametrize("structure", ["diag", "kron"])
def test_brier_and_functions_choose_the_best_of_the_grid(structure: str) -> None:
    bayes, loader = fitted("categorical", structure=structure), validation("categorical")
    y = torch.cat([target for _, target in loader])

    def quadratic(p: Any, target: torch.Tensor) -> torch.Tensor:
        return (p.probs - torch.eye(2, dtype=p.probs.dtype)[target]).square().sum(-1)

    values = [float(quadratic(at(bayes, v).predict(loader).distribution, y).mean()) for v in GRID]
    best = GRID[min(range(len(GRID)), key=values.__getitem__)]
    for score in ("brier", quadratic):
        assert float(gaussian(bayes.tune("heldout", loader, grid=GRID, score=score)).precision) == best


def test_crps_of_normal_marginals() -> None:
    bayes, loader = fitted("gaussian", 0.3, structure="full"), validation("gaussian")
    y = torch.cat([target for _, target in loader])

    def by_quadrature(model: BayesianModel) -> float:  # integral of (F(t) - 1[t >= y])^2
        found = model.predict(loader)
        t = torch.linspace(-12, 12, 24001, dtype=torch.float64)[:, None, None]
        below = torch.distributions.Normal(found.mean, found.variance.sqrt()).cdf(t)
        return float((below - (t >= y).double()).square().sum(0).mul(24 / 24000).sum(-1).mean())

    values = [by_quadrature(at(bayes, v)) for v in GRID]
    best = min(range(len(GRID)), key=values.__getitem__)
    tuned = bayes.tune("heldout", loader, grid=GRID, score="crps")
    assert float(gaussian(tuned).precision) == GRID[best]
    exact = SCORES["crps"](tuned.predict(loader).distribution, y)
    assert float(exact.mean()) == pytest.approx(values[best], abs=2e-3)


def test_scores_that_do_not_fit_are_named() -> None:
    classes, numbers = fitted("categorical", structure="diag"), fitted("gaussian", 0.3, structure="diag")
    with pytest.raises(UnknownNameError, match="'nlll' is not known; choose one of"):
        classes.tune("heldout", validation("categorical"), score="nlll")
    with pytest.raises(UnsupportedError, match="crps.*Categorical"):
        classes.tune("heldout", validation("categorical"), score="crps")
    with pytest.raises(UnsupportedError, match="brier"):
        numbers.tune("heldout", validation("gaussian"), score="brier")
    with pytest.raises(ShapeError, match="one loss an observation"):
        classes.tune("heldout", validation("categorical"), score=lambda p, y: p.probs)
    with pytest.raises(UnsupportedError, match="noise is chosen here too"):
        fitted("gaussian", structure="diag").tune("heldout", validation("gaussian"), score="crps")


def test_temperature_by_brier() -> None:
    x, y = data("categorical")
    plain = bdl.wrap(trained("categorical"), "map", likelihood="categorical", progress=False)
    tuned = plain.tune("heldout", [(x, y)], score="brier")
    log_t = torch.linspace(-3, 3, 2001, dtype=torch.float64)
    logits = plain(x).latent.mean
    grid = torch.stack([(torch.softmax(logits / t.exp(), -1) - torch.eye(2)[y]).square().sum(-1).mean() for t in log_t])
    found = (tuned(x).distribution.probs - torch.eye(2)[y]).square().sum(-1).mean()
    assert float(found) == pytest.approx(float(grid.min()), rel=1e-5)

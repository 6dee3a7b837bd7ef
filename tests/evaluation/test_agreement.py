from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.errors import ArgumentError, ShapeError, UnsupportedError
from bayesdl.evaluation import agreement, total_variation
from bayesdl.posteriors import SamplePosterior


def ensemble(seed: int, outputs: int = 3, likelihood: str = "categorical") -> bdl.BayesianModel:
    torch.manual_seed(seed)
    nets = [nn.Linear(2, outputs) for _ in range(4)]
    states = [{name: p.detach() for name, p in net.named_parameters()} for net in nets]
    return bdl.BayesianModel(nets[0], SamplePosterior.from_states(states), likelihood)


def data() -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    return list(zip(x.split(7), torch.zeros(20, dtype=torch.long).split(7), strict=True))


def test_by_hand() -> None:
    p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.5, 0.4]])
    q = torch.tensor([[0.4, 0.5, 0.1], [0.2, 0.8, 0.0]])
    assert agreement(p, q) == 0.5
    assert total_variation(p, q) == pytest.approx((0.3 + 0.4) / 2)
    assert agreement(p, p) == 1.0 and total_variation(p, p) == 0.0
    assert total_variation(torch.eye(2), torch.eye(2).flip(0)) == 1.0


def test_of_one_label_equals_two_classes() -> None:
    p, q = torch.tensor([0.9, 0.4, 0.2]), torch.tensor([0.8, 0.6, 0.1])
    two = [torch.stack([1 - v, v], -1) for v in (p, q)]
    assert agreement(p, q) == agreement(*two) == pytest.approx(2 / 3)
    assert total_variation(p, q) == pytest.approx(total_variation(*two))


def test_models_and_predictives() -> None:
    first, second = ensemble(0), ensemble(1)
    p, q = first.predict(data()), second.predict(data())
    expected = float((p.probs - q.probs).abs().sum(-1).mean() / 2)
    assert total_variation(first, second, data()) == pytest.approx(expected, rel=1e-6)
    assert total_variation(p, q) == pytest.approx(expected, rel=1e-6) and expected > 0.01
    assert agreement(first, q.probs, data()) == float((p.probs.argmax(-1) == q.probs.argmax(-1)).double().mean())
    labels = ensemble(2, 3, "bernoulli"), ensemble(3, 3, "bernoulli")
    a, b = (model.predict(data()).probs for model in labels)
    assert total_variation(*labels, data()) == pytest.approx(float((a - b).abs().mean()), rel=1e-6)
    assert agreement(*labels, data()) == float(((a > 0.5) == (b > 0.5)).double().mean())


def test_refusals() -> None:
    p = torch.full((2, 3), 1 / 3)
    with pytest.raises(ShapeError, match="same kind"):
        agreement(p, p[:1])
    with pytest.raises(ArgumentError, match="loader"):
        agreement(ensemble(0), p)
    with pytest.raises(ArgumentError, match="once"):
        agreement(ensemble(0), ensemble(1), iter(data()))
    with pytest.raises(UnsupportedError, match="no class probabilities"):
        total_variation(ensemble(0, 1, "gaussian"), ensemble(1, 1, "gaussian"), data())

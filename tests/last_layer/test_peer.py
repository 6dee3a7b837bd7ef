"""Defects of the peer package vbll that this library must not have: the peer shows each one, our head does not."""

import pytest
import torch

from bayesdl.last_layer import Classification, Generative, Regression

pytestmark = pytest.mark.peer
vbll = pytest.importorskip("vbll", reason="vbll is not installed")

D, K, N = 4, 3, 100
X = torch.randn(5, D, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 1, 0])


def test_two_calls_in_eval_mode_agree():
    torch.manual_seed(0)
    peer = vbll.DiscClassification(D, K, regularization_weight=1 / N, parameterization="dense").eval()
    apart = (peer(X).predictive.probs - peer(X).predictive.probs).abs().max()
    assert float(apart.detach()) > 0.01
    ours = Classification(D, K, num_data=N, init_scale=1.0).eval()
    assert torch.equal(ours(X).predictive.probs, ours(X).predictive.probs)


def test_the_noise_starts_where_it_is_told_to():
    starts = []
    for seed in range(20):
        torch.manual_seed(seed)
        peer = vbll.Regression(D, 1, regularization_weight=1 / N, parameterization="dense")
        starts.append(float(peer.noise().scale.detach().flatten()[0]))
    assert max(starts) / min(starts) > 1e3
    ours = []
    for seed in range(20):
        torch.manual_seed(seed)
        ours.append(float(Regression(D, 1, num_data=N, init_noise=0.7).log_noise.detach().exp()))
    assert max(ours) == min(ours) == pytest.approx(0.7)


def test_tokens_have_a_loss():
    tokens, labels = X.expand(2, 5, D), LABELS.expand(2, 5)
    peer = vbll.DiscClassification(D, K, regularization_weight=1 / N, parameterization="dense")
    with pytest.raises(IndexError):
        peer(tokens).train_loss_fn(labels)
    ours = Classification(D, K, num_data=N)
    assert torch.allclose(ours(tokens).loss(labels), ours(X).loss(LABELS))


def test_precision_covariances_have_a_loss_for_classes():
    peer = vbll.DiscClassification(D, K, regularization_weight=1 / N, parameterization="dense_precision")
    with pytest.raises(UnboundLocalError):
        peer(X).train_loss_fn(LABELS)
    ours = Classification(D, K, num_data=N, covariance="precision")
    ours(X).loss(LABELS).backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in ours.parameters())


def test_the_generative_head_works_as_it_comes():
    with pytest.raises(NotImplementedError):
        vbll.GenClassification(D, K, regularization_weight=1 / N)(X).train_loss_fn(LABELS)
    ours = Generative(D, K, num_data=N)
    ours(X).loss(LABELS).backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in ours.parameters())

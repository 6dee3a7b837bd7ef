"""A fitted model as a plain module: equal to its own predictive, through torch.export and ONNX, for any batch."""

import io
import warnings

import pytest
import torch
from torch import nn

import bayesdl as bdl
from bayesdl.errors import UnsupportedError
from bayesdl.evaluation import Predictions, ood_score
from bayesdl.integrations.export import export_head
from bayesdl.last_layer import Prototype
from tests.untouched import untouched


def net(outputs=2):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, outputs))


GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(60, 3, generator=GENERATOR)
Y = torch.stack([X.sin().sum(1), X[:, 0] * X[:, 1]], 1) + 0.3 * torch.randn(60, 2, generator=GENERATOR)
LABELS = (Y[:, 0] > 0).long()
FRESH = torch.randn(7, 3, generator=GENERATOR)


def wrap(method, target, likelihood, **options):
    return bdl.wrap(net(), method, [(X, target)], likelihood=likelihood, progress=False, **options)


def prototypes():
    copy = bdl.replace(net(), "2", head := Prototype(6, covariance="full")).eval()
    with torch.no_grad():
        head.observe(copy[:2](X), LABELS)
    return bdl.BayesianModel(copy, head.posterior(), head.likelihood())


LAST = bdl.Laplace(select="last_layer", structure="kron")
MODELS = {
    "vbll regression": lambda: wrap(bdl.VBLL(tuning="evidence"), Y, "gaussian"),
    "vbll proper": lambda: wrap(bdl.VBLL(intercept="proper", tuning="evidence"), Y, "gaussian"),
    "vbll no intercept": lambda: wrap(bdl.VBLL(intercept="none", tuning="evidence"), Y, "gaussian"),
    "student-t": lambda: wrap(bdl.StudentT(tuning="evidence"), Y, "gaussian"),
    "vbll classes": lambda: wrap("vbll", LABELS, "categorical"),
    "vbll diag": lambda: wrap(bdl.VBLL(covariance="diag"), LABELS, "categorical"),
    "vbll labels": lambda: wrap(bdl.VBLL(covariance="shared"), (Y > 0).float(), "bernoulli"),
    "vbll trained": lambda: wrap(bdl.VBLL(mode="full", epochs=2), LABELS, "categorical"),
    "laplace kron": lambda: wrap(LAST, LABELS, "categorical", prior=bdl.GaussianPrior(precision=2.0)),
    "laplace full": lambda: wrap(bdl.Laplace(select="last_layer", structure="full"), Y, "gaussian"),
    "laplace diag": lambda: wrap(bdl.Laplace(select="last_layer", structure="diag"), Y, bdl.Gaussian(0.4)),
    "temperature": lambda: wrap("temperature", LABELS, "categorical"),
    "cold vbll": lambda: wrap("vbll", LABELS, "categorical").tune("heldout", [(FRESH, LABELS[:7])]),
    "map": lambda: wrap("map", Y, "gaussian"),
    "prototypes": prototypes,
}


def expected(bayes, x):
    pred = bayes(x)
    if pred.task == "regression":
        return pred.mean, pred.variance
    return pred.probs, pred.latent.variance


@pytest.mark.parametrize("name", MODELS)
def test_the_module_is_the_predictive_and_exports_with_any_batch(name):
    bayes = MODELS[name]()
    with untouched(bayes.network.template):
        module = export_head(bayes)
    assert not any(p.requires_grad for p in module.trunk.parameters())
    rows = torch.export.Dim("rows", min=2, max=4096)
    program = torch.export.export(module, (X,), dynamic_shapes={"inputs": ({0: rows},)})
    for given in (X, FRESH):
        for found in (module(given), program.module()(given)):
            for mine, theirs in zip(found, expected(bayes, given), strict=True):
                assert torch.allclose(mine, theirs.float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["vbll regression", "student-t", "two outputs", "vbll classes", "vbll labels"])
def test_the_score_is_that_of_the_predictive(name):
    if name == "two outputs":  # a mean and a log variance, of which the first alone is f
        head = bdl.Laplace(select="last_layer", structure="full")
        bayes = wrap(head, Y[:, :1], bdl.Heteroscedastic())
    else:
        bayes = MODELS[name]()
    module, plain = export_head(bayes, score=True), export_head(bayes)
    pred = bayes(FRESH)
    wanted = pred.epistemic.mean(-1) if pred.task == "regression" else pred.entropy
    # entropies of evaluations are of draws of f instead of the probit link
    slack = 0.0 if pred.task == "regression" else 0.01
    assert torch.allclose(ood_score(Predictions.from_predictive(pred)), wanted.double(), rtol=1e-5, atol=slack)
    rows = torch.export.Dim("rows", min=2, max=4096)
    program = torch.export.export(module, (X,), dynamic_shapes={"inputs": ({0: rows},)}).module()
    for found in (module(FRESH), program(FRESH)):
        assert len(found) == 3 and found[2].shape == (7,)
        assert torch.allclose(found[2], wanted.float(), atol=1e-5, rtol=1e-4)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found[:2], plain(FRESH), strict=True))


def test_the_score_of_certain_classes_is_zero():
    sure = nn.Sequential(nn.Linear(3, 2))
    nn.init.zeros_(sure[0].weight)
    with torch.no_grad():
        sure[0].bias.copy_(torch.tensor([500.0, -500.0]))
    found = export_head(bdl.wrap(sure, "map", likelihood="categorical"), score=True)(FRESH)
    assert torch.equal(found[2], torch.zeros(7))


@pytest.mark.parametrize("name", ["vbll regression", "vbll classes", "laplace kron", "temperature", "student-t"])
def test_onnx(name):
    pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    bayes = MODELS[name]()
    module = export_head(bayes, score=True)
    rows = torch.export.Dim("rows", min=2, max=4096)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter itself
        program = torch.onnx.export(
            module,
            (X,),
            dynamo=True,
            dynamic_shapes={"inputs": ({0: rows},)},
            verbose=False,
        )
    program.save(buffer)
    session = runtime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    for given in (X, FRESH):
        found = session.run(None, {session.get_inputs()[0].name: given.numpy()})
        wanted = (*expected(bayes, given), module(given)[2])
        for mine, theirs in zip(found, wanted, strict=True):
            assert torch.allclose(torch.as_tensor(mine), theirs.float(), atol=1e-5, rtol=1e-4)


def test_what_needs_several_passes_or_draws_is_refused():
    with pytest.raises(UnsupportedError, match="needs several passes or draws"):
        export_head(bdl.wrap([net(), net()], "ensemble", likelihood=bdl.Gaussian(0.1), progress=False))
    with pytest.raises(UnsupportedError, match='link="mc" is not exported'):
        export_head(wrap("vbll", LABELS, bdl.Categorical(link="mc")))
    with pytest.raises(UnsupportedError, match="only one over the whole last layer"):
        export_head(wrap(bdl.Laplace(), LABELS, "categorical", prior=bdl.GaussianPrior(precision=2.0)))

"""A Bayesian model in the place of a transformers model: for `Trainer.predict`, `Trainer.evaluate` and pipelines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from bayesdl.errors import UnsupportedError, require

if TYPE_CHECKING:
    from bayesdl.model import BayesianModel


@final
class PredictiveModule(nn.Module):
    """Keyword arguments in, a `SequenceClassifierOutput` out; its logits are log mean probabilities."""

    accepts_loss_kwargs = False  # read by the Trainer: the loss is a mean, whatever the number of items

    def __init__(self, bayes: BayesianModel) -> None:
        super().__init__()
        self.bayes = bayes
        self.config = getattr(bayes.network.template, "config", None)
        self.eval()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **rest: Any,
    ) -> Any:
        """Log mean probabilities `(B, C)` as `.logits`; with labels their mean negative log-likelihood as `.loss`.

        Raises:
            UnsupportedError: in training mode; nothing here can be trained.
        """
        if self.training:
            raise UnsupportedError("a Bayesian model predicts in eval mode and has nothing to train; call .eval()")
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        batch = {key: value for key, value in given.items() if value is not None} | rest
        with torch.no_grad():
            prediction = self.bayes(batch)
            logits = prediction.mean.log().clamp(min=torch.finfo(prediction.mean.dtype).min)
            loss = None
            if labels is not None:
                seen, target, _ = prediction.observed(labels)
                loss = -seen.log_prob(target).mean()
        outputs = require("transformers.modeling_outputs", extra="llm")
        return outputs.SequenceClassifierOutput(loss=loss, logits=logits)


def as_module(bayes: BayesianModel) -> PredictiveModule:
    """A classifier made Bayesian as a module that `transformers.Trainer` can evaluate.

        Trainer(model=as_module(bayes), args=TrainingArguments(...)).predict(test_set)

    Args:
        bayes: any method, with the categorical likelihood.

    Raises:
        UnsupportedError: another likelihood, which has no log probabilities to stand for logits.
    """
    if bayes.likelihood.task != "classification":
        raise UnsupportedError(
            f"the {bayes.likelihood.name} likelihood has no class probabilities; call the model itself"
        )
    return PredictiveModule(bayes)

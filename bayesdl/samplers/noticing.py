"""What a chain warns of: losses that are no sums over the data, and what it cannot restore."""

from __future__ import annotations

import warnings
from collections.abc import Sized
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from bayesdl.diagnose import Finding
from bayesdl.samplers.packing import has_state


class StochasticForwardWarning(UserWarning):
    """The loss of an example depends on chance, or on the other examples of its batch."""


class ResumeWarning(UserWarning):
    """Something that decides the steps to come was not restored."""


def notice_stochastic_passes(net: nn.Module) -> None:
    """Warn once of active dropout and of batch norm in train mode."""
    modules = list(net.named_modules())
    dropout = [name for name, part in modules if isinstance(part, _DropoutNd) and part.training and part.p > 0]
    norm = [name for name, part in modules if isinstance(part, _BatchNorm) and part.training]
    if dropout:
        warnings.warn(
            f"dropout {dropout[0]!r} is active: the chain samples the law of a noisier loss than the posterior's; "
            "put it in eval mode",
            StochasticForwardWarning,
            stacklevel=7,
        )
    if norm:
        warnings.warn(
            f"batch norm {norm[0]!r} is in train mode: the loss of an example depends on its batch, and is no term of "
            "a sum over the data; each sample keeps the running statistics of its own pass",
            StochasticForwardWarning,
            stacklevel=7,
        )


def miscounted(loader: Any, num_data: int) -> list[Finding]:
    """A finding where a sampler counts another number of examples than the loader's data set holds."""
    held = getattr(getattr(loader, "loader", loader), "dataset", None)
    if not isinstance(held, Sized) or len(held) == num_data:
        return []
    text = (
        f"the sampler takes num_data={num_data} and the loader's data set holds {len(held)} examples: the likelihood "
        f"of each counts {num_data / len(held):.3g} times, the prior once"
    )
    return [Finding("warning", text, "num_data=len(dataset), unless targets are ignored, or many belong to an example")]


def notice_unrestored(loader: Any) -> None:
    """Warn of a loader whose place in the data a chain cannot restore."""
    if loader is not None and not has_state(loader):
        warnings.warn(
            f"the loader ({type(loader).__name__}) has no state_dict: its order of the data was not restored, and the "
            "chain goes on with other batches than it would have; bdl.samplers.Batches(loader) has one",
            ResumeWarning,
            stacklevel=3,
        )

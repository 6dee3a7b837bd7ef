"""Put a Bayesian head in the place of a network's last layer, on a copy; and what an optimiser needs to know of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bayesdl.clone import structural_clone, unwrap
from bayesdl.errors import ArgumentError, SelectionError, ShapeError
from bayesdl.last_layer.head import Head


def replace(
    model: nn.Module, name: str, head: Head, *, keep_weights: bool = True, share_trunk: bool = False
) -> nn.Module:
    """A copy of `model` whose layer `name` is `head`; `model` keeps its own.

    Args:
        model: any network, in any mode; the copy is in the same one.
        name: the layer to replace, an `nn.Linear` with the head's sizes.
        head: e.g. `bdl.last_layer.Classification(512, 10, num_data=N)`; it becomes part of the copy.
        keep_weights: start the head's means at the layer's weights, so that the copy's first predictions are those of
            `model`.
        share_trunk: the copy shares the other parameters instead of copying them, for trunks that stay frozen.

    Returns:
        the copy; calling it gives a `HeadOutput`, or a plain tensor with `tensor_output=True`.

    Raises:
        SelectionError: no such layer, or it is not linear; the message lists the linear layers.
        ShapeError: the head has other sizes than the layer.
    """
    if not isinstance(head, Head):
        raise ArgumentError(f"head is {type(head).__name__}; pass e.g. bdl.last_layer.Classification(...)")
    source = unwrap(model)
    modules = dict(source.named_modules())
    old = modules.get(name)
    if not isinstance(old, nn.Linear):
        linear = [n for n, module in modules.items() if isinstance(module, nn.Linear)]
        what = "there is no such layer" if old is None else f"it is {type(old).__name__}"
        raise SelectionError(f"layer {name!r} cannot be replaced: {what}; the linear layers are {linear}")
    if not head.takes(old):
        raise ShapeError(
            f"layer {name!r} maps {old.in_features} features to {old.out_features} outputs and the head "
            f"{head.in_features} to {head.out_features}"
        )
    copy = structural_clone(source, _shared if share_trunk else _copied, _same if share_trunk else _cloned)
    for path, module in copy.named_modules():  # a structural clone is in eval mode
        module.training = modules[path].training
    # a head computes in at least single precision
    head.to(device=old.weight.device, dtype=torch.promote_types(old.weight.dtype, torch.float32)).train(old.training)
    if keep_weights:
        head.start_from(old)
    if not name:
        return head
    parent, _, attribute = name.rpartition(".")
    setattr(copy.get_submodule(parent), attribute, head)
    return copy


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser: decay on the trunk, none on Bayesian heads, whose prior is in their loss."""
    heads = {id(p) for module in model.modules() if isinstance(module, Head) for p in module.parameters()}
    trunk = [p for p in model.parameters() if p.requires_grad and id(p) not in heads]
    own = [p for p in model.parameters() if p.requires_grad and id(p) in heads]
    groups = [{"params": trunk, "weight_decay": weight_decay}, {"params": own, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _copied(tensor: Tensor) -> Tensor:
    return nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad)


def _cloned(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _shared(tensor: Tensor) -> Tensor:
    return tensor


def _same(tensor: Tensor) -> Tensor:
    return tensor

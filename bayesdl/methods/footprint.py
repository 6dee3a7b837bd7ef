"""How much memory a step of one chain touches: what decides whether chains gain by sharing their passes."""

from __future__ import annotations

import torch
from torch import Tensor

from bayesdl.data import in_batch
from bayesdl.methods.chains import Job, start


def footprint(job: Job) -> int:
    """Bytes of the weights that move and of what a forward pass over the first batch keeps for the backward pass.

    A number of the network and of the batch alone. The chain is a throw-away one: no weight and no stream moves.

    Args:
        job: without a store.

    Raises:
        NonFiniteError, ShapeError, LabelError: bad data; the message names the batch.
    """
    live = start(job)
    number, inputs, target = next(live.source)
    known = {t.untyped_storage().data_ptr() for t in (*live.module.parameters(), *live.module.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with in_batch(number), torch.enable_grad(), hooks:
        loss = job.energy.loss(live.network, live.module, inputs, target)
    del loss  # until here every tensor kept had an address of its own
    return sum(p.numel() * p.element_size() for _, p in live.pairs) + sum(kept.values())

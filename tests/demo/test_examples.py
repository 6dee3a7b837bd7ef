"""Loaders over tensors: order, shuffling, sizes."""

from __future__ import annotations

import torch

from bayesdl.demo.examples import loader


def test_loader_keeps_order_unless_a_generator_shuffles() -> None:
    inputs, targets = torch.arange(10.0)[:, None], torch.arange(10)
    ordered = torch.cat([y for _, y in loader(inputs, targets, batch_size=4)])
    shuffled = list(loader(inputs, targets, batch_size=4, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(ordered, targets)
    assert [len(y) for _, y in shuffled] == [4, 4, 2]
    assert all(torch.equal(x[:, 0], y.float()) for x, y in shuffled)
    assert not torch.equal(torch.cat([y for _, y in shuffled]), targets)
    assert torch.equal(torch.cat([y for _, y in shuffled]).sort().values, targets)


def test_inputs_alone_come_in_batches_of_one_element() -> None:
    assert [tuple(batch[0].shape) for batch in loader(torch.zeros(5, 2), batch_size=3)] == [(3, 2), (2, 2)]

"""Steps that were refused, skipped or clipped are counted, and a chain says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.errors import FileFormatError, NonFiniteError
from bayesdl.samplers.counts import StepCounts

STEPS = 40


def batch(step: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(step)
    x = torch.randn(8, 3, generator=g)
    return x, x.sum(1, keepdim=True) + torch.randn(8, 1, generator=g)


def run(chain: bdl.Chain, net: nn.Linear, opt: bdl.samplers.SGLD, bound: float, steps: range = range(STEPS)) -> int:
    """Steps clipped to a bound; how many of them torch's own function changed."""
    changed = 0
    for step in steps:
        x, y = batch(step)
        opt.zero_grad()
        nn.functional.mse_loss(net(x), y).backward()
        changed += int(float(nn.utils.clip_grad_norm_(net.parameters(), bound)) > bound)
        opt.step()
        chain.step()
    return changed


def setting(store: Path | None = None) -> tuple[nn.Linear, bdl.samplers.SGLD, bdl.Chain]:
    torch.manual_seed(0)
    net = nn.Linear(3, 1)
    opt = bdl.samplers.SGLD(net.parameters(), lr=0.05, num_data=100, generator=torch.Generator().manual_seed(0))
    return net, opt, bdl.Chain(net, sampler=opt, thin=5, store=store)


def said(chain: bdl.Chain) -> str:
    return "\n".join(f.text for f in chain.summary().findings if f.topic == "steps")


@pytest.mark.parametrize("bound", [1.0, 1.5, 2.0])
def test_the_share_of_clipped_steps_is_that_of_the_steps_that_torch_clipped(bound: float) -> None:
    net, opt, chain = setting()
    changed = run(chain, net, opt, bound)
    assert 2 <= changed < STEPS
    assert opt.counts.clipped == changed / STEPS and opt.counts.made == STEPS
    assert f"one and the same norm, {bound:.4g}, in {100 * changed / STEPS:.3g} % of the steps" in said(chain)


def test_gradients_that_nobody_clips_are_not_said_to_be() -> None:
    net, opt, chain = setting()
    assert run(chain, net, opt, float("inf")) == 0
    assert opt.counts.clipped == 0 and not said(chain)
    first = StepCounts()
    first.note(0.0), first.note(0.0)  # where everything is fitted, or nothing has a gradient
    assert first.clipped == 0


def test_refused_steps_are_counted_and_change_nothing_else() -> None:
    net, opt, chain = setting()
    run(chain, net, opt, float("inf"), range(9))
    before = opt.state_dict()
    net.weight.grad = torch.full_like(net.weight, torch.nan)
    with pytest.raises(NonFiniteError):
        opt.step()
    after = opt.state_dict()
    assert torch.equal(before["sampler"]["noise"]["bits"], after["sampler"]["noise"]["bits"])
    assert (opt.counts.made, opt.counts.refused) == (9, 1)
    assert "1 steps (10 %) were refused" in said(chain)


def test_steps_that_a_scaler_skips() -> None:
    """float16 gradients that overflow: the scaler lowers its scale and leaves the sampler alone, as ever."""
    net, opt, chain = setting()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    for step in range(8):
        x, y = batch(step)
        opt.zero_grad()
        loss = nn.functional.mse_loss(net(x), y)
        scaler.scale(loss * (torch.inf if step in (2, 5) else 1.0)).backward()
        scaler.step(opt)
        scaler.update()
        chain.step()
    assert opt.counts.made == 6 and chain.steps == 6
    assert "25 % of the calls of chain.step came without a step" in said(chain)


def test_counts_go_on_where_a_chain_does(tmp_path: Path) -> None:
    net, opt, chain = setting(tmp_path)
    changed = run(chain, net, opt, 1.0, range(20))
    assert not chain.step()
    changed += run(chain, net, opt, 1.0, range(20, 25))  # the next sample, with its resume file
    chain.close()
    net, opt, chain = setting(tmp_path)
    assert chain.resume() and chain.steps == 25
    changed += run(chain, net, opt, 1.0, range(25, STEPS))
    assert opt.counts.clipped == changed / STEPS
    assert f"{100 / 41:.3g} % of the calls" in said(chain)


def test_states_without_counts_begin_anew_and_damaged_ones_are_named() -> None:
    _, opt, _ = setting()
    state = opt.state_dict()
    del state["sampler"]["counts"]
    opt.load_state_dict(state)
    assert opt.counts == StepCounts()
    state["sampler"]["counts"] = {"made": "many"}
    with pytest.raises(FileFormatError, match="counts"):
        opt.load_state_dict(state)

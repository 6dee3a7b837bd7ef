"""Text under posterior draws: generation with a draw for each row, and uncertainty of tokens and sequences."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, ShapeError, UnsupportedError
from bayesdl.lora.tile import TOKENS, Rows, pieces

if TYPE_CHECKING:
    from bayesdl.model import BayesianModel

REFUSED = ("assistant_model", "penalty_alpha", "dola_layers", "prompt_lookup_num_tokens", "streamer", "custom_generate")
WAYS = ("tile", "one")
# logits held at once while scoring
LOGITS = 1 << 27


def generate(
    model: BayesianModel,
    batch: Any,
    num_samples: int | None = None,
    *,
    rows: str = "tile",
    generator: torch.Generator | None = None,
    **options: Any,
) -> Tensor:
    """Continuations of a batch of prompts, each written by one draw from beginning to end.

    Args:
        model: a causal model fitted by `bdl.TFB`.
        batch: prompts, as the model takes them (padded on the left).
        num_samples: S; default that of the posterior.
        rows: "tile": S continuations of every prompt; "one": row b is continued by draw b, `(B, L)`.
        generator: source of the draws' seed and of sampled tokens; default the posterior's seed.
        options: of `generate` in transformers: `max_new_tokens`, `do_sample`, `num_beams`, `num_return_sequences` (k of
            them multiply the rows of each draw), ...

    Returns:
        Token ids with the prompt in front, `(S, B k, L)`, padded on the right to the longest. No pass has more rows
        than `TFB(max_rows=...)`, beams counted in, down to one prompt under one draw.

    Raises:
        UnsupportedError: decoding that mixes rows or models, or a cache passed in.
        ArgumentError: another value of `rows`.
    """
    from bayesdl.posteriors.lora import adapter_posterior

    posterior = adapter_posterior(model)
    if rows not in WAYS:
        raise ArgumentError(f"rows={rows!r}; expected one of {WAYS}")
    for name in REFUSED:
        if options.get(name) is not None:
            raise UnsupportedError(f"{name} mixes draws, or runs a model without them; leave it out")
    if options.get("return_dict_in_generate"):
        raise UnsupportedError("return_dict_in_generate: token ids alone are returned; see bdl.lora.score for the rest")
    network = model.network
    network.check_values()
    clone: Any = network.module()
    if not hasattr(clone, "generate"):
        raise UnsupportedError(f"{type(clone).__name__} has no generate; wrap a causal language model")
    call = network.prepare(network.batch(batch)[0])
    prompts = Rows.of(call)
    seed = posterior.reseeded(generator)
    injection = posterior.injection(network, seed)
    total = prompts.count if rows == "one" else num_samples or posterior.num_samples
    if rows == "one" and num_samples not in (None, total):
        raise ArgumentError(f'rows="one" gives every prompt one draw; num_samples={num_samples} is for rows="tile"')
    limit = posterior.running.max_rows or max(1, TOKENS // max(1, prompts.positions))
    limit = max(1, limit // max(int(options.get("num_beams") or 1), int(options.get("num_return_sequences") or 1)))
    width = min(limit, prompts.count)
    together = 1 if rows == "one" or not posterior.running.tile else limit // width
    devices = [network.device] if network.device.type == "cuda" else []
    filler = _filler(clone, options)

    def written(piece: Rows, start: int, stop: int, draws: int) -> Tensor:
        """Continuations `(draws, rows, L)`; tiled, or of one draw a row."""
        with injection.drawing(start, stop, piece.count * draws, expands=True):
            made = clone.generate(**dict(piece.tiled(draws).kwargs or {}), **options)
        return made.reshape(draws, -1, made.shape[-1])

    found: list[Tensor] = []
    with injection.attached(clone), torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed % 2**63)
        for start in range(0, 1 if rows == "one" else total, together):
            stop = min(start + together, total)
            parts = [
                written(piece, first, first + piece.count, 1)
                if rows == "one"
                else written(piece, start, stop, stop - start)
                for first, piece in zip(range(0, prompts.count, width), pieces(prompts, width), strict=True)
            ]
            found.append(_padded(parts, filler, 1))
    whole = _padded(found, filler, 0)
    return whole[0] if rows == "one" else whole


@final
@dataclass(frozen=True)
class SequenceScores:
    """Given sequences under S draws.

    Attributes:
        tokens: log p of each token after the first, given those before it, under each draw: `(S, B, T - 1)`.
        mask: which of them count, `(B, T - 1)`.
        entropy: of the mean predictive at each position, `(B, T - 1)`, nats.
        epistemic: mutual information between token and draw at each position, `(B, T - 1)`, nats.
    """

    tokens: Tensor
    mask: Tensor
    entropy: Tensor
    epistemic: Tensor

    @property
    def sequences(self) -> Tensor:
        """log p of each whole sequence under each draw, `(S, B)`."""
        return (self.tokens * self.mask).sum(-1)

    @property
    def log_prob(self) -> Tensor:
        """log of the mean over draws of p(sequence): a draw is one function for a whole sequence, `(B,)`."""
        return torch.logsumexp(self.sequences, 0) - torch.tensor(float(len(self.tokens))).log()

    @property
    def spread(self) -> Tensor:
        """Standard deviation over draws of log p of each sequence, `(B,)`; zero for one draw."""
        return self.sequences.std(0, correction=0)

    @property
    def mean_epistemic(self) -> Tensor:
        """Mutual information per counted token of each sequence, `(B,)`."""
        return (self.epistemic * self.mask).sum(-1) / self.mask.sum(-1).clamp(min=1)


def score(
    model: BayesianModel,
    batch: Any,
    num_samples: int | None = None,
    *,
    prompt_length: int = 0,
    generator: torch.Generator | None = None,
) -> SequenceScores:
    """Uncertainty of given sequences, token by token and as wholes.

    Args:
        model: a causal model fitted by `bdl.TFB`.
        batch: sequences `(B, T)` under "input_ids", with their mask. Padding on the left counts for no position, as in
            `generate` ("position_ids" are added where the model takes them).
        num_samples: S; default that of the posterior.
        prompt_length: so many columns at the front are given, and do not count.
        generator: source of the draws' seed.

    Raises:
        ShapeError: the model's outputs are not one vocabulary of logits per token.
    """
    from bayesdl.posteriors.lora import adapter_posterior

    posterior = adapter_posterior(model)
    inputs = model.network.batch(batch)[0]
    if not isinstance(inputs, Mapping) or "input_ids" not in inputs:
        raise ArgumentError('sequences are expected under "input_ids" in a mapping')
    ids = torch.as_tensor(inputs["input_ids"]).to(model.device)
    given = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if given is None else torch.as_tensor(given).to(model.device)
    inputs = _placed(inputs, mask, model.network.template)
    counted = (mask[:, 1:] * mask[:, :-1]).bool() & (torch.arange(1, ids.shape[1], device=ids.device) >= prompt_length)
    seed, total = posterior.reseeded(generator), num_samples or posterior.num_samples
    vocabulary = getattr(getattr(model.network.template, "config", None), "vocab_size", LOGITS)
    step = max(1, LOGITS // (ids.numel() * int(vocabulary)))
    tokens: list[Tensor] = []
    mean, conditional = torch.zeros((), device=ids.device), torch.zeros((), device=ids.device)
    with torch.no_grad():
        for start in range(0, total, step):
            logits = posterior.outputs(model.network, inputs, (seed, start, min(start + step, total)))
            if logits.dim() != 4 or logits.shape[1:3] != ids.shape:
                raise ShapeError(
                    f"outputs {tuple(logits.shape)} for tokens {tuple(ids.shape)}; expected (S, B, T, vocabulary)"
                )
            logs = logits[:, :, :-1].float().log_softmax(-1)
            tokens.append(logs.gather(-1, ids[:, 1:].expand(len(logs), -1, -1).unsqueeze(-1))[..., 0])
            probs = logs.exp()
            mean = mean + probs.sum(0) / total
            conditional = conditional - (probs * logs).sum((0, -1)) / total
        entropy = -torch.special.xlogy(mean, mean).sum(-1)
    return SequenceScores(torch.cat(tokens), counted, entropy, (entropy - conditional).clamp(min=0))


def _placed(inputs: Mapping[str, Any], mask: Tensor, module: Any) -> Mapping[str, Any]:
    """The inputs with the positions of attended tokens, where padding on the left would shift them."""
    if bool((mask[:, 0] != 0).all()) or inputs.get("position_ids") is not None:
        return inputs
    below = module.get_base_model() if hasattr(module, "get_base_model") else module
    if "position_ids" not in inspect.signature(below.forward).parameters:
        return inputs
    return {**inputs, "position_ids": (mask.long().cumsum(1) - 1).clamp(min=0)}


def _padded(parts: list[Tensor], filler: int, axis: int) -> Tensor:
    longest = max(part.shape[-1] for part in parts)
    pad = torch.nn.functional.pad
    return torch.cat([pad(part, (0, longest - part.shape[-1]), value=filler) for part in parts], axis)


def _filler(module: Any, options: dict[str, Any]) -> int:
    for source in (options.get("pad_token_id"), getattr(module.generation_config, "pad_token_id", None)):
        if source is not None:
            return int(source)
    end = getattr(module.generation_config, "eos_token_id", 0)
    return int(end[0] if isinstance(end, (list, tuple)) else end or 0)

"""A Llama-shaped model with random weights and an adapter: tokens per second and memory of one draw and of ten.

    python benchmarks/lora_large.py --device cuda [--shape 1b | 3b | 8b] [--json benchmarks/results/lora_large.json]
    python benchmarks/lora_large.py --quick        # a tiny shape, which a CPU runs in seconds

The shapes are those of the published Llama 3 models; the weights are random, so that nothing is downloaded, and in
bfloat16 on a GPU. LoRA (r 8) on the query and value projections of every block. "Prompt" is a forward pass over a batch
of prompts with the logits of the last position read; "text" is greedy generation with the key-value cache. Draws tiled
and draws one by one are compared before anything is timed. Memory is the peak above the weights.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from _measure import alternate, finish, parser, peak_bytes

import bayesdl as bdl


@dataclass(frozen=True)
class Shape:
    """Size of a network and of what it is given."""

    hidden: int
    blocks: int
    heads: int
    groups: int
    inner: int
    vocabulary: int = 128_256
    prompt: int = 512
    written: int = 64


SHAPES = {
    "tiny": Shape(64, 2, 4, 2, 128, vocabulary=500, prompt=16, written=4),
    "1b": Shape(2048, 16, 32, 8, 8192),
    "3b": Shape(3072, 28, 24, 8, 8192),
    "8b": Shape(4096, 32, 32, 8, 14_336),
}


def network(shape: Shape, device: str) -> Any:
    """A causal model with an adapter whose B is random."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.groups,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,  # a text is as long as it may be
    )
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(config, dtype=dtype)
        lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(base, lora)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.05)
    return model.eval()


def prompts(shape: Shape, rows: int, device: str) -> dict[str, torch.Tensor]:
    """Random tokens."""
    source = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, shape.vocabulary, (rows, shape.prompt), generator=source).to(device)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def wrapped(model: Any, draws: int, **options: Any) -> bdl.BayesianModel:
    method = bdl.TFB(sigma=0.01, num_samples=draws, **options)
    batch = bdl.batch.huggingface(position="last")
    return bdl.wrap(model, method, likelihood="categorical", batch=batch, progress=False)


@torch.no_grad()
def latent(bayes: bdl.BayesianModel, inputs: Any) -> torch.Tensor:
    """Outputs of the draws `(S, B, vocabulary)`."""
    return bayes(inputs).latent.samples


@torch.no_grad()
def checked(model: Any, inputs: Any, tolerance: float) -> float:
    """Largest difference between tiled and single draws, relative to the largest output."""
    tiled, alone = (latent(wrapped(model, 3, tile=tile), inputs) for tile in (True, False))
    error = float((tiled - alone).abs().max() / alone.abs().max())
    spread = float((alone - alone.roll(1, 0)).abs().max() / alone.abs().max())
    assert error < min(tolerance, 0.3 * spread), f"tiled and single draws differ by {error:.2e}, draws by {spread:.2e}"
    return error


def measured(model: Any, shape: Shape, rows: int, options: argparse.Namespace) -> dict[str, Any]:
    """One batch size."""
    inputs = prompts(shape, rows, options.device)
    models = {f"{draws} draws": wrapped(model, draws) for draws in (1, 10)}
    length = {"max_new_tokens": shape.written, "do_sample": False}

    @torch.no_grad()
    def read() -> None:
        model(**inputs)

    @torch.no_grad()
    def write() -> None:
        model.generate(**inputs, **length)

    def written(bayes: bdl.BayesianModel) -> None:
        bdl.lora.generate(bayes, inputs, num_samples=bayes.posterior.num_samples, **length)  # type: ignore[attr-defined]

    reading: dict[str, Any] = {"plain": read, **{n: lambda b=b: latent(b, inputs) for n, b in models.items()}}
    writing: dict[str, Any] = {"plain": write, **{n: lambda b=b: written(b) for n, b in models.items()}}
    figures: dict[str, Any] = {"tiled against single draws": checked(model, inputs, options.tolerance)}
    for what, work, tokens in (("prompt", reading, shape.prompt), ("text", writing, shape.written)):
        seconds = alternate(work, options.repeats, options.device)
        for name, function in work.items():
            figures[f"{what}, {name}"] = {
                "tokens per second": float(f"{rows * tokens / seconds[name]:.4g}"),
                "time / plain": round(seconds[name] / seconds["plain"], 2),
                "peak memory above the weights, MB": round(peak_bytes(function, options.device) / 1e6, 1),
            }
    return figures


def main() -> None:
    """Measure, print."""
    options_parser = parser(__doc__.splitlines()[0])
    options_parser.add_argument("--quick", action="store_true", help="the tiny shape")
    options_parser.add_argument("--shape", choices=sorted(SHAPES), default="1b")
    options_parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    options = options_parser.parse_args()
    torch.set_num_threads(options.threads)
    name = "tiny" if options.quick else options.shape
    options.repeats = min(options.repeats, 3) if options.quick else options.repeats
    options.tolerance = 3e-2 if options.device.startswith("cuda") else 1e-4  # bfloat16 there
    model = network(SHAPES[name], options.device)
    size = sum(parameter.numel() for parameter in model.parameters())
    figures: dict[str, Any] = {"shape": name, "parameters": size, "bytes": size * model.dtype.itemsize}
    for rows in options.rows:
        figures[f"batch {rows} of {SHAPES[name].prompt} tokens"] = measured(model, SHAPES[name], rows, options)
    finish(figures, options)


if __name__ == "__main__":
    main()

"""Vision-language models as two projections and a cosine: what a posterior over the projections is over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self, final

import torch
from torch import Tensor, nn

from bayesdl.clone import unwrap
from bayesdl.errors import ArgumentError, ShapeError, UnsupportedError, check_finite
from bayesdl.network import Network


@final
class Towers(nn.Module):
    """Scores t cos(W_x a_x, W_y a_y) + bias of B images with C texts, from features before the projections.

        towers = bdl.lora.Towers.of(clip)
        texts = bdl.lora.text_features(clip, tokenizer(prompts, return_tensors="pt"))
        bayes = bdl.wrap(towers, "bayesvlm", [(image_features, caption_features)], likelihood="categorical")
        bayes((bdl.lora.image_features(clip, batch), texts))       # Predictive over the prompts
        texts = towers.ensembled([features_of_its_prompts, ...])   # several prompts for each class

    Args:
        image: W_x `(p, q_x)`, or an `nn.Linear` whose bias stays fixed.
        text: W_y `(p, q_y)`, or an `nn.Linear`.
        scale: t, a positive factor (CLIP stores its logarithm).
        bias: added to every score. Only models whose pairs are binary decisions (SigLIP) have one, be it zero.
        texts: features `(C, q_y)` of the classes, so that images alone are the inputs.

    Raises:
        ShapeError: projections into different spaces.
        ArgumentError: a scale that is not positive.
    """

    binary: bool  # whether trained by binary decisions
    scale: Tensor
    bias: Tensor
    texts: Tensor | None

    def __init__(
        self,
        image: Tensor | nn.Linear,
        text: Tensor | nn.Linear,
        scale: float | Tensor,
        bias: float | Tensor | None = None,
        texts: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.image, self.text = _linear(image, "image"), _linear(text, "text")
        if self.image.out_features != self.text.out_features:
            raise ShapeError(
                f"the projections have shapes {tuple(self.image.weight.shape)} and {tuple(self.text.weight.shape)}; "
                "expected (p, q_x) and (p, q_y), into one space"
            )
        if not float(scale) > 0 or float(scale) == float("inf"):
            raise ArgumentError(f"scale={float(scale)}; expected a positive factor of the cosines")
        like = self.image.weight
        self.register_buffer("scale", torch.as_tensor(float(scale), dtype=torch.float64).to(like))
        self.binary = bias is not None
        self.register_buffer("bias", torch.as_tensor(float(bias or 0.0), dtype=torch.float64).to(like))
        self.register_buffer("texts", None if texts is None else texts.detach().clone())

    @classmethod
    def of(cls, model: nn.Module, texts: Tensor | None = None) -> Self:
        """Those of a CLIP or SigLIP model of transformers, whose features `image_features` and `text_features` give.

        SigLIP has no linear layer behind the pooling of its images: their projection is then the identity.

        Raises:
            UnsupportedError: another model.
        """
        given: Any = unwrap(model)
        if all(hasattr(given, name) for name in ("visual_projection", "text_projection", "logit_scale")):
            scale = float(given.logit_scale.detach().exp())
            return cls(_copied(given.visual_projection), _copied(given.text_projection), scale, texts=texts)
        if hasattr(given, "logit_bias") and isinstance(getattr(given.text_model, "head", None), nn.Linear):
            head, scale = given.text_model.head, float(given.logit_scale.detach().exp())
            return cls(
                torch.eye(head.out_features).to(head.weight), _copied(head), scale, given.logit_bias.detach(), texts
            )
        raise UnsupportedError(
            f"{type(given).__name__} is neither a CLIP nor a SigLIP model of transformers; give the projections and "
            "the scale: bdl.lora.Towers(W_x, W_y, scale)"
        )

    @property
    def at(self) -> tuple[float, float]:
        """Scale and bias."""
        return float(self.scale), float(self.bias)

    def ensembled(self, prompts: Sequence[Tensor]) -> Tensor:
        """One text `(C, q_y)` for each class of several prompts: their embedding is the mean of unit embeddings.

        W a + b of the features a = sum_k w_k a_k, w_k in proportion to 1 / |W a_k + b|, points exactly where the mean
        of the prompts' normalised embeddings does, the usual ensemble of prompts (Radford et al. 2021). Under a
        posterior the weights stay those of the trained projection.

        Args:
            prompts: features `(K, q_y)` of the prompts of each class, or all as `(C, K, q_y)`.

        Raises:
            ShapeError: other shapes, or no class.
            ArgumentError: a prompt whose embedding has length zero.
        """
        found = []
        for own in prompts:
            if own.dim() != 2 or not len(own) or own.shape[1] != self.text.in_features:
                raise ShapeError(
                    f"the prompts of a class have features {tuple(own.shape)}; expected (K, {self.text.in_features})"
                )
            own = own.to(self.text.weight)
            with torch.no_grad():
                lengths = self.text(own).norm(dim=-1)
            if not bool((lengths > 0).all()):
                raise ArgumentError("the embedding of a prompt has length zero, and no direction")
            found.append((1.0 / lengths) @ own / (1.0 / lengths).sum())
        if not found:
            raise ShapeError("no prompts were given; expected features (K, q_y) for each class")
        return torch.stack(found)

    def forward(self, images: Tensor, texts: Tensor | None = None) -> Tensor:
        """Scores `(B, C)` of features `(B, q_x)` with `(C, q_y)`; without texts, with those of the classes."""
        x, y = self.image(images), self.text(self.against(texts).to(images))
        normalize = torch.nn.functional.normalize
        return self.scale * normalize(x, dim=-1) @ normalize(y, dim=-1).mT + self.bias

    def against(self, texts: Tensor | None) -> Tensor:
        """Features of the given texts, or of the classes. Raises `ArgumentError` where there are neither."""
        found = self.texts if texts is None else texts
        if found is None:
            raise ArgumentError(
                "images were given without texts: call it with (images, texts), or give the classes once: "
                "Towers(..., texts=...)"
            )
        return found


def image_features(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Features `(B, q_x)` of images before the projection, of a CLIP or SigLIP model; the model stays as it is.

    Args:
        model: of transformers.
        batch: holds "pixel_values"; keys of texts are left out.

    Raises:
        ArgumentError: the batch holds no images.
    """
    return _features(_Tower(model, "vision_model"), batch, "pixel_values", ("interpolate_pos_encoding",))


def text_features(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Features `(B, q_y)` of texts before the projection: as `image_features`, from "input_ids"."""
    return _features(_Tower(model, "text_model"), batch, "input_ids", ("attention_mask", "position_ids"))


@final
class _Tower(nn.Module):
    """One tower of a model, up to its projection."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        tower = getattr(unwrap(model), name, None)
        if not isinstance(tower, nn.Module):
            raise UnsupportedError(f"{type(unwrap(model)).__name__} has no {name}; expected a CLIP or SigLIP model")
        self.tower = tower

    def forward(self, **inputs: Any) -> Tensor:
        output = self.tower(**inputs)
        if isinstance(getattr(self.tower, "head", None), nn.Linear):  # SigLIP's projection of texts is inside
            return output.last_hidden_state[:, -1]
        return output.pooler_output


def _features(tower: _Tower, batch: Mapping[str, Any], key: str, others: tuple[str, ...]) -> Tensor:
    if not isinstance(batch, Mapping) or batch.get(key) is None:
        raise ArgumentError(f"a mapping that holds {key!r} is expected")
    inputs = {name: batch[name] for name in (key, *others) if batch.get(name) is not None}
    with torch.no_grad():
        found = Network(tower)(inputs)
    check_finite(found, "features")
    return found


def _linear(given: Tensor | nn.Linear, what: str) -> nn.Linear:
    if isinstance(given, nn.Linear):
        return given
    if not isinstance(given, Tensor) or given.dim() != 2 or not given.is_floating_point():
        raise ShapeError(f"the {what} projection is {type(given).__name__}; expected a matrix (p, q), or an nn.Linear")
    layer = nn.Linear(given.shape[1], given.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(given.detach().clone(), requires_grad=False)
    return layer


def _copied(layer: nn.Linear) -> nn.Linear:
    copy = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    for name, value in layer.named_parameters():
        setattr(copy, name, nn.Parameter(value.detach().clone(), requires_grad=False))
    return copy

"""The same images through two implementations, which have to agree: before a conversion is written, after a push."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from ..classifier_mae import MAEForImageClassification
from ..configuration_mae import MAEConfig
from ..errors import UserError
from ..modeling_mae import MAEForPreTraining

TOLERANCE = 1e-5  # of the outputs' own scale, where that is above 1


class Probe(NamedTuple):
    """Images (2, C, H, W) of noise, and which patches (2, N) are removed in pretraining (1 = removed)."""

    images: torch.Tensor
    mask: torch.Tensor


Outputs = dict[str, torch.Tensor]
Run = Callable[[Probe], Outputs]


def make_probe(config: MAEConfig) -> Probe:
    """Always the same ones for a shape."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, config.num_channels, *config.image_height_width, generator=generator)
    order = torch.rand(2, config.num_patches, generator=generator).argsort(dim=1)
    # A checkpoint of which nothing was to be masked any more still has a decoder to be checked.
    kept = config.num_kept_patches(config.mask_ratio or 0.75)
    return Probe(images, (order >= kept).float())


def run_ours(model: nn.Module) -> Run:
    """Predictions and loss of a pretraining model, logits of a classifier, tokens of an encoder."""

    def run(probe: Probe) -> Outputs:
        if isinstance(model, MAEForPreTraining):
            output = model(probe.images, mask=probe.mask)
            return {"logits": output.logits, "loss": output.loss}
        if isinstance(model, MAEForImageClassification):
            return {"logits": model(probe.images).logits}
        return {"last_hidden_state": model(probe.images).last_hidden_state}

    return run


def run_transformers(model: Any) -> Run:
    """The same of transformers' ViTMAE and ViT."""

    def run(probe: Probe) -> Outputs:
        N = probe.mask.shape[1]
        if model.config.model_type != "vit_mae":
            output = model(probe.images)
            return {"logits": output.logits} if "logits" in output else {"last_hidden_state": output.last_hidden_state}
        decodes, order = hasattr(model, "decoder"), torch.arange(N) / N
        # An encoder of theirs always masks, and shuffles by the noise: with nothing removed, rising noise leaves
        # everything in its place. The half keeps N * (1 - ratio) away from where it would round down.
        removed = float(probe.mask[0].sum()) - 0.5 if decodes else 0.0
        ratio, model.config.mask_ratio = model.config.mask_ratio, removed / N
        output = model(probe.images, noise=(probe.mask if decodes else 0 * probe.mask) + order / 2)
        model.config.mask_ratio = ratio
        if decodes:
            return {"logits": output.logits, "loss": output.loss}
        return {"last_hidden_state": output.last_hidden_state}

    return run


def run_timm(model: Any) -> Run:
    """The same of a timm VisionTransformer: logits if it has classes."""

    def run(probe: Probe) -> Outputs:
        if model.num_classes:
            return {"logits": model(probe.images)}
        return {"last_hidden_state": model.forward_features(probe.images)}

    return run


def compare(expected: Outputs, got: Outputs) -> float:
    """The largest difference between two sets of outputs, as a share of the output's scale where that is above 1.

    Raises:
        ValueError: naming the first output that is missing, of another shape, or off by more than `TOLERANCE`.
    """
    if expected.keys() != got.keys():
        raise ValueError(f"{sorted(got)} instead of {sorted(expected)}")
    largest = 0.0
    for name, value in expected.items():
        if value.shape != got[name].shape:
            raise ValueError(f"{name}: shape {tuple(got[name].shape)} instead of {tuple(value.shape)}")
        difference, scale = (got[name] - value).abs().max().item(), max(1.0, value.abs().max().item())
        # Written so that NaN is a difference.
        if not difference <= TOLERANCE * scale:
            raise ValueError(f"{name}: a difference of {difference:.3g} on a scale of {scale:.3g}")
        largest = max(largest, difference / scale)
    return largest


@torch.no_grad()
def compare_runs(expected: Run, got: Run, config: MAEConfig, pair: str) -> float:
    """`compare` two implementations on the same images.

    Raises:
        UserError: if they differ.
    """
    probe = make_probe(config)
    first, second = expected(probe), got(probe)
    try:
        return compare(first, second)
    except ValueError as error:
        raise UserError(
            f"{pair} differ by more than {TOLERANCE:g} of the scale in {error}, nothing was written; the source isn't "
            "the plain ViT that its names say, or a number of heads is wrong"
        ) from error

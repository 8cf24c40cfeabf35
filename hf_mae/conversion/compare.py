"""Compare the outputs of two implementations on the same images: before a conversion is written, after a push."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..configuration_mae import MAEConfig
from ..errors import UserError
from ..modeling_mae import MAEForPreTraining
from . import reference

TOLERANCE = 1e-5  # relative to the largest output, or absolute if that is below 1


class Probe(NamedTuple):
    """Images (B, C, H, W) of noise, and which patches (B, N) are removed in pretraining (1 = removed)."""

    images: torch.Tensor
    mask: torch.Tensor


Outputs = dict[str, torch.Tensor]
Run = Callable[[Probe], Outputs]


def make_probe(config: MAEConfig, images: int = 2, seed: int = 0) -> Probe:
    """Random images of the model's size and random masks; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    pixel_values = torch.randn(images, config.num_channels, *config.image_height_width, generator=generator)
    order = torch.rand(images, config.num_patches, generator=generator).argsort(dim=1)
    # mask_ratio may be 0; use 0.75 to exercise the decoder.
    return Probe(pixel_values, (order >= config.num_kept_patches(config.mask_ratio or 0.75)).float())


def run_ours(model: Any, probe: Probe) -> Outputs:
    """Predictions and loss of a pretraining model, logits of a classifier, tokens of an encoder."""
    masked = {"mask": probe.mask} if isinstance(model, MAEForPreTraining) else {}
    return _outputs(model(probe.images, **masked))


def run_transformers(model: Any, probe: Probe) -> Outputs:
    """The same outputs of transformers' ViTMAE and ViT."""
    if model.config.model_type != "vit_mae":
        return _outputs(model(probe.images))
    # ViTMAE always masks, by the config's ratio and in the order of the noise; its encoder alone removes nothing here.
    mask = probe.mask if hasattr(model, "decoder") else torch.zeros_like(probe.mask)
    N, removed = mask.shape[1], float(mask[0].sum())
    # Noise that rises from left to right leaves the kept patches in their order.
    noise = mask + torch.arange(N) / N / 2
    own_ratio = model.config.mask_ratio
    # It keeps int(N * (1 - ratio)) patches: half a patch more is safe from rounding errors.
    model.config.mask_ratio = max(0.0, removed - 0.5) / N
    output = model(probe.images, noise=noise)
    model.config.mask_ratio = own_ratio
    return _outputs(output)


def _outputs(output: Any) -> Outputs:
    names = ("logits", "loss") if "logits" in output else ("last_hidden_state",)
    return {name: output[name] for name in names if name in output}


def run_timm(model: Any, probe: Probe) -> Outputs:
    """The same outputs of a timm VisionTransformer: logits if it has classes, else tokens."""
    if model.num_classes:
        return {"logits": model(probe.images)}
    return {"last_hidden_state": model.forward_features(probe.images)}


def run_original(weights: dict[str, torch.Tensor], config: MAEConfig, probe: Probe) -> Outputs:
    """The same outputs of the original's forward on its own weights; their names show the kind of model."""
    heads = config.num_attention_heads
    if "decoder_pred.weight" in weights:
        decoder_heads, norm_pix_loss = config.decoder_num_attention_heads, config.norm_pix_loss
        logits, loss = reference.pretrain(weights, *probe, heads, decoder_heads, norm_pix_loss)
        return {"logits": logits, "loss": loss}
    if "head.weight" in weights:
        return {"logits": reference.classify(weights, probe.images, heads)}
    return {"last_hidden_state": reference.features(weights, probe.images, heads)}


def compare(expected: Outputs, got: Outputs) -> float:
    """The largest difference between two sets of outputs, divided by the largest output if that is above 1.

    Raises:
        ValueError: if outputs are missing, have another shape, or differ by more than `TOLERANCE`; names the first.
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
            f"{pair} differ by more than {TOLERANCE:g} of the scale in {error}; nothing was written. Either the source "
            "isn't a plain ViT, or a number of heads is wrong"
        ) from error

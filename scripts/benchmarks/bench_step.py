"""One training step of the same model in several implementations: forward, backward, clipping, AdamW.

Each cell runs in a new process, so its peak memory is measured separately. Our model and transformers' see the same
images and mask noise. Both start from our weights, with the position tables that transformers leaves at zero. lightly's
model starts from its own weights and draws its own masks. On a CPU our model is set up as in `hf-mae pretrain`
(`tune_for_device`); another cell shows what this setting alone does for transformers' model.
"""

# pyright: reportMissingImports=false
# lightly is in a separate extra, which type checks of this file don't need.

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from bench_common import in_process, interleaved, spread, table
from torch import nn
from transformers import PreTrainedModel, ViTMAEConfig, ViTMAEForPreTraining

from hf_mae import SIZES, MAEConfig, MAEForPreTraining, to_layout, tune_for_device

IMAGE, MASK_RATIO = 224, 0.75
CROSS = {"decoder_attention": "cross", "prediction_ratio": 0.25}
# Dense peak in bf16, from the vendors' data sheets.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
# On one thread, CPU time is measured, which other programs don't affect.
ON_ONE_THREAD = not torch.cuda.is_available() and torch.get_num_threads() == 1
UNIT = "images/s of CPU time" if ON_ONE_THREAD else "images/s"
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (pixel_values, noise) -> loss


def ours(size: str, **overrides: Any) -> tuple[nn.Module, Loss]:
    torch.manual_seed(0)
    keys: dict[str, Any] = {**SIZES[size], "image_size": IMAGE, "mask_ratio": MASK_RATIO, **overrides}
    model = MAEForPreTraining(MAEConfig(**keys))
    return model, lambda images, noise: model(images, noise=noise).loss


def peers(size: str) -> tuple[nn.Module, Loss]:
    weights = to_layout(ours(size)[0].state_dict(), "transformers")
    keys: dict[str, Any] = {**SIZES[size], "image_size": IMAGE, "mask_ratio": MASK_RATIO, "layer_norm_eps": 1e-6}
    model = ViTMAEForPreTraining(ViTMAEConfig(**keys))
    model.load_state_dict(weights)
    for name, parameter in model.named_parameters():
        if name.endswith(("position_embeddings", "decoder_pos_embed")):
            parameter.requires_grad_(False)
    return model, lambda images, noise: model(images, noise=noise).loss


class LightlyMAE(nn.Module):
    """The model of lightly's example."""

    def __init__(self, size: str):
        super().__init__()
        from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
        from timm.models.vision_transformer import VisionTransformer

        shape = SIZES[size]
        self.patch = shape.get("patch_size", 16)
        vit = VisionTransformer(
            img_size=IMAGE,
            patch_size=self.patch,
            embed_dim=shape["hidden_size"],
            depth=shape["num_hidden_layers"],
            num_heads=shape["num_attention_heads"],
            num_classes=0,
        )
        self.backbone = MaskedVisionTransformerTIMM(vit=vit)
        self.decoder = MAEDecoderTIMM(
            num_patches=vit.patch_embed.num_patches,
            patch_size=self.patch,
            embed_dim=vit.embed_dim,
            decoder_embed_dim=512,
            decoder_depth=8,
            decoder_num_heads=16,
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        from lightly.models import utils

        size = (len(images), self.backbone.sequence_length)
        kept, masked = utils.random_token_mask(size=size, mask_ratio=MASK_RATIO, device=images.device)
        encoded = self.decoder.embed(self.backbone.encode(images=images, idx_keep=kept))
        tokens = utils.repeat_token(self.decoder.mask_token, size).type_as(encoded)
        decoded = self.decoder.decode(utils.set_at_index(tokens, kept, encoded))
        predicted = self.decoder.predict(utils.get_at_index(decoded, masked))
        target = utils.get_at_index(utils.patchify(images, self.patch), masked - 1)
        return nn.functional.mse_loss(predicted.float(), target)


def lightlys(size: str) -> tuple[nn.Module, Loss]:
    torch.manual_seed(0)
    model = LightlyMAE(size)
    return model, lambda images, noise: model(images)


PEER, TUNED = "transformers ViTMAE", "transformers ViTMAE, our CPU settings"
MODELS: dict[str, Callable[[str], tuple[nn.Module, Loss]]] = {
    "hf_mae": ours,
    "hf_mae, cross decoder": partial(ours, **CROSS),
    PEER: peers,
    TUNED: peers,
    "lightly (timm)": lightlys,
}


def available() -> list[str]:
    """The models that can be measured with what is installed."""
    missing = {
        TUNED: "for CPUs only" if torch.cuda.is_available() else None,
        "lightly (timm)": None if find_spec("lightly") and find_spec("timm") else "not installed",
    }
    for name, reason in missing.items():
        if reason:
            print(f"{name}: left out, {reason}")
    return [name for name in MODELS if not missing.get(name)]


def flops_of(loss_of: Loss, images: torch.Tensor, noise: torch.Tensor) -> float:
    """Floating point operations of a training step: three times those of the forward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        loss_of(images, noise)
    return 3.0 * counter.get_total_flops()


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a step, peak memory, the first loss and model FLOPs of one cell, in this process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, loss_of = MODELS[cell["model"]](cell["size"])
    model.to(device).train()
    if cell["model"].startswith(("hf_mae", TUNED)):
        assert isinstance(model, PreTrainedModel)
        tune_for_device(model, device, cell["precision"])
    if cell["checkpointing"]:
        model.gradient_checkpointing_enable()  # pyright: ignore[reportCallIssue]
    generator = torch.Generator().manual_seed(0)
    patches = (IMAGE // SIZES[cell["size"]].get("patch_size", 16)) ** 2
    images = torch.randn(cell["batch"], 3, IMAGE, IMAGE, generator=generator).to(device)
    noise = torch.rand(cell["batch"], patches, generator=generator).to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4, (0.9, 0.95), fused=True)
    flops = flops_of(loss_of, images, noise) if device.type == "cuda" else None
    if cell["compile"]:
        model.compile()
    base, losses, seconds = memory(device), [], []
    clock = time.process_time if ON_ONE_THREAD else time.perf_counter
    for _ in range(cell["warmup"] + cell["steps"]):
        started = clock()
        with torch.autocast(device.type, torch.bfloat16, enabled=cell["precision"] == "bf16"):
            loss = loss_of(images, noise)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))  # waits for the GPU
        seconds.append(clock() - started)
    return {
        "seconds": statistics.median(seconds[cell["warmup"] :]),
        "peak_mb": memory(device),
        "before_mb": base,
        "first_loss": losses[0],
        "flops": flops,
    }


def memory(device: torch.device) -> float:
    """Peak memory so far, MB: of the GPU's allocator, or of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def step(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all cells, interleaved; print a table for each size, precision and way of execution."""
    results = []
    models = available()
    for size, precision, way in [(s, p, w) for s in options.sizes for p in options.precisions for w in options.ways]:
        cell = {
            "size": size, "precision": precision, "compile": way == "compiled", "batch": options.batch,
            "steps": options.steps, "warmup": options.warmup, "checkpointing": False,
        }  # fmt: skip
        cells = {m: partial(in_process, "bench_step.py", json.dumps({**cell, "model": m})) for m in models}
        found = interleaved(cells, options.repeats)
        print(f"\nViT-{size}, {precision}, {way}, batch {options.batch}")
        rates = {m: [options.batch / run["seconds"] for run in runs] for m, runs in found.items()}
        table(rates, UNIT, PEER)
        for model, runs in found.items():
            peak = statistics.median(run["peak_mb"] for run in runs)
            result = {"what": "step", "model": model, **cell, "unit": UNIT, "images_per_second": spread(rates[model])}
            result |= {"peak_mb": peak, "first_loss": runs[0]["first_loss"], "model_flops": runs[0]["flops"]}
            note = f"{model:56} {peak:9.0f} MB peak, first loss {runs[0]['first_loss']:.6f}"
            if runs[0]["flops"] and precision == "bf16":
                name = torch.cuda.get_device_name()
                top = next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)
                if top:
                    result["mfu"] = runs[0]["flops"] / statistics.median(run["seconds"] for run in runs) / top
                    note += f", model-FLOP utilisation {result['mfu']:.1%}"
            print(note)
            results.append(result)
    return results


def memory_by_batch(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak memory of training for each batch size, without and with gradient checkpointing."""
    results = []
    names = [name for name in available() if name != TUNED]
    cells = [(name, False) for name in names] + [(name, True) for name in names if not name.startswith("lightly")]
    for size, precision in [(size, precision) for size in options.sizes for precision in options.precisions]:
        print(f"\npeak memory, MB, ViT-{size}, {precision}, at batch " + ", ".join(map(str, options.memory_batches)))
        for name, checkpointing in cells:
            peaks = []
            for batch in options.memory_batches:
                cell = {
                    "model": name, "size": size, "precision": precision, "compile": False, "batch": batch,
                    "steps": 1, "warmup": 1, "checkpointing": checkpointing,
                }  # fmt: skip
                peaks.append(in_process("bench_step.py", json.dumps(cell))["peak_mb"])
                results.append({"what": "memory", **cell, "peak_mb": peaks[-1]})
            label = f"{name}, gradient checkpointing" if checkpointing else name
            print(f"{label:56} " + " ".join(f"{peak:8.0f}" for peak in peaks))
    return results


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))

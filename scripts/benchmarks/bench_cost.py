"""The cost of a training step, counted on the meta device without weights and images: fast at any size."""

import argparse
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_mae import SIZES, MAEConfig, MAEForPreTraining

IMAGE, PATCH = 224, {"huge": 14}
KINDS: dict[str, dict[str, Any]] = {
    "standard": {},
    "cross decoder, 25 %": {"decoder_attention": "cross", "prediction_ratio": 0.25},
    # Shows what removing patches saves: this encoder sees almost as many tokens as one with mask tokens (Table 1c).
    "mask tokens in the encoder": {"mask_ratio": 0.004},
}


def cost(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Parameters, and FLOPs per image of forward and backward (a multiplication and an addition count as two)."""
    rows = []
    for size, numbers in SIZES.items():
        for name, kind in KINDS.items():
            keys: dict[str, Any] = {**numbers, **kind, "image_size": IMAGE, "patch_size": PATCH.get(size, 16)}
            with torch.device("meta"):
                model = MAEForPreTraining(MAEConfig(**keys)).train()
                images, noise = torch.empty(1, 3, IMAGE, IMAGE), torch.empty(1, model.config.num_patches)
            model.set_attn_implementation("eager")  # its products are counted one by one
            with FlopCounterMode(display=False) as counter:
                model(images, noise=noise).loss.backward()
            flops = counter.get_total_flops()
            row = {"size": size, "kind": name, "parameters": model.num_parameters(), "flops_per_image": flops}
            rows.append({"what": "cost", **row})
            print(f"{size:6} {name:28} {row['parameters'] / 1e6:7.1f} M parameters {flops / 1e9:8.1f} GFLOPs per image")
    return rows

"""What makes training on a CPU faster, and nothing less exact."""

import ctypes
import platform
from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel


def tune_for_cpu(model: PreTrainedModel, precision: str) -> None:
    """Set up the process and a model for training on a CPU.

    Args:
        model: to be trained.
        precision: "bf16" for autocast, else "no".
    """
    keep_freed_memory()
    if precision == "bf16" and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("sdpa_float32")


def keep_freed_memory() -> None:
    """Let the C library keep what a step frees for the next step, instead of giving it back to the system.

    Else each step on a CPU gets its activations anew, page by page: for ViT-B and 16 images on one thread 200,000
    pages, 0.3 s of 11 s; on two threads, 2 to 4 % of the time. Only the GNU library has the switch.
    """
    mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
    # The second alone would be harm: it ends the growth of the first, which starts at 128 KiB.
    if platform.libc_ver()[0] == "glibc" and ctypes.CDLL(None).mallopt(mmap_threshold, 2**30):
        ctypes.CDLL(None).mallopt(trim_threshold, 2**31 - 1)


def float32_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """transformers' SDPA, in float32 whatever autocast says.

    On CPUs, forward and backward take PyTorch 1.6 to 2.4 times as long in bfloat16 (torch 2.14, 50 and 197 tokens).
    """
    with torch.autocast(query.device.type, enabled=False):
        attended, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), *args, **kwargs)
    return attended.to(query.dtype), None


ALL_ATTENTION_FUNCTIONS.register("sdpa_float32", float32_attention)

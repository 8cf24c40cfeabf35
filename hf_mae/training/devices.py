"""Processes, devices and precision of a run."""

import ctypes
import os
import platform
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from accelerate.tracking import get_available_trackers
from accelerate.utils import gather_object
from torch import nn
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

from ..errors import UserError
from ..keys.run_keys import PretrainRecipe, RunRecipe


def prepare_process(recipe: RunRecipe) -> str:
    """Set up this process, with deterministic steps if the recipe asks for them.

    Returns:
        The precision that `mixed_precision` selects on this machine: "no", "bf16" or "fp16".

    Raises:
        UserError: if the tracker `log_with` is not installed.
    """
    trackers = [tracker.value for tracker in get_available_trackers()]
    if recipe.log_with not in (None, "all", *trackers):
        raise UserError(
            f"log_with {recipe.log_with} is not installed; install it, or use one of: {', '.join(trackers) or 'none'}"
        )
    if recipe.deterministic:
        # cuBLAS and NCCL read these variables when they start, which is later.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("NCCL_ALGO", "Ring")
        torch.use_deterministic_algorithms(True)
        # The backward pass of this attention sums in random order.
        torch.backends.cuda.enable_mem_efficient_sdp(False)
    if recipe.mixed_precision == "auto":
        return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"
    return recipe.mixed_precision


def environment_flag(name: str) -> bool:
    """Whether an environment variable of Accelerate is on."""
    return os.environ.get(name, "false").lower() in ("1", "true")


def check_precision(precision: str, on_cpu: bool) -> None:
    """Raise a UserError for fp16 on a CPU."""
    if precision == "fp16" and on_cpu:
        raise UserError("mixed_precision fp16 needs a GPU; use bf16 or no")


def check_processes(together: int) -> None:
    """Raise a UserError if the processes that were started would train separately instead of together."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if together != started:
        raise UserError(
            f"{started} processes were started, but only {together} would train together; use torchrun, on CPUs with "
            "ACCELERATE_USE_CPU=true"
        )


def make_accelerator(recipe: PretrainRecipe) -> Accelerator:
    """One Accelerator for model and optimizer.

    Raises:
        UserError: if Accelerate would train with fewer processes or another strategy than requested, or the recipe
            can't run on this machine.
    """
    precision = prepare_process(recipe)
    join_after_restart()
    accelerator = Accelerator(
        mixed_precision=precision,
        log_with=recipe.log_with,
        project_dir=recipe.output_dir,
        # The only buffers are tables that never change, so no forward needs to broadcast them.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    check_precision(precision, accelerator.device.type == "cpu")
    if environment_flag("ACCELERATE_USE_FSDP") and accelerator.distributed_type != DistributedType.FSDP:
        raise UserError(
            f"Accelerate chose {accelerator.distributed_type.value} instead of FSDP, which needs a GPU for each "
            "process; start as many processes as there are GPUs, or leave FSDP out"
        )
    check_processes(accelerator.num_processes)
    return accelerator


def strategy_name(accelerator: Accelerator) -> str:
    """A readable name for how the processes of a run train together."""
    names = {DistributedType.NO: "one process", DistributedType.MULTI_CPU: "DDP", DistributedType.MULTI_GPU: "DDP"}
    return names.get(accelerator.distributed_type, accelerator.distributed_type.value)


def describe_hardware(device: torch.device) -> str:
    """The hardware of all processes: count and names of GPUs, or the CPU's name. Every process must call it."""
    if device.type == "cpu":
        # The processor's name on Linux, its architecture elsewhere.
        file = Path("/proc/cpuinfo")
        match = re.search(r"^model name\s*: (.+)$", file.read_text() if file.exists() else "", re.MULTILINE)
        name = match[1].strip() if match else platform.machine()
        return ", ".join(sorted(set(gather_object([name]))))  # processes on one machine share its CPU
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return ", ".join(f"{count} x {name}" for name, count in sorted(Counter(gather_object([name])).items()))


def join_after_restart() -> None:
    """After a restart by torchrun, rendezvous with the other processes under a fresh key prefix.

    The store still holds addresses of the previous attempt (torch 2.14). With the same keys, a process sometimes
    connects to a dead one, and fails or hangs.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or dist.is_initialized():
        return
    address, port, rank, ranks = (os.environ[key] for key in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"))
    on_cpu = environment_flag("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    dist.init_process_group(
        "gloo" if on_cpu else "cuda:nccl,cpu:gloo",
        store=PrefixStore(f"attempt_{attempt}", TCPStore(address, int(port), int(ranks), is_master=False)),
        rank=int(rank),
        world_size=int(ranks),
    )


def tune_for_device(model: PreTrainedModel, device: torch.device, precision: str) -> None:
    """Set up the process and a model for fast training on a CPU; does nothing on other devices.

    The C library then keeps the memory that a step frees. Otherwise each step requests it again, page by page: for
    ViT-B and 16 images 200,000 pages, which take 0.3 s of 11 s on one thread, and 2 to 4 % of the time on two.

    Args:
        model: the model to train; under bf16, its attention becomes `float32_attention`.
        device: device that it is trained on.
        precision: "bf16" for autocast, otherwise "no".
    """
    if device.type != "cpu":
        return
    if platform.libc_ver()[0] == "glibc":  # only the GNU C library has mallopt
        mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
        # Don't set only the second: the first would then stop growing from its initial 128 KiB.
        if ctypes.CDLL(None).mallopt(mmap_threshold, 2**30):
            ctypes.CDLL(None).mallopt(trim_threshold, 2**31 - 1)
    if precision == "bf16" and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("sdpa_float32")


def float32_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """transformers' SDPA in float32, even under autocast.

    On CPUs, its forward and backward passes take 1.6 to 2.4 times as long in bfloat16 (torch 2.14, 50 and 197 tokens).
    """
    with torch.autocast(query.device.type, enabled=False):
        attended, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), *args, **kwargs)
    return attended.to(query.dtype), None


ALL_ATTENTION_FUNCTIONS.register("sdpa_float32", float32_attention)

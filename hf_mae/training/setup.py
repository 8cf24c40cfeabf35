"""What a pretraining run is made of: processes, data, model, image processor, streams; new or from a checkpoint."""

import copy
import json
import logging
import os
import platform
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from accelerate.tracking import get_available_trackers
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from ..configuration_mae import MAEConfig
from ..data.augment import evaluation_resize
from ..data.sources import DataError
from ..data.splits import splits_of
from ..data.stats import RESCALE_FACTORS, channel_stats, probe_rows
from ..data.stream import Rows, StreamPlan, View
from ..image_processing_mae import MAEImageProcessor
from ..modeling_mae import MAEForPreTraining
from .checkpoint import CheckpointError, find_checkpoint, list_checkpoints
from .log import read_events
from .recipe import PretrainRecipe, RecipeError, RunRecipe, model_config_of
from .schedule import stages

logger = logging.getLogger(__name__)

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
# These keys may change when a run goes on: they say how it is computed and shown, not what it computes.
FREE_KEYS = {
    "output_dir", "resume", "recipe", "num_workers", "per_device_batch_size", "mixed_precision", "compile",
    "gradient_checkpointing", "attn_implementation", "deterministic", "log_steps", "log_with", "save_steps",
    "keep_checkpoints", "eval_steps", "max_eval_samples", "max_bad_fraction", "dry_run", "allow_data_change",
    "quality_steps", "quality_samples", "push_to_hub", "hub_private_repo",
}  # fmt: skip
# And these, where a fingerprint of the data tells whether what is at another place is the same.
PLACE_KEYS = {"dataset", "dataset_config", "dataset_revision", "eval_dataset", "eval_split"}


def check_trackers(recipe: RunRecipe) -> None:
    """Raise a RecipeError for a tracker that is not installed."""
    trackers = [tracker.value for tracker in get_available_trackers()]
    if recipe.log_with not in (None, "all", *trackers):
        raise RecipeError(f"log_with {recipe.log_with} is not installed; there are {', '.join(trackers) or 'none'}")


def choose_precision(recipe: RunRecipe) -> str:
    """What `mixed_precision` means on this machine: "no", "bf16" or "fp16"."""
    if recipe.mixed_precision == "auto":
        return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"
    return recipe.mixed_precision


def make_accelerator(recipe: PretrainRecipe) -> Accelerator:
    """One Accelerator for model and optimizer.

    Raises:
        RecipeError: if processes or a strategy were asked for and not obtained; Accelerate alone would go on without.
    """
    check_trackers(recipe)
    precision = choose_precision(recipe)
    if recipe.deterministic:
        make_deterministic()
    join_after_restart()
    accelerator = Accelerator(
        mixed_precision=precision,
        log_with=recipe.log_with,
        project_dir=recipe.output_dir,
        # The only buffers are tables that never change: nothing to broadcast at each forward.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise RecipeError("mixed_precision fp16 needs a GPU; use bf16 or no")
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")
    if fsdp and accelerator.distributed_type != DistributedType.FSDP:
        raise RecipeError(
            f"FSDP was asked for and {accelerator.distributed_type.value} obtained; FSDP needs a GPU for each process"
        )
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != asked:
        raise RecipeError(
            f"{asked} processes were started, {accelerator.num_processes} work together; use torchrun, on CPUs with "
            "ACCELERATE_USE_CPU=true"
        )
    return accelerator


def describe_hardware(device: torch.device) -> str:
    """What all processes compute on, each of which has to call this: GPUs by number and name, or the CPU's name."""
    if device.type == "cpu":
        return ", ".join(sorted(set(gather_object([_cpu_name()]))))  # processes of one machine share it
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return ", ".join(f"{count} x {name}" for name, count in sorted(Counter(gather_object([name])).items()))


def _cpu_name() -> str:
    """The processor's own name where Linux tells it, else its architecture."""
    file = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: (.+)$", file.read_text() if file.exists() else "", re.MULTILINE)
    return named[1].strip() if named else platform.machine()


def join_after_restart() -> None:
    """Where torchrun has started this process anew, join the others under names of this attempt's own.

    In the store that they meet in, the addresses of the attempt before still stand (torch 2.14). Under the same names,
    a process now and then connects to one that is dead, and fails or waits for ever.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or dist.is_initialized():
        return
    address, port, rank, ranks = (os.environ[key] for key in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"))
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true") or not torch.cuda.is_available()
    dist.init_process_group(
        "gloo" if on_cpu else "cuda:nccl,cpu:gloo",
        store=PrefixStore(f"attempt_{attempt}", TCPStore(address, int(port), int(ranks), is_master=False)),
        rank=int(rank),
        world_size=int(ranks),
    )


def make_deterministic() -> None:
    """Let the same step give the same bits on a GPU, at some cost in speed; on a CPU it does anyway."""
    # Read when cuBLAS and NCCL start, which is later.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    torch.use_deterministic_algorithms(True)
    # The backward pass of this one adds in any order.
    torch.backends.cuda.enable_mem_efficient_sdp(False)


@dataclass
class PretrainData:
    """The data of a run.

    Args:
        rows: to train on.
        eval_rows: to evaluate on.
        num_channels: C of every image in a batch.
        dtype: of their pixels: "uint8", "uint16" or "float32".
        evaluated_on: what the evaluation rows are, for people.
    """

    rows: Rows
    eval_rows: Rows
    num_channels: int
    dtype: str
    evaluated_on: str

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the order of samples depends on, besides the seed; as it comes back from JSON."""
        return json.loads(json.dumps({**self.rows.source.fingerprint, "num_samples": len(self.rows)}))


def open_data(recipe: PretrainRecipe) -> PretrainData:
    """Open the training and evaluation rows of a recipe.

    Raises:
        DataError: for what is not there, or has other channels than the recipe says.
    """
    rows, eval_rows, evaluated_on = splits_of(recipe, streaming=recipe.streaming)
    num_channels, dtype = probe_rows(rows)
    wanted = recipe.model_config.get("num_channels")
    if wanted is not None and wanted != num_channels and {wanted, num_channels} != {1, 3}:
        raise DataError(
            f"images of {recipe.dataset} have {num_channels} channels, num_channels is {wanted}; pass --num_channels "
            f"{num_channels}"
        )
    return PretrainData(rows, eval_rows, wanted or num_channels, dtype, evaluated_on)


def check_folder(recipe: RunRecipe, output_dir: Path) -> None:
    """See to it that a run may write into a folder.

    Raises:
        CheckpointError: if it holds a run that this one is not to go on with.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise CheckpointError(f"{output_dir} is no folder; choose another --output_dir")
    if recipe.resume == "none":
        metrics = output_dir / "metrics.jsonl"
        took_steps = metrics.exists() and any(event["step"] > 0 for event in read_events(metrics))
        if (took_steps or list_checkpoints(output_dir)) and not recipe.dry_run:
            raise CheckpointError(
                f"{output_dir} holds another run; go on with it by --resume auto, or choose another --output_dir"
            )


def check_same_recipe(old: dict[str, Any], recipe: RunRecipe, where: Path, free: set[str]) -> None:
    """See to it that a run goes on with the recipe that it has.

    Args:
        old: keys of the run, as they come back from a file.
        recipe: what was asked for now.
        where: whose keys they are, for people.
        free: keys that may differ.

    Raises:
        CheckpointError: naming the first key that differs.
    """
    new = json.loads(json.dumps(recipe.to_dict()))
    for key in sorted((old.keys() | new.keys()) - free):
        if old.get(key) != new.get(key):
            raise CheckpointError(
                f"{where} is of a run with {key} {old.get(key)}, not {new.get(key)}; go on with the same recipe, or "
                "start another run from its weights with --model and another --output_dir"
            )


def find_stored(recipe: PretrainRecipe, output_dir: Path) -> Path | None:
    """The checkpoint that the run goes on from; None for a new run.

    Raises:
        CheckpointError: if the folder holds a run that this one is not to go on with, or can't.
    """
    check_folder(recipe, output_dir)
    stored = None if recipe.resume == "none" else find_checkpoint(output_dir, recipe.resume)
    if stored:
        check_same_recipe(read_state(stored)[0]["recipe"], recipe, stored, FREE_KEYS | PLACE_KEYS)
    return stored


def read_state(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a checkpoint says of the run (trainer.json) and of its data (data.json).

    Raises:
        CheckpointError: if it is a model's folder rather than a checkpoint.
    """
    try:
        trainer, data = (json.loads((checkpoint / name).read_text()) for name in ("trainer.json", "data.json"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename} is missing; name a folder checkpoint-STEP of a run") from error
    except ValueError as error:
        raise CheckpointError(f"the state in {checkpoint} is no JSON ({error}); name another checkpoint") from error
    return trainer, data


def build_model(recipe: PretrainRecipe, stored: Path | None, num_channels: int) -> MAEForPreTraining:
    """The model of a run: from its checkpoint, from another model (at the recipe's size and channels), or new.

    Raises:
        RecipeError: if the recipe's model can't be loaded or made.
    """
    options = {"attn_implementation": recipe.attn_implementation, "dtype": torch.float32}
    config = None if stored or recipe.model else model_config_of(recipe, num_channels)
    try:
        if stored:
            model = MAEForPreTraining.from_pretrained(stored, use_safetensors=True, **options)
        elif config:
            model = MAEForPreTraining._from_config(config, **options)
        else:
            changes = {"num_channels": num_channels, **recipe.model_config}
            # Weights as safetensors alone: no pickle is read.
            model = MAEForPreTraining.from_pretrained(recipe.model, use_safetensors=True, **changes, **options)
    except (ImportError, KeyError, OSError, ValueError, RuntimeError, SafetensorError) as error:
        name = stored or (recipe.model and f"--model {recipe.model}")
        what = f"{name} can't be loaded" if name else "the model can't be made"
        raise RecipeError(describe_failure(what, recipe, error)) from error
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if recipe.compile:
        model.compile()
    return model.train()


def describe_failure(what: str, recipe: RunRecipe, error: Exception) -> str:
    """Why there is no model, in one line; an attention that may not be there is named too."""
    attention = recipe.attn_implementation
    if attention not in ("eager", "sdpa"):
        what += f" with attn_implementation {attention} (eager and sdpa always work)"
    return f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def build_processor(
    recipe: PretrainRecipe, stored: Path | None, data: PretrainData, config: MAEConfig
) -> MAEImageProcessor:
    """The image processor that belongs to the model: sizes, scaling, and mean and standard deviation.

    Raises:
        RecipeError: if mean or standard deviation have another length than there are channels.
    """
    if stored:
        try:
            return MAEImageProcessor.from_pretrained(stored)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"the image processor in {stored} can't be loaded; name another checkpoint"
            ) from error
    mean, std = recipe.image_mean, recipe.image_std
    if mean is None or std is None:
        if data.num_channels == 3 and data.dtype == "uint8":
            mean, std = IMAGENET_MEAN, IMAGENET_STD
        else:
            stats = channel_stats(data.rows, data.num_channels, data.dtype)
            mean, std = stats["image_mean"], stats["image_std"]
    for name, values in (("image_mean", mean), ("image_std", std)):
        if len(values) != data.num_channels:
            raise RecipeError(f"{name} has {len(values)} numbers for {data.num_channels} channels; give one for each")
    return MAEImageProcessor(
        num_channels=data.num_channels,  # pyright: ignore[reportCallIssue] (its own key, unknown to the base class)
        **crop_settings(config.image_height_width, recipe.eval_crop_pct),
        image_mean=mean,
        image_std=std,
        do_rescale=data.dtype != "float32",
        rescale_factor=RESCALE_FACTORS[data.dtype],
    )


def crop_settings(size: tuple[int, int], crop_pct: float) -> dict[str, Any]:
    """The image processor's settings of the evaluation crop, see `evaluation_resize`."""
    resize = evaluation_resize(size, crop_pct)
    return {
        "size": {"shortest_edge": resize} if isinstance(resize, int) else {"height": resize[0], "width": resize[1]},
        "crop_size": {"height": size[0], "width": size[1]},
    }


def make_view(recipe: PretrainRecipe, data: PretrainData, config: MAEConfig) -> View:
    """What becomes of an image on its way into a batch."""
    size = config.image_height_width
    return View(
        size=size,
        num_channels=data.num_channels,
        dtype=data.dtype,
        num_patches=config.num_patches,
        crop_scale=(recipe.crop_scale[0], recipe.crop_scale[-1]),
        flip=recipe.flip,
        masks=recipe.masks_per_image,
        eval_resize=evaluation_resize(size, recipe.eval_crop_pct),
    )


def make_training_views(
    recipe: PretrainRecipe, data: PretrainData, config: MAEConfig, total_steps: int
) -> list[tuple[int, View]]:
    """(first step from 0, what becomes of training images from there on), by `image_size_schedule`.

    Raises:
        RecipeError: if a size or mask ratio doesn't fit the model, or the last size is not the model's own.
    """
    points = recipe.image_sizes or [(0.0, config.image_size)]
    views = []
    for at, size in points:
        sized = copy.deepcopy(config)
        sized.image_size = size
        try:
            sized._check()
            for _, ratio in recipe.mask_ratios:
                sized.num_kept_patches(ratio)
        except ValueError as error:
            raise RecipeError(f"image_size {size} from {at:g} of the run on: {error}") from error
        views.append((at, make_view(recipe, data, sized)))
    if views[-1][1].size != config.image_height_width:
        raise RecipeError(
            f"image_size_schedule ends with {points[-1][1]}, image_size {config.image_size}; end with the model's own"
        )
    return stages(views, total_steps)


def plan_stream(
    recipe: PretrainRecipe, data: PretrainData, ranks: int, state: dict[str, Any] | None
) -> tuple[StreamPlan, list[int]]:
    """How batches are put together, and what each stream has read.

    Args:
        recipe: of the run.
        data: of the run.
        ranks: processes.
        state: of a checkpoint (data.json); None for a new run.

    Raises:
        CheckpointError: if the data is not what the checkpoint was trained on.
    """
    if state is None:
        access = data.rows.source.random_access
        plan = StreamPlan.choose(recipe.images_per_step, ranks, recipe.num_workers, len(data.rows), access)
        return plan, [0] * plan.num_streams
    if state["fingerprint"] != data.fingerprint:
        changed = f"{recipe.dataset} is not the data that this run was trained on (its files or rows changed)"
        if not recipe.allow_data_change:
            raise CheckpointError(f"{changed}; bring the old data back, or pass --allow_data_change true")
        logger.warning("%s; going on with it, the order of samples is another from here on", changed)
    return StreamPlan(**state["plan"]), state["positions"]

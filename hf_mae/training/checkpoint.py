"""Checkpoints: all that a run needs to resume, in folders that are complete or absent at every instant.

    OUT/checkpoint-12000/   model.safetensors config.json preprocessor_config.json   what from_pretrained loads
                            optimizer.safetensors trainer.json data.json              what a run resumes from
                            COMPLETE              sizes and sha256 of all of these; written last

Safetensors and JSON only: reading a checkpoint can't run code.
"""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from .. import files
from ..errors import CheckpointError, DiskFullError, one_line
from ..run_folder import RunFolder

logger = logging.getLogger(__name__)

MANIFEST = "COMPLETE"


def write_checkpoint(
    output_dir: Path, step: int, write: Callable[[Path], None], keep: int, check: Callable[[Path], bool] | None = None
) -> Path:
    """Write `OUT/checkpoint-STEP`, then remove all but this one and the `keep` - 1 before it; returns its folder.

    Checkpoints of later steps are kept: they are broken, or from a run that was rolled back. If an older one can't be
    removed, a warning is logged.

    Args:
        output_dir: folder of the run.
        step: optimizer steps taken.
        write: writes the files into the folder it gets.
        keep: number of checkpoints to keep, 2 or more, so that a broken one is never the only one.
        check: reads the folder back; returns whether it holds what was written.

    Raises:
        DiskFullError: if the disk is full.
        CheckpointError: if `check` returns False.
        OSError: if the folder can't be written for another reason.
    """
    run = RunFolder(output_dir)
    final = run.checkpoint(step)
    temporary = final.with_name(f".tmp-{final.name}")
    for leftover in run.unfinished_checkpoints():
        remove_folder(leftover)
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        _seal(temporary)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if files.is_disk_full(error):
            message = f"there is no room for {final} ({one_line(error)}); earlier checkpoints are intact; make room"
            raise DiskFullError(message) from error
        raise
    if check and not check(temporary):
        raise CheckpointError(f"{temporary} reads back differently from what was written; check the disk")
    files.remove(final)
    temporary.rename(final)
    files.fsync(output_dir)
    for old in run.checkpoints(last_step=step)[:-keep]:
        remove_folder(old)
    return final


def remove_folder(folder: Path) -> None:
    """Remove a folder, or a link to one, that isn't needed any more; only warns on failure: the run can continue."""
    try:
        files.remove(folder)
    except OSError as error:
        logger.warning("%s can't be removed (%s); remove it yourself", folder, one_line(error))


def write_model(output_dir: Path, write: Callable[[Path], None]) -> None:
    """Write the final model into the run's folder; every file is the old or the new one at every instant.

    Args:
        output_dir: folder of the run.
        write: writes the files into the folder it gets.

    Raises:
        CheckpointError: if the files can't be written.
    """
    try:
        files.replace_files(output_dir, write)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the final model can't be written into {output_dir} ({one_line(error)}); fix that, and repeat the "
            "command with --resume auto"
        ) from error


def _seal(folder: Path) -> None:
    """Flush all files to the disk, then write the manifest."""
    manifest = {}
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        manifest[file.name] = {"bytes": file.stat().st_size, "sha256": files.sha256(file)}
        files.settle(file)
    # Without a line end, so that a manifest without its last byte isn't JSON.
    files.write_text(folder / MANIFEST, json.dumps(manifest, indent=1))
    files.settle(folder / MANIFEST)
    files.fsync(folder)


def find_checkpoint(output_dir: Path, resume: str) -> Path | None:
    """The checkpoint to resume from; None if "auto" finds no checkpoints.

    Args:
        output_dir: folder of the run.
        resume: path of a checkpoint, or "auto" for the newest one that isn't broken.

    Raises:
        CheckpointError: if the named checkpoint is missing or broken, or if "auto" finds only broken ones.
    """
    if resume != "auto":
        try:
            verify_checkpoint(Path(resume))
        except CheckpointError as error:
            raise CheckpointError(f"{error}; name another checkpoint") from error
        return Path(resume)
    checkpoints = RunFolder(output_dir).checkpoints()
    for path in reversed(checkpoints):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            logger.warning("%s; falling back to the one before", error)
        else:
            return path
    if checkpoints:
        names = ", ".join(path.name for path in checkpoints)
        raise CheckpointError(
            f"all checkpoints in {output_dir} are broken: {names}; restore one from a backup, or start again in "
            "another --output_dir"
        )
    return None


def verify_checkpoint(path: Path) -> None:
    """Compare all files of a checkpoint with its manifest.

    Raises:
        CheckpointError: for the first file that is missing or differs.
    """
    if not (path / MANIFEST).is_file():
        raise CheckpointError(f"{path} is not a complete checkpoint (it has no {MANIFEST})")
    try:
        manifest = files.read_json(path / MANIFEST)
        found = {file.name for file in path.iterdir() if file.is_file()}
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path / MANIFEST} can't be read ({one_line(error)})") from error
    if not isinstance(manifest, dict) or not manifest:
        raise CheckpointError(f"{path / MANIFEST} lists no files")
    for name, expected in manifest.items():
        file = path / name
        if name not in found:
            raise CheckpointError(f"{file} is missing")
        if expected != {"bytes": file.stat().st_size, "sha256": files.sha256(file)}:
            raise CheckpointError(f"{file} is not what was saved (its sha256 differs)")


def full_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> weight, on the host and not sharded. Every process must call it."""
    return {name: _whole(tensor) for name, tensor in model.state_dict().items()}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """`PARAMETER.KEY` -> state of the optimizer, on the host and not sharded. Every process must call it."""
    return {
        f"{name}.{key}": _whole(value)
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]
) -> None:
    """Restore the optimizer's state; each tensor gets the device and the sharding of its parameter.

    Args:
        model: unwrapped model whose parameters the optimizer trains.
        optimizer: an AdamW of these parameters.
        tensors: the result of `optimizer_tensors`, as read from a checkpoint.

    Raises:
        CheckpointError: if the state of a parameter is missing.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in trained.items():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            value = tensors.get(f"{name}.{key}")
            if value is None:
                message = f"optimizer.safetensors lacks the state of {name}; name a checkpoint of this model"
                raise CheckpointError(message)
            if isinstance(parameter, DTensor) and value.shape == parameter.shape:
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
            optimizer.state[parameter][key] = value.to(parameter.device)


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write tensors to a safetensors file."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file onto the host.

    Raises:
        CheckpointError: if it isn't a safetensors file.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file ({error}); name another checkpoint") from error


def same_tensors(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether both have the same names, dtypes and bits; a NaN equals a NaN with the same bits."""
    return first.keys() == second.keys() and all(
        value.dtype == second[name].dtype and torch.equal(_bits(value), _bits(second[name]))
        for name, value in first.items()
    )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()

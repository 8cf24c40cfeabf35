"""Everything a run needs to continue, written so that it is complete or absent at every instant.

    OUT/checkpoint-12000/   model.safetensors config.json preprocessor_config.json   what from_pretrained loads
                            optimizer.safetensors trainer.json data.json              what a run resumes from
                            COMPLETE              sizes and sha256 of all of these; written last

Safetensors and JSON only: reading a checkpoint can run nothing.
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
from ..errors import CheckpointError, DiskFullError
from ..run_folder import RunFolder

logger = logging.getLogger(__name__)

MANIFEST = "COMPLETE"


def write_checkpoint(
    output_dir: Path, step: int, write: Callable[[Path], None], keep: int, check: Callable[[Path], bool] | None = None
) -> Path:
    """Write `OUT/checkpoint-STEP`, then remove all but this and the `keep` - 1 before it; returns its folder.

    Those of later steps stay: they are broken, or from a run that was rolled back.

    Args:
        output_dir: folder of the run.
        step: optimizer steps taken.
        write: writes the files into the folder that it is given.
        keep: checkpoints that stay, 2 or more, so that a broken one is never the only one.
        check: reads the folder back, and says whether it holds what was written.

    Raises:
        DiskFullError: if there is no room.
        CheckpointError: if `check` says no.
    """
    run = RunFolder(output_dir)
    final = run.checkpoint(step)
    temporary = final.with_name(f".tmp-{final.name}")
    for leftover in run.unfinished_checkpoints():
        shutil.rmtree(leftover)
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        _seal(temporary)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if files.is_disk_full(error):
            message = f"there is no room for {final} ({error}), the checkpoints before it are whole; make room"
            raise DiskFullError(message) from error
        raise
    if check and not check(temporary):
        raise CheckpointError(f"{temporary} does not hold what was written into it; check the disk")
    files.remove(final)
    temporary.rename(final)
    files.fsync(output_dir)
    for old in run.checkpoints(last_step=step)[:-keep]:
        files.remove(old)
    return final


def _seal(folder: Path) -> None:
    """Get all files onto the disk, and the manifest after them."""
    manifest = {}
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        manifest[file.name] = {"bytes": file.stat().st_size, "sha256": files.sha256(file)}
        files.settle(file)
    # Without a line end, so that a manifest without its last byte isn't JSON.
    files.write_text(folder / MANIFEST, json.dumps(manifest, indent=1))
    files.settle(folder / MANIFEST)
    files.fsync(folder)


def find_checkpoint(output_dir: Path, resume: str) -> Path | None:
    """The checkpoint to resume from, or None if there is none yet.

    Args:
        output_dir: folder of the run.
        resume: "auto": the newest complete one, older ones if it is broken; or the path of one.

    Raises:
        CheckpointError: if the named one is missing or broken, or all are.
    """
    if resume != "auto":
        verify_checkpoint(Path(resume))
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
        raise CheckpointError(
            f"none of the {len(checkpoints)} checkpoints in {output_dir} is whole; bring one back, or start anew in "
            "another --output_dir"
        )
    return None


def verify_checkpoint(path: Path) -> None:
    """Compare all files of a checkpoint with its manifest.

    Raises:
        CheckpointError: naming the first file that is missing or differs.
    """
    if not (path / MANIFEST).is_file():
        raise CheckpointError(f"{path} is not a complete checkpoint (no {MANIFEST} in it); name another one")
    try:
        manifest = files.read_json(path / MANIFEST)
        found = {file.name for file in path.iterdir() if file.is_file()}
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path / MANIFEST} can't be read ({error})") from error
    if not isinstance(manifest, dict) or not manifest:
        raise CheckpointError(f"{path / MANIFEST} lists no files; name another checkpoint")
    for name, expected in manifest.items():
        file = path / name
        if name not in found:
            raise CheckpointError(f"{file} is missing")
        if expected != {"bytes": file.stat().st_size, "sha256": files.sha256(file)}:
            raise CheckpointError(f"{file} is not what was saved (its sha256 differs)")


def full_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """All weights on the host, whole. With sharded weights, every process must call it."""
    return {name: _whole(tensor) for name, tensor in model.state_dict().items()}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state on the host, whole, as `PARAMETER.KEY`; every process must call it too."""
    return {
        f"{name}.{key}": _whole(value)
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]
) -> None:
    """Put a saved state back, on the parameters' devices and sharded as they are.

    Raises:
        CheckpointError: if the state of a parameter is missing.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in trained.items():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            value = tensors.get(f"{name}.{key}")
            if value is None:
                message = f"optimizer.safetensors has no state of {name}; the checkpoint is of another model"
                raise CheckpointError(message)
            if isinstance(parameter, DTensor) and value.shape == parameter.shape:
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
            optimizer.state[parameter][key] = value.to(parameter.device)


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write tensors to a safetensors file."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file onto the host; a CheckpointError if it isn't one."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file ({error}); name another checkpoint") from error


def same_tensors(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether both have the same names and, bit by bit (NaN as well), the same values."""
    return first.keys() == second.keys() and all(
        value.dtype == second[name].dtype and torch.equal(_bits(value), _bits(second[name]))
        for name, value in first.items()
    )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()

"""What a pretraining run saves: checkpoints and the final model. Every process takes part; the main one writes."""

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..errors import DiskFullError
from ..image_processing_mae import MAEImageProcessor
from ..modeling_mae import MAEForPreTraining
from ..run_folder import WEIGHTS_NAME
from .checkpoint import (
    full_state_dict,
    load_tensors,
    optimizer_tensors,
    same_tensors,
    save_tensors,
    write_checkpoint,
    write_model,
)
from .state import RunState

OPTIMIZER = "optimizer.safetensors"


@dataclass
class Saver:
    """Writes checkpoints and the final model of a run into its folder."""

    accelerator: Accelerator
    model: MAEForPreTraining  # unwrapped, like the optimizer
    optimizer: torch.optim.Optimizer
    processor: MAEImageProcessor
    output_dir: Path
    keep: int  # number of checkpoints to keep
    saved_before: bool = False

    def checkpoint(self, state: RunState) -> str | None:
        """Write `checkpoint-STEP`. Every process must call it.

        Returns:
            None, or on every process the message of a full disk.

        Raises:
            CheckpointError: if the files read back differ from what was written.
        """
        weights, moments = full_state_dict(self.model), optimizer_tensors(self.model, self.optimizer)
        failure: list[str | None] = [None]
        if self.accelerator.is_main_process:
            try:
                self._write(weights, moments, state)
            except DiskFullError as error:
                failure = [str(error)]
        # The other processes wait here for the main one, and get its message.
        broadcast_object_list(failure)
        return failure[0]

    def _write(self, weights: dict[str, torch.Tensor], moments: dict[str, torch.Tensor], state: RunState) -> None:
        def write(folder: Path) -> None:
            self._write_model(weights, folder)
            save_tensors(moments, folder / OPTIMIZER)
            state.write(folder)

        def read_back(folder: Path) -> bool:
            written = ((weights, WEIGHTS_NAME), (moments, OPTIMIZER))
            same = all(same_tensors(tensors, load_tensors(folder / name)) for tensors, name in written)
            return same and RunState.read(folder) == state

        # Only the first checkpoint is read back: a disk or a library version that damages files would damage it too.
        check = None if self.saved_before else read_back
        write_checkpoint(self.output_dir, state.step, write, self.keep, check)
        self.saved_before = True

    def final(self) -> None:
        """Write the model and its image processor into the run's own folder. Every process must call it.

        Raises:
            CheckpointError: if they can't be written.
        """
        weights = full_state_dict(self.model)
        if self.accelerator.is_main_process:
            write_model(self.output_dir, lambda folder: self._write_model(weights, folder))

    def _write_model(self, weights: dict[str, torch.Tensor], folder: Path) -> None:
        # save_pretrained empties the dict it gets, so pass a copy.
        self.model.save_pretrained(folder, state_dict=dict(weights))
        self.processor.save_pretrained(folder)

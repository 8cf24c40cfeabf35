"""Trainer callbacks of fine-tuning: new crops in each epoch, averaged weights, the run's log."""

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..data.labelled import LabelledImages
from ..errors import UserError
from ..run_folder import RunFolder
from .checkpoint import load_tensors, save_tensors
from .log import RunLog

EMA_FILE = "ema.safetensors"


class EpochCallback(TrainerCallback):
    """Sets the data set's epoch (Accelerate's loader does so only on one process); logs and scores the last step."""

    def __init__(self, images: LabelledImages):
        self.images = images

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.images.set_epoch(int(state.epoch or 0))

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = control.should_evaluate = True


class EMACallback(TrainerCallback):
    """An exponential moving average of the trained weights, used in evaluations and as the final model.

    It starts at the initial weights. After each step, average = decay * average + (1 - decay) * weights. Checkpoints
    hold both.

    Args:
        decay: in [0, 1].
    """

    def __init__(self, decay: float):
        self.update, self.average, self.swapped = get_ema_multi_avg_fn(decay), {}, False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        trained = {name: p for name, p in kwargs["model"].named_parameters() if p.requires_grad}
        if state.global_step:
            stored = load_tensors(Path(str(args.resume_from_checkpoint)) / EMA_FILE)
            self.average = {name: stored[name].to(parameter.device) for name, parameter in trained.items()}
        else:
            self.average = {name: parameter.detach().clone() for name, parameter in trained.items()}

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trained = [p for name, p in kwargs["model"].named_parameters() if name in self.average]
        self.update(list(self.average.values()), trained, None)

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_evaluate:
            self._swap(kwargs["model"])

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.swapped:
            self._swap(kwargs["model"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            save_tensors(self.average, RunFolder(str(args.output_dir)).checkpoint(state.global_step) / EMA_FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._swap(kwargs["model"])
        self.swapped = False  # later evaluations leave the average in the model

    @torch.no_grad()
    def _swap(self, model: nn.Module) -> None:
        self.swapped = not self.swapped
        for name, parameter in model.named_parameters():
            if name in self.average:
                parameter.data, self.average[name] = self.average[name], parameter.data


class LogCallback(TrainerCallback):
    """Writes metrics.jsonl and shows one progress bar, as in pretraining, instead of Trainer's output.

    Args:
        accelerator: the Trainer's Accelerator.
        total_batch_size: images per optimizer step, over all processes.
    """

    def __init__(self, accelerator: Any, total_batch_size: int):
        self.accelerator, self.total_batch_size = accelerator, total_batch_size
        self.figures: dict[str, float] = {}
        self.log: Any = None  # a RunLog, once training begins

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.log = RunLog(self.accelerator, Path(str(args.output_dir)), state.global_step, state.max_steps)
        self.logged, self.seconds, self.waited, self.mark = state.global_step, 0.0, 0.0, time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The step's batches have arrived by now.
        self.waited += time.perf_counter() - self.mark

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.seconds, self.mark = self.seconds + now - self.mark, now
        self.log.bar.update()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.mark = time.perf_counter()  # training speed excludes saving and evaluating

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        numbers, step = kwargs["logs"], state.global_step
        if "loss" not in numbers:
            return
        if not math.isfinite(numbers["loss"]):
            raise UserError(f"the loss is {numbers['loss']} at step {step}; lower --blr, or set --mixed_precision no")
        self.log.steps(
            step, images_seen=step * self.total_batch_size, epoch=state.epoch, loss=numbers["loss"],
            lr=numbers["learning_rate"], grad_norm=numbers.get("grad_norm"),
            images_per_second=(step - self.logged) * self.total_batch_size / self.seconds,
            data_wait=self.waited / self.seconds,
        )  # fmt: skip
        self.logged, self.seconds, self.waited = step, 0.0, 0.0

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        timing = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
        numbers = {name: value for name, value in kwargs["metrics"].items() if not name.endswith((*timing, "epoch"))}
        self.figures = {name.removeprefix("eval_"): value for name, value in numbers.items()}
        # A run that continues from its last step scores that step again.
        if not any(event["step"] == state.global_step and numbers.keys() <= event.keys() for event in self.log.events):
            self.log.event(state.global_step, epoch=state.epoch, **numbers)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in self.figures.items())
        self.log.say(f"step {state.global_step}: {shown}")
        self.mark = time.perf_counter()

    def close(self) -> None:
        """Close the progress bar, even after an error."""
        if self.log is not None:
            self.log.close()

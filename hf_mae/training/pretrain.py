"""The pretraining loop: batch -> loss -> step -> log -> save, on one process or many.

Run by `hf-mae pretrain`, or under `torchrun` / `accelerate launch` with `-m hf_mae.cli pretrain`.
"""

import logging
import time
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import set_seed
from torch import nn
from torch.distributed.tensor import DTensor

from ..data.loader import TrainingStream, check_bad
from ..data.transform import find_no_data, make_normalizer
from ..data.understood import announce_data
from ..errors import CheckpointError
from ..evaluation.online import OnlineEvaluator
from ..hub.push import BackgroundPush
from ..keys.run_keys import PretrainRecipe
from ..modeling_mae import MAEForPreTraining
from ..optim.groups import adamw
from ..optim.schedule import lr_at, stages, value_at
from ..run_folder import RunFolder
from .batches import MicroBatches
from .build import build_model, build_processor, make_spec, make_training_specs, open_data, start_state
from .checkpoint import load_optimizer_tensors, load_tensors
from .describe import RunSetup, announce, derive_facts, warn_if_batch_is_larger
from .devices import make_accelerator, strategy_name, tune_for_device
from .guard import StepGuard, StopSignals
from .held_out import HeldOut
from .log import RunLog, Stopwatch
from .resume import check_step, find_stored
from .saving import OPTIMIZER, Saver

logger = logging.getLogger(__name__)


def pretrain(recipe: PretrainRecipe) -> dict[str, Any]:
    """Pretrain a masked autoencoder.

    Args:
        recipe: all settings of the run.

    Returns:
        A dictionary; after a dry run it has only `steps`, `model` and `picture`.
        `steps`: optimizer steps taken so far; in a dry run, those of the whole run.
        `model`: folder of the final model; None if the run was stopped before its end, or is a dry run.
        `picture`: path of the newest reconstructions, on the main process of a finished run that drew any; else None.
        `first_eval_loss`, `last_eval_loss`: mean losses of the evaluation images; None if not finite, or not logged.
        `images_per_second`: of all processes, over the logged steps; None without any.
        `quality`: the newest event with `rankme`, and with `knn_top1` and `linear_top1` in percent if there are labels;
        {} if nothing was measured.
        `bad_samples`: number of training images that could not be decoded; an image counts in each epoch.
        `skipped_steps`: number of steps skipped because loss or gradient was not finite.
        Losses and `quality` come from the log, so they are empty on every process but the main one.

    Raises:
        UserError: for anything the user can fix; one line with the remedy.
    """
    run = PretrainRun(recipe)
    run.describe()
    if recipe.dry_run:
        return {"steps": run.state.total_steps, "model": None, "picture": None}
    return run.train()


class PretrainRun:
    """One run: its parts and its loop."""

    def __init__(self, recipe: PretrainRecipe):
        self.recipe, self.output_dir = recipe, Path(str(recipe.output_dir))
        self.folder = RunFolder(self.output_dir)
        self.accelerator = make_accelerator(recipe)
        self.stored, state = find_stored(recipe, self.output_dir)
        # The main process goes first, so that a data set library writes its cache only once.
        with self.accelerator.main_process_first():
            self.data = open_data(recipe)
        ranks = self.accelerator.num_processes
        total_steps, self.warmup_steps = recipe.steps(len(self.data.rows))
        self.per_device_batch_size, self.grad_accum_steps = recipe.micro_batch(ranks)
        self.state = start_state(recipe, self.data, total_steps, ranks, state)
        check_step(self.stored, self.state.step, total_steps)
        self._build_model()
        self._build_batches()
        self._build_evaluation()
        self.guard, self.stop_signals = StepGuard(self.accelerator, **self.state.guard), StopSignals()
        self.saver = Saver(
            self.accelerator, self.unwrapped, self.optimizer.optimizer, self.processor, self.output_dir,
            recipe.keep_checkpoints,
        )  # fmt: skip
        self.mask_ratios = stages(recipe.mask_ratios, total_steps)
        self.watch, self.unlogged = Stopwatch(), list[torch.Tensor]()
        self.publisher: BackgroundPush | None = None

    def _build_model(self) -> None:
        """Model, image processor and optimizer; new, or from the checkpoint."""
        recipe, accelerator, stored = self.recipe, self.accelerator, self.stored
        set_seed(recipe.seed)
        model = build_model(recipe, stored, self.data.num_channels)
        tune_for_device(model, accelerator.device, accelerator.mixed_precision)
        self.config = model.config
        self.processor = build_processor(recipe, stored, self.data, self.config)
        self.normalize = make_normalizer(self.processor, accelerator.device)
        optimizer = adamw(model, (recipe.adam_beta1, recipe.adam_beta2), recipe.weight_decay)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.unwrapped: MAEForPreTraining = accelerator.unwrap_model(self.model)
        if stored:
            load_optimizer_tensors(self.unwrapped, self.optimizer.optimizer, load_tensors(stored / OPTIMIZER))
        if accelerator.scaler is not None and self.state.scaler:
            accelerator.scaler.load_state_dict(self.state.scaler)

    def _build_batches(self) -> None:
        """This process's share of the remaining steps."""
        recipe, state, ranks = self.recipe, self.state, self.accelerator.num_processes
        self.spec = make_spec(recipe, self.data, self.config, self.processor)
        specs = make_training_specs(recipe, self.spec, self.config, state.total_steps)
        items_per_step = state.plan.items_per_step(ranks, recipe.num_workers, self.grad_accum_steps)
        stream = TrainingStream(
            self.data.rows, state.plan, self.spec, recipe.seed, state.positions, state.step, state.total_steps,
            self.accelerator.process_index, ranks, items_per_step, specs,
        )  # fmt: skip
        masks = recipe.masks_per_image
        images = self.per_device_batch_size // masks
        self.batches = MicroBatches(stream, images, masks, recipe.num_workers, self.accelerator.device)

    def _build_evaluation(self) -> None:
        """What the run evaluates: the loss of the evaluation images, and the encoder's features."""
        data = self.data
        shared: dict[str, Any] = {
            "spec": self.spec,
            "normalize": self.normalize,
            "batch_size": self.per_device_batch_size,  # what fits in training fits here too
            "num_workers": min(self.recipe.num_workers, 1),
            "accelerator": self.accelerator,
        }
        config = self.config
        self.held_out = HeldOut(
            rows=data.eval_rows, mask_seed=config.eval_mask_seed, patch_size=config.patch_height_width, **shared
        )
        self.quality = OnlineEvaluator(
            bank_rows=data.rows, query_rows=data.eval_rows, samples=self.recipe.quality_samples, **shared
        )

    def describe(self) -> None:
        """Print what the run will do, and write run_config.yaml."""
        recipe, accelerator, data = self.recipe, self.accelerator, self.data
        setup = RunSetup(
            device=accelerator.device,
            ranks=accelerator.num_processes,
            precision=accelerator.mixed_precision,
            strategy=strategy_name(accelerator),
            total_steps=self.state.total_steps,
            warmup_steps=self.warmup_steps,
            training_images=len(data.rows),
            evaluation_images=len(data.eval_rows),
            evaluated_on=data.evaluated_on,
            model=self.unwrapped,
        )
        facts = derive_facts(recipe, setup)
        if accelerator.is_main_process:
            announce_data(data.probe, self.spec, data.rows, data.eval_rows, data.evaluated_on)
            announce(recipe, facts, self.config.grid_size, accelerator.device, self.stored)
            repeated = recipe.images_per_step / len(data.rows)
            warn_if_batch_is_larger(recipe, len(data.rows), f"it repeats each of them {repeated:.1f} times on average")
            self._warn_without_labels()
        accelerator.wait_for_everyone()

    def _warn_without_labels(self) -> None:
        if self.recipe.quality_steps != 0 and (rows := self.quality.unlabelled):
            message = "%s: none of %d images has a label, so knn_top1 and linear_top1 are not measured; %s"
            logger.warning(message, rows.name, len(rows), rows.source.label_remedy)

    # ------------------------------------------------------------------------------------------ the loop

    def train(self) -> dict[str, Any]:
        """Take the remaining steps, then save the final model and its picture."""
        recipe, accelerator, state = self.recipe, self.accelerator, self.state
        if recipe.log_with:
            plain = {name: value for name, value in recipe.to_dict().items() if isinstance(value, int | float | str)}
            accelerator.init_trackers("hf_mae", config=plain)
        first_step = state.step
        self.log = RunLog(accelerator, self.output_dir, first_step, state.total_steps)
        if accelerator.is_main_process:
            if state.bad["named"] or self.folder.bad_file.exists():
                self.folder.write_bad_samples(state.bad["named"])  # forgets those found after the checkpoint
            if recipe.push_to_hub:
                self.publisher = BackgroundPush(recipe.push_to_hub, recipe.hub_private_repo, self.log.say)
        with closing(self.log), closing(self.batches), self.stop_signals:
            self._take_steps()
        finished = state.step == state.total_steps
        timed_steps = state.step - first_step - len(self.unlogged)
        eval_losses = [event["eval_loss"] for event in self.log.events if "eval_loss" in event]
        if finished:
            self.saver.final()
        summary = {
            "steps": state.step,
            "first_eval_loss": eval_losses[0] if eval_losses else None,
            "last_eval_loss": eval_losses[-1] if eval_losses else None,
            "images_per_second": timed_steps * recipe.images_per_step / self.watch.total if timed_steps else None,
            "quality": next((event for event in reversed(self.log.events) if "rankme" in event), {}),
            "bad_samples": sum(state.bad["counts"].values()),
            "skipped_steps": self.guard.skipped_steps,
            "model": str(self.output_dir) if finished else None,
            "picture": self.log.animation() if finished else None,
        }
        accelerator.wait_for_everyone()
        accelerator.state.destroy_process_group()
        # Last, so that no other process waits for an upload.
        if self.publisher and finished:
            self.publisher.wait()
            self.publisher.start(self.output_dir)
            self.publisher.wait()
        return summary

    def _take_steps(self) -> None:
        recipe, state = self.recipe, self.state
        names = ("eval_steps", "quality_steps", "save_steps")
        intervals = (recipe.log_steps, *(recipe.interval(name, state.total_steps) for name in names))
        if state.step == 0:
            self._evaluate()
            if recipe.quality_steps != 0:
                self._measure_quality()
        self.watch.restart()
        while state.step < state.total_steps:
            loss, grad_norm, lr = self._step()
            self.unlogged.append(loss)
            state.advance(recipe.images_per_step)
            last = state.step == state.total_steps
            logs, evaluates, measures, saves = (every > 0 and (last or state.step % every == 0) for every in intervals)
            if logs:
                self._log(lr, grad_norm)
            stop = self._agree(up_to_now=logs or evaluates or saves)
            with self.watch.stopped():  # training speed excludes evaluating and saving
                if evaluates:
                    self._evaluate()
                if measures:
                    self._measure_quality()
                if saves or stop:
                    self._save(must=stop or last)
            if stop:
                self.log.say(f"stopped on request after step {state.step}; continue with --resume auto")
                break

    def _step(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Take the next optimizer step.

        Returns:
            () this process's mean loss, on the device.
            () norm of the gradient before clipping, over all processes, on the device.
            The learning rate of the step.
        """
        recipe, accelerator, step = self.recipe, self.accelerator, self.state.step  # from 0
        lr = lr_at(step, recipe.lr, self.warmup_steps, self.state.total_steps, recipe.min_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.config.drop_path_rate:
            # These random numbers also depend only on seed, step and rank, so that a resumed run draws the same.
            torch.manual_seed(hash((recipe.seed, step + 1, accelerator.process_index)))
        options: dict[str, Any] = {"interpolate_pos_encoding": True} if recipe.image_sizes else {}
        if self.mask_ratios:
            options["mask_ratio"] = value_at(self.mask_ratios, step)
        loss = torch.zeros((), device=accelerator.device)
        keys: list[str] = []
        for micro_step in range(self.grad_accum_steps):
            started = time.perf_counter()
            batch = next(self.batches)
            self.watch.waiting(time.perf_counter() - started)
            keys += batch.keys
            last = micro_step == self.grad_accum_steps - 1
            with nullcontext() if last else accelerator.no_sync(self.model):
                pixel_values = self.normalize(batch.images)
                no_data = find_no_data(batch.images, self.config.patch_height_width)
                if recipe.masks_per_image > 1:
                    pixel_values = pixel_values.repeat_interleave(recipe.masks_per_image, dim=0)
                    if no_data is not None:
                        no_data = no_data.repeat_interleave(recipe.masks_per_image, dim=0)
                options["no_data"] = no_data
                part = self.model(pixel_values, noise=batch.noise, **options).loss / self.grad_accum_steps
                accelerator.backward(part)
            loss += part.detach()
        grad_norm = self._clip()
        # With fp16, the scaler expects gradients to overflow, and handles it.
        finite = loss.isfinite() if accelerator.scaler is not None else loss.isfinite() & grad_norm.isfinite()
        skip = self.guard.judge(step + 1, finite, self.stop_signals.received, keys)
        if accelerator.scaler is None:
            # The fused optimizer skips a step by this flag on the device, which a GradScaler would otherwise set.
            self.optimizer.optimizer.found_inf = skip
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss, grad_norm, lr

    def _clip(self) -> torch.Tensor:
        """Clip the gradient if the recipe says so; returns its norm before clipping, () on the device."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        if self.recipe.clip_grad is not None:
            norm = self.accelerator.clip_grad_norm_(parameters, self.recipe.clip_grad)
        else:
            self.accelerator.unscale_gradients()
            norm = nn.utils.get_total_norm([cast(torch.Tensor, parameter.grad) for parameter in parameters])
        return norm.full_tensor() if isinstance(norm, DTensor) else cast(torch.Tensor, norm)

    def _agree(self, up_to_now: bool) -> bool:
        """Report the skipped steps; returns whether to stop. Every process must call it.

        Args:
            up_to_now: include the newest step, which makes the host wait for a GPU.

        Raises:
            UserError: after ten skipped steps in a row.
        """
        stop = self.stop_signals.received and self.accelerator.num_processes == 1  # no others to agree with
        for verdict in self.guard.verdicts(up_to_now):
            stop = stop or verdict.stop
            if verdict.skipped:
                self.log.event(verdict.step, skipped=True, samples=verdict.samples)
                some = ", ".join(verdict.samples[:3])
                self.log.say(
                    f"step {verdict.step} is skipped, because its loss or gradient is not finite; samples {some}, ..."
                )
            self.guard.check()
        return stop

    # ------------------------------------------------------------------------------------------ between steps

    def _log(self, lr: float, grad_norm: torch.Tensor) -> None:
        """Write a line of metrics.jsonl, with the mean loss of the unskipped steps since the last line."""
        state, losses = self.state, cast(torch.Tensor, self.accelerator.reduce(torch.stack(self.unlogged), "mean"))
        loss = losses[losses.isfinite()].mean().item()
        seconds, waited = self.watch.read()
        self.unlogged = []
        self.log.steps(
            state.step, images_seen=state.images_seen, epoch=state.images_seen / len(self.data.rows), loss=loss, lr=lr,
            grad_norm=grad_norm.item(), images_per_second=len(losses) * self.recipe.images_per_step / seconds,
            data_wait=waited,
        )  # fmt: skip
        self._check_bad()

    def _evaluate(self) -> None:
        """Log the loss of the evaluation images, and a picture of a few."""
        step = self.state.step
        loss, bad = self.held_out.loss(self.model)
        self.log.event(step, eval_loss=loss)
        if bad and step in (0, self.state.total_steps):
            some = ", ".join(f"{key} ({reason})" for key, reason in bad[:3])
            self.log.say(f"{len(bad)} evaluation images can't be decoded and are left out, such as {some}")
        self.log.picture(step, self.held_out.picture(self.unwrapped, self.processor))

    def _measure_quality(self) -> None:
        """Log kNN accuracy, linear accuracy and RankMe of the encoder."""
        figures = self.quality.measure(self.model)
        if self.quality.notice:
            self.log.say(self.quality.notice)
        if figures:
            self.log.event(self.state.step, **figures)

    def _save(self, must: bool) -> None:
        """Write `checkpoint-STEP`, and push it in the background if it isn't the last one. Every process must call it.

        Args:
            must: whether a full disk ends the run; otherwise the run continues without this checkpoint.

        Raises:
            CheckpointError: if the disk is full (with `must`), or if a file read back differs from what was written.
        """
        state = self.state
        for stream, position in self.batches.positions().items():
            state.positions[stream] = position
        self._count_bad()
        state.guard = self.guard.counters()
        if self.accelerator.scaler is not None:
            state.scaler = self.accelerator.scaler.state_dict()
        failure = self.saver.checkpoint(state)
        if failure and must:
            raise CheckpointError(f"{failure}, and continue with --resume auto")
        if failure:
            self.log.say(f"WARNING: {failure}; the run continues, and tries again at its next save")
        elif self.publisher and state.step < state.total_steps:
            self.publisher.start(self.folder.checkpoint(state.step))

    def _count_bad(self) -> bool:
        """Count the samples that failed to decode since the last call; returns whether there were any."""
        bad, known = self.batches.take_bad(), len(self.state.bad["named"])
        self.state.add_bad(bad)
        if len(self.state.bad["named"]) > known and self.accelerator.is_main_process:
            self.folder.write_bad_samples(self.state.bad["named"])
        return bool(bad)

    def _check_bad(self) -> None:
        """Report the samples that could not be decoded.

        Raises:
            DataError: if they are a larger fraction than `max_bad_fraction`.
        """
        new, counts, file = self._count_bad(), self.state.bad["counts"], self.folder.bad_file
        bad = sum(counts.values())
        if new:
            reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
            self.log.say(f"{bad} images could not be decoded so far ({reasons}); see {file}")
        # Counted against at least 1,000 images, because one bad file among the first ten means little.
        count = max(bad + self.state.images_seen, min(1000, len(self.data.rows)))
        message = f"{bad / count:.1%} of the images can't be decoded (see {file})"
        check_bad(bad, count, self.recipe.max_bad_fraction, message)

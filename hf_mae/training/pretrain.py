"""The pretraining loop: batch -> loss -> step -> log -> save, on one process or many.

Run by `hf-mae pretrain`, or under `torchrun` / `accelerate launch` with `-m hf_mae.cli pretrain`.
"""

import signal
import time
from collections.abc import Generator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from accelerate import DistributedType
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from torch import nn
from torch.distributed.tensor import DTensor

from .. import __version__
from ..data.loader import Batch, TrainingStream, each_batch, make_loader
from ..data.sources import DataError
from ..data.transform import make_normalizer
from ..errors import CheckpointError, DiskFullError
from ..evaluation.online import OnlineEvaluator
from ..files import replace_files, write_json, write_text
from ..hub.push import BackgroundPush
from ..modeling_mae import MAEForPreTraining
from ..optim.groups import adamw
from ..optim.schedule import lr_at, stages, value_at
from .build import build_model, build_processor, make_spec, make_training_specs, open_data, plan_stream
from .checkpoint import (
    full_state_dict,
    load_optimizer_tensors,
    load_tensors,
    optimizer_tensors,
    same_tensors,
    save_tensors,
    write_checkpoint,
)
from .devices import describe_hardware, make_accelerator, tune_for_cpu
from .guard import StepGuard
from .held_out import HeldOut
from .log import BadSamples, RunLog, Stopwatch
from .recipe import PretrainRecipe
from .resume import find_stored, read_state

STRATEGIES = {
    DistributedType.NO: "one process",
    DistributedType.MULTI_CPU: "DDP",
    DistributedType.MULTI_GPU: "DDP",
    DistributedType.FSDP: "FSDP",
}


def pretrain(recipe: PretrainRecipe) -> dict[str, Any]:
    """Pretrain a masked autoencoder.

    Args:
        recipe: the run.

    Returns:
        What the run ended with: `model` (folder), `picture` (path), `first_eval_loss`, `last_eval_loss`, `steps`,
        `images_per_second`, `quality` (the last figures of the encoder), `bad_samples`, `skipped_steps`; None for what
        there is not.

    Raises:
        UserError: for what a user can mend; one line with the remedy.
    """
    run = PretrainRun(recipe)
    run.describe()
    if recipe.dry_run:
        return {"steps": run.total_steps, "model": None, "picture": None}
    return run.train()


class PretrainRun:
    """One run: what it is made of, and its loop.

    Args:
        recipe: the run.
    """

    def __init__(self, recipe: PretrainRecipe):
        self.recipe = recipe
        self.output_dir = Path(recipe.output_dir or "outputs/pretrain")
        self.accelerator = make_accelerator(recipe)
        self.stored = find_stored(recipe, self.output_dir)
        trainer, data_state = read_state(self.stored) if self.stored else (None, None)
        # One process after the other, so that what a data set library caches is written once.
        with self.accelerator.main_process_first():
            self.data = open_data(recipe)
        ranks = self.accelerator.num_processes
        self.total_steps, self.warmup_steps = recipe.steps(len(self.data.rows))
        self.micro_batch, self.grad_accum_steps = recipe.micro_batch(ranks)
        self.plan, self.positions = plan_stream(recipe, self.data, ranks, data_state)
        self.items_per_step = self.plan.items_per_step(ranks, recipe.num_workers, self.grad_accum_steps)
        set_seed(recipe.seed)
        model = build_model(recipe, self.stored, self.data.num_channels)
        if self.accelerator.device.type == "cpu":
            tune_for_cpu(model, self.accelerator.mixed_precision)
        self.config = model.config
        self.processor = build_processor(recipe, self.stored, self.data, self.config)
        self.spec = make_spec(recipe, self.data, self.config, self.processor)
        self.specs = make_training_specs(recipe, self.spec, self.config, self.total_steps)
        self.mask_ratios = stages(recipe.mask_ratios, self.total_steps)
        self.normalize = make_normalizer(self.processor, self.data.dtype, self.accelerator.device)
        optimizer = adamw(model, (recipe.adam_beta1, recipe.adam_beta2), recipe.weight_decay)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.step = trainer["step"] if trainer else 0
        if trainer and self.step > self.total_steps:
            raise CheckpointError(f"{self.stored} is at step {self.step}, the run ends at {self.total_steps}")
        self.guard = StepGuard(self.accelerator, **(trainer["guard"] if trainer else {}))
        self._bad_before = data_state["bad"] if data_state else None
        self._load_optimizer(trainer)
        self.held_out = HeldOut(
            self.data.eval_rows, self.spec, self.micro_batch, self.config.eval_mask_seed, self.normalize,
            recipe.num_workers, self.accelerator,
        )  # fmt: skip
        # Of all processes' images at once, on each of them no more than a training step has.
        self.quality = OnlineEvaluator(
            self.data.rows, self.data.eval_rows, self.spec, self.normalize, self.micro_batch,
            min(recipe.num_workers, 1), self.accelerator, recipe.quality_samples,
        )  # fmt: skip
        self.stop_requested = False
        self.saved_before = False
        self.bad: BadSamples | None = None
        self.moved: dict[int, int] = {}
        self.newly_bad: list[tuple[str, str]] = []

    def _load_optimizer(self, trainer: dict[str, Any] | None) -> None:
        if not self.stored or not trainer:
            return
        model = self.accelerator.unwrap_model(self.model)
        load_optimizer_tensors(model, self._torch_optimizer, load_tensors(self.stored / "optimizer.safetensors"))
        if self.accelerator.scaler is not None and trainer.get("scaler"):
            self.accelerator.scaler.load_state_dict(trainer["scaler"])

    @property
    def _torch_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def describe(self) -> None:
        """Write run_config.yaml and print what is about to happen."""
        recipe, accelerator = self.recipe, self.accelerator
        derived = {
            "version": __version__,
            "torch": str(torch.__version__),
            "hardware": describe_hardware(accelerator.device),
            "processes": accelerator.num_processes,
            "strategy": STRATEGIES.get(accelerator.distributed_type, accelerator.distributed_type.value),
            "mixed_precision": accelerator.mixed_precision,
            "per_device_batch_size": self.micro_batch,
            "grad_accum_steps": self.grad_accum_steps,
            "lr": recipe.lr,
            "total_steps": self.total_steps,
            "warmup_steps": self.warmup_steps,
            "training_images": len(self.data.rows),
            "evaluation_images": len(self.data.eval_rows),
            "evaluated_on": self.data.evaluated_on,
            "parameters": self.accelerator.unwrap_model(self.model).num_parameters(),
        }
        if accelerator.is_main_process:
            h, w = self.config.grid_size
            masks = f", each with {recipe.masks_per_image} masks" if recipe.masks_per_image > 1 else ""
            print(
                f"{recipe.recipe or 'pretrain'}: {derived['training_images']:,} images of {recipe.dataset}, "
                f"{self.data.num_channels} x {self.spec.size[0]} x {self.spec.size[1]} {self.data.dtype}, "
                f"{h} x {w} patches, {derived['parameters'] / 1e6:.1f} M parameters\n"
                f"{self.total_steps:,} steps of {recipe.images_per_step} images{masks} = {accelerator.num_processes} "
                f"{'process' if accelerator.num_processes == 1 else 'processes'} x {self.grad_accum_steps} x "
                f"{self.micro_batch} ({derived['strategy']}, {accelerator.device}, precision "
                f"{accelerator.mixed_precision}), lr {recipe.lr:.3g}; evaluation on {self.data.evaluated_on}\n"
                f"{f'going on from {self.stored}' if self.stored else 'from ' + (recipe.model or 'scratch')}, into "
                f"{self.output_dir}",
                flush=True,
            )
            if not recipe.dry_run:
                self.output_dir.mkdir(parents=True, exist_ok=True)
                text = yaml.safe_dump({"recipe": recipe.to_dict(), "derived": derived}, sort_keys=False)
                write_text(self.output_dir / "run_config.yaml", text)
        accelerator.wait_for_everyone()
        if recipe.log_with and not recipe.dry_run:
            accelerator.init_trackers("hf_mae", config={k: v for k, v in recipe.to_dict().items() if _is_plain(v)})

    # ------------------------------------------------------------------------------------------ the loop

    def train(self) -> dict[str, Any]:
        """All steps that are left, then the final model and its picture."""
        recipe, first_step = self.recipe, self.step
        log = RunLog(self.accelerator, self.output_dir, first_step, self.total_steps)
        if self.accelerator.is_main_process:
            self.bad = BadSamples(self.output_dir / "bad_samples.jsonl", self._bad_before)
        eval_steps = recipe.eval_steps or max(1, self.total_steps // 10)
        save_steps = recipe.save_steps or max(1, self.total_steps // 10)
        quality_steps = max(1, self.total_steps // 5) if recipe.quality_steps is None else recipe.quality_steps
        previous = {sig: signal.signal(sig, self._request_stop) for sig in (signal.SIGTERM, signal.SIGUSR1)}
        batches = self._batches(first_step)
        publisher = None
        if recipe.push_to_hub and self.accelerator.is_main_process:
            publisher = BackgroundPush(recipe.push_to_hub, recipe.hub_private_repo, log.say)
        losses: list[torch.Tensor] = []
        watch = Stopwatch()
        try:
            if first_step == 0:
                self._evaluate(log)
                if quality_steps:
                    self._measure_quality(log)
            watch.restart()
            for step in range(first_step + 1, self.total_steps + 1):
                loss, grad_norm, lr = self._step(step, batches, watch)
                losses.append(loss)
                self.step = step
                last = step == self.total_steps
                logs, evaluates, saves = (last or step % n == 0 for n in (recipe.log_steps, eval_steps, save_steps))
                if logs:
                    self._log(log, losses, lr, grad_norm, watch)
                    losses = []
                stop = self._agree(log, up_to_now=logs or evaluates or saves)
                with watch.stopped():  # evaluating and saving are not part of the training speed
                    if evaluates:
                        self._evaluate(log)
                    if quality_steps and (last or step % quality_steps == 0):
                        self._measure_quality(log)
                    if saves or stop:
                        self.save_checkpoint(log, must=stop or last)
                        if publisher and not last:
                            publisher.start(self.output_dir / f"checkpoint-{step}")
                if stop:
                    log.say(f"stopped on request after step {step}; go on with --resume auto")
                    break
        finally:
            for sig, handler in previous.items():
                signal.signal(sig, handler)
            batches.close()
            log.close()
        finished = self.step == self.total_steps
        seconds_spent, steps_timed = watch.total, self.step - first_step - len(losses)
        summary = {
            "steps": self.step,
            "first_eval_loss": log.evaluations[0]["eval_loss"] if log.evaluations else None,
            "last_eval_loss": log.evaluations[-1]["eval_loss"] if log.evaluations else None,
            "images_per_second": steps_timed * recipe.images_per_step / seconds_spent if steps_timed else None,
            "quality": log.quality,
            "bad_samples": self.bad.total if self.bad else 0,
            "skipped_steps": self.guard.skipped_steps,
            "model": self._save_final() if finished else None,
            "picture": log.animation() if finished else None,
        }
        self.accelerator.wait_for_everyone()
        self.accelerator.state.destroy_process_group()
        # Last, so that no other process waits for an upload.
        if publisher and finished:
            publisher.wait()
            publisher.start(self.output_dir)
            publisher.wait()
        return summary

    @property
    def images_seen(self) -> int:
        """Training images so far, those of skipped steps among them; each once, with however many masks."""
        return self.step * self.recipe.images_per_step

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self.images_seen / len(self.data.rows)

    def _agree(self, log: RunLog, up_to_now: bool) -> bool:
        """Tell of the steps that were left out; whether to stop.

        Raises:
            UserError: if there were too many in a row.
        """
        stop = self.stop_requested and self.accelerator.num_processes == 1  # no one else has to be told
        for verdict in self.guard.verdicts(up_to_now):
            stop = stop or verdict.stop
            if verdict.skipped:
                log.event(verdict.step, skipped=True, samples=verdict.samples)
                some = ", ".join(verdict.samples[:3])
                log.say(f"step {verdict.step} left out: its loss or gradient is not finite; samples {some}, ...")
            self.guard.check()
        return stop

    def _log(
        self, log: RunLog, losses: list[torch.Tensor], lr: float, grad_norm: torch.Tensor, watch: Stopwatch
    ) -> None:
        """A line of metrics.jsonl, with the mean loss of the steps since the last one that were not left out."""
        mean_losses = self._reduce(torch.stack(losses), "mean")
        loss = mean_losses[mean_losses.isfinite()].mean().item()
        seconds, waited = watch.read()
        speed = len(losses) * self.recipe.images_per_step / seconds
        log.event(
            self.step, images_seen=self.images_seen, epoch=self.epoch, loss=loss, lr=lr, grad_norm=grad_norm.item(),
            images_per_second=speed, data_wait=waited,
        )  # fmt: skip
        log.progress(self.step, loss=f"{loss:.4f}", lr=f"{lr:.2e}", img_s=f"{speed:.0f}", wait=f"{waited:.0%}")
        self._check_bad(log)

    def _evaluate(self, log: RunLog) -> None:
        loss, bad = self.held_out.loss(self.model)
        log.event(self.step, eval_loss=loss)
        if bad and self.step in (0, self.total_steps):
            named = ", ".join(f"{key} ({reason})" for key, reason in bad[:3])
            log.say(f"{len(bad)} evaluation images are left out, they can't be decoded: {named}")
        picture = self.held_out.picture(self.accelerator.unwrap_model(self.model), self.processor)
        log.picture(self.step, picture)

    def _step(self, step: int, batches: Generator[Batch], watch: Stopwatch) -> tuple[torch.Tensor, torch.Tensor, float]:
        """One optimizer step, number `step` from 1: this rank's mean loss, gradient norm (on the device), lr."""
        lr = lr_at(step - 1, self.recipe.lr, self.warmup_steps, self.total_steps, self.recipe.min_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.config.drop_path_rate:
            # These random numbers too are a function of seed, step and rank, so that a resumed run draws the same.
            torch.manual_seed(hash((self.recipe.seed, step, self.accelerator.process_index)))
        asked: dict[str, Any] = {"interpolate_pos_encoding": True} if self.recipe.image_sizes else {}
        if self.mask_ratios:
            asked["mask_ratio"] = value_at(self.mask_ratios, step - 1)
        loss = torch.zeros((), device=self.accelerator.device)
        keys: list[str] = []
        for micro_step in range(self.grad_accum_steps):
            started = time.perf_counter()
            batch = next(batches)
            watch.waiting(time.perf_counter() - started)
            keys += batch.keys
            last = micro_step == self.grad_accum_steps - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                pixel_values = self.normalize(batch.images)
                if self.recipe.masks_per_image > 1:
                    pixel_values = pixel_values.repeat_interleave(self.recipe.masks_per_image, dim=0)
                part = self.model(pixel_values, noise=batch.noise, **asked).loss / self.grad_accum_steps
                self.accelerator.backward(part)
            loss += part.detach()
        grad_norm = self._clip()
        scaler = self.accelerator.scaler
        # With fp16, gradients that overflow are the scaler's everyday business.
        finite = loss.isfinite() if scaler is not None else loss.isfinite() & grad_norm.isfinite()
        skip = self.guard.judge(step, finite, self.stop_requested, keys)
        if scaler is None:
            # Where a GradScaler would put its finding, the fused optimizer looks it up on the device.
            self._torch_optimizer.found_inf = skip  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss, grad_norm, lr

    def _clip(self) -> torch.Tensor:
        """Clip the gradient if the recipe says so; its norm before, () on the device."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        if self.recipe.clip_grad is not None:
            norm = self.accelerator.clip_grad_norm_(parameters, self.recipe.clip_grad)
        else:
            self.accelerator.unscale_gradients()
            norm = nn.utils.get_total_norm([cast(torch.Tensor, parameter.grad) for parameter in parameters])
        return norm.full_tensor() if isinstance(norm, DTensor) else cast(torch.Tensor, norm)

    def _batches(self, first_step: int) -> Generator[Batch]:
        """Micro-batches on the device, from the step after `first_step`; keeps count of the streams' positions."""
        stream = TrainingStream(
            self.data.rows, self.plan, self.spec, self.recipe.seed, self.positions, first_step, self.total_steps,
            self.accelerator.process_index, self.accelerator.num_processes, self.items_per_step, self.specs,
        )  # fmt: skip
        loader = make_loader(stream, self.recipe.num_workers, self.accelerator.device.type == "cuda")
        with closing(each_batch(loader)) as items:
            for item in items:
                self.moved.update(item.positions)
                self.newly_bad += item.bad
                masks = self.recipe.masks_per_image
                images = self.micro_batch // masks
                for start in range(0, len(item.keys), images):
                    part = slice(start, start + images)
                    noise = item.noise[masks * part.start : masks * part.stop]
                    yield Batch(
                        images=item.images[part].to(self.accelerator.device, non_blocking=True),
                        noise=noise.to(self.accelerator.device, non_blocking=True),
                        keys=item.keys[part],
                        labels=item.labels[part],
                    )

    def _reduce(self, value: torch.Tensor, how: str) -> torch.Tensor:
        return cast(torch.Tensor, self.accelerator.reduce(value, how))

    def _request_stop(self, *_: Any) -> None:
        self.stop_requested = True

    def _check_bad(self, log: RunLog) -> None:
        """Take in the samples that could not be decoded; stop if they are too many."""
        bad = gather_object(self.newly_bad)
        self.newly_bad = []
        failed = 0.0
        if self.bad is not None:
            self.bad.add(bad)
            # Not judged by the first few: one bad file among the first ten says nothing.
            seen = max(self.bad.total + self.images_seen, min(1000, len(self.data.rows)))
            failed = self.bad.total / seen
            if bad:
                log.say(f"{self.bad.total} images skipped so far: {dict(self.bad.counts)}; see {self.bad.path}")
        # Only the main process counts: the sum is its number, and all ranks stop by it.
        failed = self._reduce(torch.tensor(failed, device=self.accelerator.device), "sum").item()
        if failed > self.recipe.max_bad_fraction:
            raise DataError(
                f"{failed:.1%} of the images can't be decoded, more than max_bad_fraction "
                f"{self.recipe.max_bad_fraction:.1%}; see {self.output_dir / 'bad_samples.jsonl'}"
            )

    def _measure_quality(self, log: RunLog) -> None:
        """kNN, linear accuracy and RankMe of the encoder as it is."""
        figures = self.quality.measure(self.model)
        if self.quality.notice:
            log.say(self.quality.notice)
        if figures:
            log.event(self.step, **figures)

    # ------------------------------------------------------------------------------------------ saving

    def save_checkpoint(self, log: RunLog, must: bool) -> None:
        """Write `checkpoint-STEP`; every process takes part, the main one writes.

        Args:
            log: of the run.
            must: if there is no room on the disk, end the run; otherwise it goes on without.

        Raises:
            CheckpointError: if there is no room, or what was written is not what is read back.
        """
        model = self.accelerator.unwrap_model(self.model)
        weights, moments = full_state_dict(model), optimizer_tensors(model, self._torch_optimizer)
        for positions in gather_object([self.moved]):
            for stream, position in positions.items():
                self.positions[stream] = position
        bad = gather_object(self.newly_bad)
        self.newly_bad = []
        failure: list[str | None] = [None]
        if self.bad is not None:
            self.bad.add(bad)
            try:
                self._write_checkpoint(model, weights, moments)
            except DiskFullError as error:
                failure = [str(error)]
        # The others wait here for the main process, and learn how it went.
        broadcast_object_list(failure)
        if failure[0] and must:
            raise CheckpointError(failure[0])
        if failure[0]:
            log.say(f"WARNING: {failure[0]}; the run goes on, and tries again at its next save")

    def _write_checkpoint(
        self, model: MAEForPreTraining, weights: dict[str, torch.Tensor], moments: dict[str, torch.Tensor]
    ) -> None:
        assert self.bad is not None
        trainer = {
            "step": self.step,
            "images_seen": self.images_seen,
            "total_steps": self.total_steps,
            "guard": {"skipped_steps": self.guard.skipped_steps, "skipped_in_a_row": self.guard.skipped_in_a_row},
            "version": __version__,
            "recipe": self.recipe.to_dict(),
        }
        if self.accelerator.scaler is not None:
            trainer["scaler"] = self.accelerator.scaler.state_dict()
        data = {
            "plan": vars(self.plan),
            "seed": self.recipe.seed,
            "positions": self.positions,
            "fingerprint": self.data.fingerprint,
            "bad": self.bad.state(),
        }

        def write(folder: Path) -> None:
            self._write_model(model, weights, folder)
            save_tensors(moments, folder / "optimizer.safetensors")
            write_json(trainer, folder / "trainer.json")
            write_json(data, folder / "data.json")

        def read_back(folder: Path) -> bool:
            tensors = ((weights, "model.safetensors"), (moments, "optimizer.safetensors"))
            return read_state(folder) == (trainer, data) and all(
                same_tensors(expected, load_tensors(folder / name)) for expected, name in tensors
            )

        # The first one shows whether this machine's disk and these versions give back what they get.
        check = None if self.saved_before else read_back
        write_checkpoint(self.output_dir, self.step, write, self.recipe.keep_checkpoints, check)
        self.saved_before = True

    def _write_model(self, model: nn.Module, weights: dict[str, torch.Tensor], folder: Path) -> None:
        # A copy, because it empties the dictionary that it is given.
        model.save_pretrained(folder, state_dict=dict(weights))  # type: ignore[operator]
        self.processor.save_pretrained(folder)

    def _save_final(self) -> str:
        model = self.accelerator.unwrap_model(self.model)
        weights = full_state_dict(model)
        if self.accelerator.is_main_process:
            replace_files(self.output_dir, lambda folder: self._write_model(model, weights, folder))
        return str(self.output_dir)


def _is_plain(value: Any) -> bool:
    return isinstance(value, (int, float, str, bool))

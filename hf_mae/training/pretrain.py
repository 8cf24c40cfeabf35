"""The pretraining loop: batch -> loss -> step -> log -> save, on one process or many.

Run by `hf-mae pretrain`, or under `torchrun` / `accelerate launch` with `-m hf_mae.cli pretrain`.
"""

import json
import signal
import time
from collections.abc import Generator
from contextlib import closing, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from accelerate import DistributedType
from accelerate.utils import gather_object, set_seed
from torch import nn

from .. import __version__
from ..data.sources import DataError
from ..data.stats import RESCALE_FACTORS
from ..data.stream import Batch, EvaluationSet, TrainingStream, each_batch, make_loader
from ..modeling_mae import MAEForPreTraining
from ..visualize import reconstruction_grid
from .checkpoint import (
    full_state_dict,
    load_optimizer_tensors,
    load_tensors,
    optimizer_tensors,
    save_tensors,
    settle,
    write_checkpoint,
    write_json,
)
from .log import BadSamples, RunLog, Stopwatch
from .optimizer import adamw
from .recipe import PretrainRecipe
from .schedule import lr_at
from .setup import build_model, build_processor, find_stored, make_accelerator, make_view, open_data, plan_stream

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
        `images_per_second`; None for what there is not.

    Raises:
        RecipeError, DataError, CheckpointError: for what a user can mend; one line with the remedy.
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
        # One process after the other, so that what a data set library caches is written once.
        with self.accelerator.main_process_first():
            self.data = open_data(recipe)
        ranks = self.accelerator.num_processes
        self.total_steps, self.warmup_steps = recipe.steps(len(self.data.rows))
        self.micro_batch, self.grad_accum_steps = recipe.micro_batch(ranks)
        set_seed(recipe.seed)
        model = build_model(recipe, self.stored, self.data.num_channels)
        self.config = model.config
        self.processor = build_processor(recipe, self.stored, self.data, self.config)
        self.view = make_view(recipe, self.data, self.config)
        self.state: dict[str, Any] = self._load_json("trainer.json") or {"step": 0, "images_seen": 0}
        self.data_state = self._load_json("data.json")
        self.plan, self.positions = plan_stream(recipe, self.data, ranks, self.data_state)
        self.items_per_step = self.plan.items_per_step(ranks, recipe.num_workers, self.grad_accum_steps)
        optimizer = adamw(model, (recipe.adam_beta1, recipe.adam_beta2), recipe.weight_decay)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self._load_optimizer()
        self.stop_requested = False
        self.bad: BadSamples | None = None
        self.moved: dict[int, int] = {}
        self.newly_bad: list[tuple[str, str]] = []

    def _load_json(self, name: str) -> Any:
        return json.loads((self.stored / name).read_text()) if self.stored else None

    def _load_optimizer(self) -> None:
        if not self.stored:
            return
        model = self.accelerator.unwrap_model(self.model)
        load_optimizer_tensors(model, self._torch_optimizer, load_tensors(self.stored / "optimizer.safetensors"))
        if self.accelerator.scaler is not None and self.state.get("scaler"):
            self.accelerator.scaler.load_state_dict(self.state["scaler"])

    @property
    def _torch_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def describe(self) -> None:
        """Write run_config.yaml and print what is about to happen."""
        recipe, accelerator = self.recipe, self.accelerator
        derived = {
            "version": __version__,
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
            print(
                f"{recipe.recipe or 'pretrain'}: {derived['training_images']:,} images of {recipe.dataset}, "
                f"{self.data.num_channels} x {self.view.size[0]} x {self.view.size[1]} {self.data.dtype}, "
                f"{h} x {w} patches, {derived['parameters'] / 1e6:.1f} M parameters\n"
                f"{self.total_steps:,} steps of {recipe.total_batch_size} images = {accelerator.num_processes} "
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
                (self.output_dir / "run_config.yaml").write_text(text)
        accelerator.wait_for_everyone()
        if recipe.log_with and not recipe.dry_run:
            accelerator.init_trackers("hf_mae", config={k: v for k, v in recipe.to_dict().items() if _is_plain(v)})

    # ------------------------------------------------------------------------------------------ the loop

    def train(self) -> dict[str, Any]:
        """All steps that are left, then the final model and its picture."""
        recipe, first_step = self.recipe, self.state["step"]
        log = RunLog(self.accelerator, self.output_dir, first_step, self.total_steps)
        if self.accelerator.is_main_process:
            before = self.data_state["bad"] if self.data_state else None
            self.bad = BadSamples(self.output_dir / "bad_samples.jsonl", before)
        eval_steps = recipe.eval_steps or max(1, self.total_steps // 10)
        save_steps = recipe.save_steps or max(1, self.total_steps // 10)
        previous = {sig: signal.signal(sig, self._request_stop) for sig in (signal.SIGTERM, signal.SIGUSR1)}
        batches = self._batches(first_step)
        losses: list[torch.Tensor] = []
        logged, seconds_spent = first_step, 0.0
        try:
            if first_step == 0:
                log.event(0, eval_loss=self.evaluate())
            watch = Stopwatch()
            for step in range(first_step + 1, self.total_steps + 1):
                logs = step % recipe.log_steps == 0 or step == self.total_steps
                loss, grad_norm, lr = self._step(step, batches, watch, want_norm=logs)
                losses.append(loss)
                self.state = {"step": step, "images_seen": step * recipe.total_batch_size}
                if logs:
                    seconds, waited = watch.read()
                    seconds_spent += seconds
                    speed = (step - logged) * recipe.total_batch_size / seconds
                    mean_loss = self._reduce(torch.stack(losses).mean(), "mean").item()
                    losses, logged = [], step
                    log.event(
                        step, images_seen=self.state["images_seen"], epoch=self.epoch, loss=mean_loss, lr=lr,
                        grad_norm=grad_norm, images_per_second=speed, data_wait=waited,
                    )  # fmt: skip
                    log.progress(
                        step, loss=f"{mean_loss:.4f}", lr=f"{lr:.2e}", img_s=f"{speed:.0f}", wait=f"{waited:.0%}"
                    )
                    self._check_bad(log)
                stop = self._everyone_stops()
                with watch.stopped():  # evaluating and saving are not part of the training speed
                    if step % eval_steps == 0 or step == self.total_steps:
                        log.event(step, eval_loss=self.evaluate())
                    if step % save_steps == 0 or step == self.total_steps or stop:
                        self.save_checkpoint()
                if stop:
                    log.say(f"stopped on request after step {step}; go on with --resume auto")
                    break
        finally:
            for sig, handler in previous.items():
                signal.signal(sig, handler)
            batches.close()
            log.close()
        finished = self.state["step"] == self.total_steps
        summary = {
            "steps": self.state["step"],
            "first_eval_loss": log.evaluations[0]["eval_loss"] if log.evaluations else None,
            "last_eval_loss": log.evaluations[-1]["eval_loss"] if log.evaluations else None,
            "images_per_second": (logged - first_step) * recipe.total_batch_size / seconds_spent
            if seconds_spent
            else None,
            "bad_samples": self.bad.total if self.bad else 0,
            "model": self._save_final() if finished else None,
            "picture": self._save_picture() if finished else None,
        }
        self.accelerator.wait_for_everyone()
        self.accelerator.state.destroy_process_group()
        return summary

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self.state["images_seen"] / len(self.data.rows)

    def _step(
        self, step: int, batches: Generator[Batch], watch: Stopwatch, want_norm: bool
    ) -> tuple[torch.Tensor, float | None, float]:
        """One optimizer step, number `step` from 1: its mean loss on this rank (on the device), gradient norm, lr."""
        lr = lr_at(step - 1, self.recipe.lr, self.warmup_steps, self.total_steps, self.recipe.min_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.config.drop_path_rate:
            # These random numbers too are a function of seed, step and rank, so that a resumed run draws the same.
            torch.manual_seed(hash((self.recipe.seed, step, self.accelerator.process_index)))
        total = torch.zeros((), device=self.accelerator.device)
        for micro_step in range(self.grad_accum_steps):
            started = time.perf_counter()
            batch = next(batches)
            watch.waiting(time.perf_counter() - started)
            last = micro_step == self.grad_accum_steps - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                loss = self.model(self.pixel_values(batch), noise=batch.noise).loss / self.grad_accum_steps
                self.accelerator.backward(loss)
            total += loss.detach()
        grad_norm = None
        if self.recipe.clip_grad is not None or want_norm:
            grad_norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.clip_grad or float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total, float(grad_norm) if want_norm and grad_norm is not None else None, lr

    def _batches(self, first_step: int) -> Generator[Batch]:
        """Micro-batches on the device, from the step after `first_step`; keeps count of the streams' positions."""
        stream = TrainingStream(
            self.data.rows, self.plan, self.view, self.recipe.seed, self.positions, first_step, self.total_steps,
            self.accelerator.process_index, self.accelerator.num_processes, self.items_per_step,
        )  # fmt: skip
        loader = make_loader(stream, self.recipe.num_workers, self.accelerator.device.type == "cuda")
        for item in each_batch(loader):
            self.moved.update(item.positions)
            self.newly_bad += item.bad
            for start in range(0, len(item.keys), self.micro_batch):
                part = slice(start, start + self.micro_batch)
                yield Batch(
                    images=item.images[part].to(self.accelerator.device, non_blocking=True),
                    noise=item.noise[part].to(self.accelerator.device, non_blocking=True),
                    keys=item.keys[part],
                    labels=item.labels[part],
                )

    def pixel_values(self, batch: Batch) -> torch.Tensor:
        """Scale and normalise images on the device: (B, C, H, W) float32."""
        mean, std = self._mean_and_std
        return (batch.images.float() - mean) / std

    @cached_property
    def _mean_and_std(self) -> tuple[torch.Tensor, torch.Tensor]:
        # In the images' own units, so that scaling and normalising are one pass.
        factor = RESCALE_FACTORS[self.data.dtype]
        both = (self.processor.image_mean, self.processor.image_std)
        mean, std = (torch.tensor(v, device=self.accelerator.device).view(1, -1, 1, 1) / factor for v in both)
        return mean, std

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss over the evaluation rows, with the evaluation crop and each row's own fixed mask."""
        accelerator = self.accelerator
        dataset = self._evaluation_set(accelerator.process_index, accelerator.num_processes)
        # Every rank runs as many forwards as the others, since sharded weights are gathered in each.
        longest = -(-len(self.data.eval_rows) // accelerator.num_processes)
        batch, total = None, torch.zeros(2, device=accelerator.device, dtype=torch.float64)
        self.model.eval()
        with closing(each_batch(make_loader(dataset, min(self.recipe.num_workers, 1)))) as batches:
            for _ in range(-(-longest // self.micro_batch)):
                new = next(batches, None)
                batch = new or batch
                if batch is None:
                    raise DataError("none of the evaluation images can be decoded; check the data")
                batch.images, batch.noise = batch.images.to(accelerator.device), batch.noise.to(accelerator.device)
                loss = self.model(self.pixel_values(batch), noise=batch.noise).loss
                if new is not None:
                    total += torch.stack([loss.double() * len(batch.keys), torch.tensor(len(batch.keys)).to(loss)])
        self.model.train()
        loss_sum, count = self._reduce(total, "sum").tolist()
        return loss_sum / count

    def _evaluation_set(self, rank: int, ranks: int) -> EvaluationSet:
        return EvaluationSet(self.data.eval_rows, self.view, self.micro_batch, self.config.eval_mask_seed, rank, ranks)

    def _reduce(self, value: torch.Tensor, how: str) -> torch.Tensor:
        return cast(torch.Tensor, self.accelerator.reduce(value, how))

    def _request_stop(self, *_: Any) -> None:
        self.stop_requested = True

    def _everyone_stops(self) -> bool:
        """Whether any rank was asked to stop; all then stop at the same step."""
        if self.accelerator.num_processes == 1:
            return self.stop_requested
        flag = torch.tensor(float(self.stop_requested), device=self.accelerator.device)
        return self._reduce(flag, "sum").item() > 0

    def _check_bad(self, log: RunLog) -> None:
        """Take in the samples that could not be decoded; stop if they are too many."""
        bad = gather_object(self.newly_bad)
        self.newly_bad = []
        failed = 0.0
        if self.bad is not None:
            self.bad.add(bad)
            # Not judged by the first few: one bad file among the first ten says nothing.
            seen = max(self.bad.total + self.state["images_seen"], min(1000, len(self.data.rows)))
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

    # ------------------------------------------------------------------------------------------ saving

    def save_checkpoint(self) -> None:
        """Write `checkpoint-STEP`; every process takes part, the main one writes."""
        accelerator, model = self.accelerator, self.accelerator.unwrap_model(self.model)
        weights, moments = full_state_dict(model), optimizer_tensors(model, self._torch_optimizer)
        moved = gather_object([self.moved])
        bad = gather_object(self.newly_bad)
        self.newly_bad = []
        for positions in moved:
            for stream, position in positions.items():
                self.positions[stream] = position
        if self.bad is not None:
            self.bad.add(bad)
            trainer = {**self.state, "total_steps": self.total_steps, "version": __version__}
            if accelerator.scaler is not None:
                trainer["scaler"] = accelerator.scaler.state_dict()
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

            write_checkpoint(self.output_dir, self.state["step"], write, self.recipe.keep_checkpoints)
        accelerator.wait_for_everyone()

    def _write_model(self, model: nn.Module, weights: dict[str, torch.Tensor], folder: Path) -> None:
        model.save_pretrained(folder, state_dict=weights)  # type: ignore[operator]
        self.processor.save_pretrained(folder)

    def _save_final(self) -> str:
        model = self.accelerator.unwrap_model(self.model)
        weights = full_state_dict(model)
        if self.accelerator.is_main_process:
            self._write_model(model, weights, self.output_dir)
            for file in self.output_dir.glob("*.safetensors"):
                settle(file)
        return str(self.output_dir)

    def _save_picture(self, images: int = 12) -> str | None:
        """Reconstructions of the first evaluation images, by the model as it was saved."""
        if not self.accelerator.is_main_process:
            return None
        model = MAEForPreTraining.from_pretrained(self.output_dir).to(self.accelerator.device).eval()
        batch = next(iter(self._evaluation_set(0, 1)))
        batch.images = batch.images[:images].to(self.accelerator.device)
        grid = reconstruction_grid(
            model,
            self.pixel_values(batch),
            list(self.processor.image_mean),
            list(self.processor.image_std),
            batch.noise[:images].to(self.accelerator.device),
        )
        path = self.output_dir / "reconstructions" / f"step-{self.state['step']}.png"
        path.parent.mkdir(exist_ok=True)
        grid.save(path)
        return str(path)


def _is_plain(value: Any) -> bool:
    return isinstance(value, (int, float, str, bool))

"""Fine-tuning with a stock Trainer: a recipe becomes model, data sets, collator, optimizer and arguments.

    Trainer(**trainer_parts(recipe)).train()

is what `hf-mae finetune` runs, with our log instead of Trainer's, and a model folder at the end.
"""

import logging
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import EvalPrediction, PrinterCallback, ProgressCallback, Trainer, TrainerState

from ..data.labelled import Collator, LabelledImages, without_bad
from ..data.labels import each_row, find_labels, labels_of
from ..data.loader import one_line_errors
from ..data.mix import Mixing
from ..data.order import Rows
from ..data.sources import open_splits
from ..data.transform import evaluation_spec
from ..data.understood import announce_data
from ..errors import UserError
from ..evaluation.metrics import arrays_of, detail, make_compute_metrics
from ..evaluation.predictions import scores_of, write_predictions
from ..evaluation.results import make_result, named_data
from ..files import check_writable
from ..keys.finetune_keys import FinetuneRecipe
from ..optim.groups import layer_decay_groups
from ..run_folder import WEIGHTS_NAME, RunFolder, add_result, read_results
from .callbacks import EMACallback, EpochCallback, LogCallback
from .checkpoint import load_tensors, remove_folder, write_model
from .class_weights import WeightedLoss, balanced_weights
from .describe import RunSetup, announce, derive_facts, warn_if_batch_is_larger
from .devices import prepare_process, tune_for_device
from .finetune_setup import (
    build_classifier,
    build_processor,
    build_rand_augment,
    check_images,
    check_run,
    find_trainer_checkpoint,
    training_arguments,
)
from .resume import check_folder, check_step

logger = logging.getLogger(__name__)

PROTOCOL = "fine-tuning"


def finetune(recipe: FinetuneRecipe) -> dict[str, Any] | None:
    """Fine-tune a pretrained model on a labelled data set.

    Args:
        recipe: all settings of the run.

    Returns:
        The run's entry in results.json; None after a dry run, and on processes other than the main one.

    Raises:
        UserError: for anything the user can fix; one line with the remedy.
    """
    output_dir = Path(str(recipe.output_dir))
    check_folder(recipe, output_dir)
    folder = RunFolder(output_dir)
    read_results(folder.results_file)  # a broken file fails now, not after hours of training
    check_writable(recipe.predictions, "--predictions")
    finished = [entry for entry in folder.results() if entry["protocol"]["name"] == PROTOCOL]
    if recipe.resume == "auto" and finished:
        check_run(recipe, output_dir)
        if recipe.predictions:
            remedy = f"hf-mae evaluate classification --model {output_dir} --predictions {recipe.predictions} ..."
            raise UserError(f"the run in {output_dir} is finished, and only a run writes predictions; use {remedy}")
        return finished[0]
    run = FinetuneRun(recipe)
    run.describe()
    return None if recipe.dry_run else run.train()


def trainer_parts(recipe: FinetuneRecipe) -> dict[str, Any]:
    """The arguments of a `transformers.Trainer` that runs a recipe: `Trainer(**trainer_parts(recipe)).train()`.

    Args:
        recipe: all settings of the run, e.g. `FinetuneRecipe(model="outputs/quickstart", dataset="path/to/images")`.

    Returns:
        Keyword arguments of `Trainer`: `model`, `args`, `data_collator`, `train_dataset`, `eval_dataset`,
        `processing_class`, `compute_loss_func`, `compute_metrics`, `optimizer_cls_and_kwargs` and `callbacks`. With
        `resume`, pass `args.resume_from_checkpoint` to `Trainer.train`. Add your own callbacks to the list instead of
        replacing it.

    Raises:
        UserError: for anything the user can fix; one line with the remedy.
    """
    return FinetuneRun(recipe).trainer_parts()


class FinetuneRun:
    """One run: its parts, and its training by a Trainer."""

    def __init__(self, recipe: FinetuneRecipe):
        self.recipe, self.output_dir = recipe, Path(str(recipe.output_dir))
        self.folder = RunFolder(self.output_dir)
        self.stored = find_trainer_checkpoint(recipe, self.output_dir)
        self.precision = prepare_process(recipe)
        self.args = training_arguments(recipe, self.stored, self.precision)
        # The main process goes first, so that a data set library writes its cache only once.
        with self.args.main_process_first(desc="opening the data"):
            splits = open_splits(recipe, streaming=False, labelled=True, problem=recipe.problem_type)
        self.rows, self.eval_rows, self.evaluated_on = splits
        held_out = self.eval_rows if self.eval_rows.source is self.rows.source else None
        self.labels = find_labels(self.rows, recipe.problem_type, held_out)
        torch.manual_seed(recipe.seed)  # for a new head
        self.model = build_classifier(recipe, self.labels)
        tune_for_device(self.model, self.args.device, self.precision)
        self.processor = build_processor(recipe, self.model.config)
        scale = (recipe.crop_scale[0], recipe.crop_scale[-1])
        self.spec = replace(evaluation_spec(self.model.config, self.processor), crop_scale=scale, flip=recipe.flip)
        self.probe = check_images(self.rows, self.spec)
        self.bad = without_bad(self.eval_rows, self.spec, recipe.num_workers)
        self.train_images = LabelledImages(
            self.rows, self._targets(self.rows), self.spec, self.processor, recipe.seed,
            build_rand_augment(recipe, self.spec, self.processor), recipe.random_erasing, self.folder.bad_file,
            multiple=recipe.total_batch_size,
        )  # fmt: skip
        self.eval_images = LabelledImages(self.eval_rows, self._targets(self.eval_rows), self.spec, self.processor)
        self._warn_of_untrained_classes()
        self.steps = recipe.steps(len(self.train_images))
        self.images_per_step = min(recipe.total_batch_size, len(self.train_images))
        self.args.max_steps, self.args.warmup_steps = self.steps
        names = ("eval_steps", "save_steps")
        self.args.eval_steps, self.args.save_steps = (recipe.interval(name, self.steps[0]) for name in names)

    def _warn_of_untrained_classes(self) -> None:
        targets, names = self.train_images.targets, self.labels.names
        if self.recipe.problem_type == "regression" or self.args.process_index:
            return
        counts = torch.bincount(targets, minlength=len(names)) if targets.ndim == 1 else targets.sum(dim=0)
        if missing := [name for name, count in zip(names, counts.tolist(), strict=True) if not count]:
            logger.warning(
                "%d of %d classes have no training images: %s", len(missing), len(names), ", ".join(missing[:5])
            )

    def _targets(self, rows: Rows) -> torch.Tensor:
        return self.labels.targets(labels_of(rows), rows.source)

    def _loss(self) -> WeightedLoss | None:
        """The loss with class weights; None for the model's own."""
        if self.recipe.class_weights is None:
            return None
        weights = balanced_weights(self.train_images.targets, self.model.num_labels)
        return WeightedLoss(weights, several=self.recipe.problem_type == "multi_label_classification")

    def trainer_parts(self) -> dict[str, Any]:
        """Arguments of a Trainer."""
        recipe = self.recipe
        groups = layer_decay_groups(self.model, recipe.lr, recipe.layer_decay, recipe.weight_decay)
        adamw = {"params": groups, "lr": recipe.lr, "betas": (recipe.adam_beta1, recipe.adam_beta2), "fused": True}
        mixing = Mixing(self.model.num_labels, recipe.mixup, recipe.cutmix, recipe.label_smoothing)
        average = [EMACallback(recipe.ema_decay)] if recipe.ema_decay else []
        return {
            "model": self.model,
            "args": self.args,
            "data_collator": Collator(mixing),
            "train_dataset": self.train_images,
            "eval_dataset": self.eval_images,
            "processing_class": self.processor,
            "compute_loss_func": self._loss(),
            "compute_metrics": self._compute_metrics,
            "optimizer_cls_and_kwargs": (torch.optim.AdamW, adamw),
            "callbacks": [EpochCallback(self.train_images), *average],
        }

    def _compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        self.prediction = prediction  # `detail` needs the last one
        return make_compute_metrics(self.recipe.problem_type)(prediction)

    def describe(self) -> None:
        """Print what the run will do, and write run_config.yaml."""
        recipe, args, names = self.recipe, self.args, list(self.labels.names)
        total_steps, warmup_steps = self.steps
        setup = RunSetup(
            device=args.device,
            ranks=args.world_size,
            precision=self.precision,
            total_steps=total_steps,
            warmup_steps=warmup_steps,
            training_images=len(self.rows),
            evaluation_images=len(self.eval_images),
            evaluated_on=self.evaluated_on,
            model=self.model,
            classes=names,
        )
        facts = derive_facts(recipe, setup)
        if args.process_index:
            return
        noun = "numbers per image" if recipe.problem_type == "regression" else "classes"
        classes = f"{len(names)} {noun}"
        announce_data(self.probe, self.spec, self.rows, self.eval_rows, self.evaluated_on, classes)
        announce(recipe, facts, self.model.config.grid_size, args.device, self.stored)
        effect = f"a step uses each image once, and the run is {total_steps} epochs"
        warn_if_batch_is_larger(recipe, len(self.rows), effect)
        if self.bad:
            print(f"{len(self.bad)} images can't be decoded and are not scored; the first is {self.bad[0][0]}")

    def train(self) -> dict[str, Any] | None:
        """Take the remaining steps and save the final model.

        Returns:
            The entry of results.json; None on every process but the main one.
        """
        trainer = Trainer(**self.trainer_parts())
        for printing in (ProgressCallback, PrinterCallback):
            trainer.pop_callback(printing)
        log = LogCallback(trainer.accelerator, self.images_per_step)
        trainer.add_callback(log)
        with one_line_errors(), closing(log):
            if not self._restore_trained(trainer):
                trainer.train(resume_from_checkpoint=self.args.resume_from_checkpoint)
        result = self._save_final(log) if trainer.is_world_process_zero() else None
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.state.destroy_process_group()
        return result

    def _restore_trained(self, trainer: Trainer) -> bool:
        """Load and score a checkpoint of the last step, from which `Trainer.train` would take one step too many.

        Returns:
            Whether the run continues from such a checkpoint.
        """
        if self.stored is None:
            return False
        state = TrainerState.load_from_json(str(self.stored / "trainer_state.json"))
        check_step(self.stored, state.global_step, self.args.max_steps)
        if state.global_step < self.args.max_steps:
            return False
        self.model.load_state_dict(load_tensors(self.stored / WEIGHTS_NAME))
        trainer.state, callbacks = state, trainer.callback_handler
        callbacks.on_train_begin(self.args, state, trainer.control)
        callbacks.on_train_end(self.args, state, trainer.control)  # averaged weights become the model's
        trainer.evaluate()
        return True

    def _save_final(self, log: LogCallback) -> dict[str, Any]:
        """Save model and scores; returns the entry of results.json. Deletes Trainer's checkpoints: they hold pickles.

        Raises:
            CheckpointError: if the model can't be written; the checkpoints are kept then.
            UserError: if results.json can't be written; the checkpoints are kept then.
        """
        recipe, output_dir = self.recipe, self.output_dir

        def write(folder: Path) -> None:
            self.model.save_pretrained(folder)
            self.processor.save_pretrained(folder)

        write_model(output_dir, write)
        protocol = {
            "name": PROTOCOL,
            "start": str(recipe.model),
            "pooling": recipe.pooling,
            "image_size": list(self.spec.size),
            "eval_resize": self.spec.eval_resize,
            "trainable_blocks": recipe.trainable_blocks,
            "class_weights": recipe.class_weights,
            "epochs": self.images_per_step * self.steps[0] / len(self.rows),
            "seed": recipe.seed,
        }
        data = {
            **named_data(recipe, self.rows.source.split, self.evaluated_on),
            "train_images": len(self.rows),
            "eval_images": len(self.eval_images),
            "bad_samples": self._bad_samples(),
            "classes": len(self.labels.names),
        }
        logits, targets = arrays_of(self.prediction)
        if recipe.predictions:
            keys = [row.key for row in each_row(self.eval_rows)]
            scores = scores_of(self.labels, torch.from_numpy(logits))
            write_predictions(recipe.predictions, "--predictions", self.labels, keys, scores, targets)
        details = detail(self.labels, logits, targets)
        result = make_result(protocol, data, str(output_dir), [log.figures], details)
        add_result(self.folder.results_file, result, "--output_dir")
        for checkpoint in self.folder.checkpoints():
            remove_folder(checkpoint)
        return result

    def _bad_samples(self) -> int:
        """The number of images that could not be decoded; bad_samples.jsonl names each of them once."""
        named = [(sample["key"], sample["reason"]) for sample in self.folder.bad_samples()]
        named = list(dict.fromkeys([*named, *self.bad]))
        if named:
            self.folder.write_bad_samples([{"key": key, "reason": reason} for key, reason in named])
        return len(named)

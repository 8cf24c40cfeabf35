"""The keys of `hf-mae finetune`."""

import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ..errors import UserError
from . import ImageSize, data_key, evaluation_key, inherit, model_key, optimization_key
from .data_keys import PREDICTION_FILES, predictions_key
from .run_keys import RunRecipe

logger = logging.getLogger(__name__)

Problem = Literal["single_label_classification", "multi_label_classification", "regression"]
# Keys that blend the classes of an image.
CLASS_MIXING = ("mixup", "cutmix", "label_smoothing")


@dataclass
class FinetuneRecipe(RunRecipe):
    """All keys of `hf-mae finetune`; the defaults are Table 9's, except for what suits ImageNet alone.

    The recipes of ViT-Base, -Large and -Huge have the values of the original code, which differ from the paper's.
    """

    command: ClassVar[str] = "finetune"

    max_eval_samples: int | None = inherit(RunRecipe, "max_eval_samples", None)
    crop_scale: list[float] = inherit(RunRecipe, "crop_scale", [0.08, 1.0])
    eval_crop_pct: float | None = evaluation_key(
        None,
        "fraction of the resized side that the evaluation crop keeps",
        "0.875, as 224 of 256; 1 above 224 pixels",
        free=False,
    )
    rand_augment: str = data_key(
        "none", "RandAugment in timm's notation, such as rand-m9-mstd0.5-inc1; 8-bit images only"
    )
    random_erasing: float = data_key(0.0, "probability of erasing a random rectangle of an image")
    mixup: float = data_key(0.0, "parameter of mixup's Beta distribution; 0 turns it off")
    cutmix: float = data_key(0.0, "parameter of cutmix's Beta distribution; 0 turns it off")
    label_smoothing: float = optimization_key(0.0, "fraction of each label that is spread evenly over all classes")
    class_weights: Literal["balanced"] | None = optimization_key(
        None, "weights of the classes in the training loss; balanced gives rare classes larger ones", "none"
    )
    model: str = model_key(help_text="folder or Hub id of a pretrained or fine-tuned model", metavar="DIR|ID")
    problem_type: Problem = model_key(
        "single_label_classification", "what labels are: one class per image, any number of classes, or numbers"
    )
    image_size: ImageSize | None = model_key(
        None, "size of the images in pixels, such as 224 or 208x320", "the model's"
    )
    pooling: Literal["mean", "cls"] = model_key("mean", "input of the head: mean of the patch tokens, or class token")
    drop_path_rate: float = model_key(
        0.1, "probability of skipping the last encoder block; rises linearly from 0 at the first"
    )
    trainable_positions: bool = model_key(True, "train the position table too")
    trainable_blocks: str = model_key(
        "all",
        "number of last blocks to train besides the head, such as 0, 0.5 (the last MLP) or 1",
        metavar="all|NUMBER",
    )
    reset_head: bool = model_key(False, "start with a new head, even if the model has one for these classes")
    seed: int = inherit(RunRecipe, "seed", 0, "random seed of a new head, order, crops, flips and mixing")
    total_batch_size: int = inherit(RunRecipe, "total_batch_size", 256)
    epochs: float | None = inherit(RunRecipe, "epochs", 50)
    warmup_epochs: float = inherit(RunRecipe, "warmup_epochs", 5)
    blr: float = inherit(RunRecipe, "blr", 1e-3)
    min_lr: float = inherit(RunRecipe, "min_lr", 1e-6)
    layer_decay: float = optimization_key(0.75, "learning rate of a layer relative to that of the layer above it")
    adam_beta2: float = inherit(RunRecipe, "adam_beta2", 0.999)
    predictions: str | None = predictions_key(free=True, card=False)
    ema_decay: float | None = optimization_key(
        None, "decay of a running average of the weights, such as 0.9999, which is evaluated and saved", "no average"
    )

    @classmethod
    def adapt(cls, values: dict[str, Any], typed: Collection[str]) -> None:
        """Turn off a recipe's mixing of classes where an image doesn't have one class."""
        problem = values.get("problem_type", cls.problem_type)
        unfit = [name for name in CLASS_MIXING if values.get(name) and name not in typed]
        if unfit and problem != "single_label_classification":
            values |= dict.fromkeys(unfit, 0.0)
            logger.warning(
                "recipe %s: %s set to 0, because they need one class per image and problem_type is %s",
                values["recipe"], ", ".join(unfit), problem,
            )  # fmt: skip

    def check(self) -> None:
        super().check()
        self.check_range("eval_crop_pct", low=0.1, high=1)
        if self.blr <= 0:
            raise UserError(f"blr {self.blr} is not positive; the paper's recipes have 5e-4 and 1e-3")
        self.check_ending("predictions", *PREDICTION_FILES)
        self.check_range("mixup", "cutmix")
        self.check_range("random_erasing", "label_smoothing", "drop_path_rate", "layer_decay", "ema_decay", high=1)
        mixed = [name for name in CLASS_MIXING if getattr(self, name)]
        if mixed and self.problem_type != "single_label_classification":
            raise UserError(
                f"{mixed[0]} needs one class per image, but problem_type is {self.problem_type}; pass --{mixed[0]} 0"
            )
        if self.class_weights and self.problem_type == "regression":
            problem = f"class_weights {self.class_weights} needs classes, but problem_type is regression"
            raise UserError(f"{problem}; pass --class_weights none")

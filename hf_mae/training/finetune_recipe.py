"""The keys of `hf-mae finetune`."""

from dataclasses import dataclass, field
from typing import Literal

from ..errors import UserError
from .recipe import RunRecipe, _key, check_crop_pct, check_range, config_value, parse_dataclass


@dataclass
class FinetuneRecipe(RunRecipe):
    """All keys of `hf-mae finetune`; the defaults are Table 9's, but for what suits ImageNet alone.

    The recipes of ViT-Base, -Large and -Huge have the values of the original's code, which differ from the paper's.
    """

    # data
    max_eval_samples: int | None = _key(None, "score so many images at most")
    crop_scale: list[float] = field(
        default_factory=lambda: [0.08, 1.0], metadata={"help": "smallest and largest area of a random crop"}
    )
    eval_crop_pct: float | None = _key(
        None,
        "share of the resized side that the scoring crop keeps; 0.875 (224 of 256), above 224 pixels 1, by default",
    )
    rand_augment: str = _key("none", "none, or RandAugment in timm's words: rand-m9-mstd0.5-inc1; 8-bit images only")
    random_erasing: float = _key(0.0, "probability of random erasing")
    mixup: float = _key(0.0, "parameter of mixup's Beta distribution; 0: none")
    cutmix: float = _key(0.0, "parameter of cutmix's Beta distribution; 0: none")
    label_smoothing: float = _key(0.0, "share of each label that is spread over all classes")
    # model
    model: str | None = _key(None, "folder or Hub id of a pretrained or fine-tuned model")
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] = _key(
        "single_label_classification", "one class an image, any number of them, or numbers"
    )
    image_size: str | None = _key(None, "pixels, as 224, 208x320 or 208,320; the model's own when omitted")
    pooling: Literal["mean", "cls"] = _key("mean", "what the head sees: mean of the patch tokens, or class token")
    drop_path_rate: float = _key(0.1, "stochastic depth of the last block")
    trainable_positions: bool = _key(True, "train the position table too")
    trainable_blocks: str = _key("all", "train only the head and so many last blocks: 0, 0.5 (its MLP), 1, ...")
    reset_head: bool = _key(False, "start with a new head, whatever classes the model knows")
    # optimization
    total_batch_size: int = _key(256, "images of an optimizer step, over all processes")
    epochs: float | None = _key(50, "passes over the data; total_steps wins")
    warmup_epochs: float = _key(5, "length of the linear warm-up, at most a tenth of the run; warmup_steps wins")
    blr: float = _key(1e-3, "learning rate per 256 images: lr = blr * total_batch_size / 256")
    min_lr: float = _key(1e-6, "learning rate at the end of the cosine")
    layer_decay: float = _key(0.75, "learning rate of a layer, relative to the one above it")
    adam_beta2: float = _key(0.999, "AdamW")
    ema_decay: float | None = _key(None, "score and save an average of the weights, e.g. 0.9999")

    @property
    def size(self) -> int | list[int] | None:
        """`image_size` as MAEConfig takes it."""
        return None if self.image_size is None else config_value(self.image_size)

    def check(self) -> None:
        super().check()
        if self.eval_crop_pct is not None:
            check_crop_pct(self.eval_crop_pct)
        if self.model is None:
            raise UserError("no model is given; pass --model with the folder or Hub id of a pretrained one")
        if self.blr <= 0:
            raise UserError(f"blr {self.blr} is not positive; the paper's recipes have 5e-4 and 1e-3")
        for key in ("mixup", "cutmix"):
            check_range(self, key, 0)
        for key in ("random_erasing", "label_smoothing", "drop_path_rate", "layer_decay", "ema_decay"):
            check_range(self, key, 0, 1)
        mixed = [key for key in ("mixup", "cutmix", "label_smoothing") if getattr(self, key)]
        if mixed and self.problem_type != "single_label_classification":
            raise UserError(f"{mixed[0]} is for one class an image, not for {self.problem_type}; pass --{mixed[0]} 0")


def load_finetune_recipe(arguments: list[str]) -> FinetuneRecipe:
    """Merge defaults, recipe file and command line.

    Args:
        arguments: of the command line, e.g. `["--recipe", "finetune_vit_base_in1k", "--model", "outputs/base"]`.

    Raises:
        UserError: for an unknown recipe or key (it names the nearest) or an impossible value.
    """
    return parse_dataclass(FinetuneRecipe, arguments, "hf-mae finetune", "finetune_").finish("finetune")

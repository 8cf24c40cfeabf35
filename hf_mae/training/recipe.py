"""The recipe of a run: dataclass defaults < recipe file < command line; and what is derived from it."""

import difflib
import math
from argparse import ArgumentError, ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NoReturn, Self, TypeVar, cast

import yaml
from transformers import HfArgumentParser

from ..configuration_mae import MAEConfig
from ..errors import UserError
from ..keys.data_keys import SplitKeys
from ..optim.batch import micro_batch
from ..optim.schedule import read_points

T = TypeVar("T")


def _key(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class RunRecipe(SplitKeys):
    """The keys that every training run has, and what is derived from them; the defaults are pretraining's."""

    recipe: str | None = _key(None, "name of a recipe of the package, or path of a YAML file")
    # data
    dataset: str = _key("digits", "Hub id, folder or URL of images, parquet or tar shards, or digits")
    dataset_config: str | None = _key(None, "configuration name of a Hub data set")
    dataset_revision: str | None = _key(None, "branch, tag or commit of a Hub data set")
    split: str = _key("train", "split to train on")
    eval_dataset: str | None = _key(None, "data set to evaluate on; the training one when omitted")
    eval_split: str | None = _key(None, "split to evaluate on; found by name, or a held-out part, when omitted")
    image_column: str | None = _key(None, "column of the images; found by type when omitted")
    label_column: str | None = _key(None, "column of the labels; found by type or name when omitted")
    max_samples: int | None = _key(None, "train on so many images at most")
    max_eval_samples: int | None = _key(2048, "evaluate on so many images at most")
    crop_scale: list[float] = field(
        default_factory=lambda: [0.2, 1.0], metadata={"help": "smallest and largest area of a random crop"}
    )
    flip: bool = _key(True, "mirror half of the training images")
    # model
    model: str | None = _key(None, "folder or Hub id to continue from; from scratch when omitted")
    # optimization
    total_batch_size: int = _key(4096, "images of an optimizer step, over all processes")
    per_device_batch_size: int | None = _key(None, "images at once on a device; at most 64 when omitted")
    epochs: float | None = _key(800, "passes over the data; total_steps wins")
    total_steps: int | None = _key(None, "optimizer steps")
    warmup_epochs: float = _key(40, "length of the linear warm-up, at most a tenth of the run; warmup_steps wins")
    warmup_steps: int | None = _key(None, "length of the linear warm-up in steps")
    blr: float = _key(1.5e-4, "learning rate per 256 images: lr = blr * total_batch_size / 256")
    min_lr: float = _key(0.0, "learning rate at the end of the cosine")
    weight_decay: float = _key(0.05, "of all but one-dimensional parameters")
    adam_beta1: float = _key(0.9, "AdamW")
    adam_beta2: float = _key(0.95, "AdamW")
    clip_grad: float | None = _key(None, "largest norm of the gradient; not clipped when omitted")
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = _key("auto", "auto: bf16 on a GPU that has it, else no")
    gradient_checkpointing: bool = _key(False, "trade computation for memory")
    compile: bool = _key(False, "torch.compile the model")
    attn_implementation: str = _key("sdpa", "eager, sdpa, flash_attention_2, ...")
    deterministic: bool = _key(False, "the same bits at each repetition on a GPU too, at some cost in speed")
    # run
    output_dir: str | None = _key(None, "folder of the run; outputs/RECIPE when omitted")
    resume: str = _key("none", "auto: go on from the newest complete checkpoint, if any; PATH: from this one; none")
    seed: int = _key(0, "of initial weights, order, crops, flips and masks")
    num_workers: int = _key(2, "loader processes for each training process")
    log_steps: int = _key(20, "steps between two lines of the log")
    eval_steps: int | None = _key(None, "steps between two evaluations; a tenth of the run when omitted")
    save_steps: int | None = _key(None, "steps between two checkpoints; a tenth of the run when omitted")
    keep_checkpoints: int = _key(2, "newest checkpoints that are kept, 2 or more")
    log_with: str | None = _key(None, "trackers: tensorboard, wandb, trackio or all")
    dry_run: bool = _key(False, "show the run and stop before the first step")

    @property
    def lr(self) -> float:
        """The highest learning rate, by the linear scaling rule."""
        return self.blr * self.total_batch_size / 256

    @property
    def images_per_step(self) -> int:
        """Images that an optimizer step decodes, over all processes."""
        return self.total_batch_size

    def steps(self, num_samples: int) -> tuple[int, int]:
        """Optimizer steps of the run and of its warm-up.

        Args:
            num_samples: training images of an epoch.

        Raises:
            UserError: if neither steps nor epochs are given.
        """
        per_epoch = num_samples / self.images_per_step
        if self.total_steps is None and self.epochs is None:
            raise UserError("neither total_steps nor epochs is given; pass e.g. --epochs 800")
        total = self.total_steps or max(1, round((self.epochs or 0) * per_epoch))
        if self.warmup_steps is not None:
            return total, self.warmup_steps
        return total, min(round(self.warmup_epochs * per_epoch), total // 10)

    def micro_batch(self, ranks: int) -> tuple[int, int]:
        """Images at once on a device, and how many such micro-batches make a step of one process.

        Args:
            ranks: processes.

        Raises:
            UserError: if they don't make up the total; it names the sizes that do.
        """
        return micro_batch(self.total_batch_size, self.per_device_batch_size, ranks)

    def to_dict(self) -> dict[str, Any]:
        """All keys, flat, as a recipe file has them."""
        return asdict(self)

    def finish(self, command: str) -> Self:
        """Choose the folder of the run, if none is given, and check all values.

        Args:
            command: what the folder is called after where there is no recipe.

        Raises:
            UserError: as `check`.
        """
        if self.output_dir is None:
            self.output_dir = f"outputs/{Path(self.recipe).stem if self.recipe else command}"
        self.check()
        return self

    def check(self) -> None:
        """Raise a UserError for a value that no run can have."""
        for key in (
            "total_batch_size", "per_device_batch_size", "log_steps", "keep_checkpoints", "total_steps", "save_steps",
            "eval_steps", "max_samples", "max_eval_samples",
        ):  # fmt: skip
            value = getattr(self, key)
            if value is not None and value < (2 if key == "keep_checkpoints" else 1):
                raise UserError(f"{key} {value} is too small; give {2 if key == 'keep_checkpoints' else 1} or more")
        if self.epochs is not None and self.epochs <= 0:
            raise UserError(f"epochs {self.epochs} is not positive; give e.g. 800, or total_steps")
        if self.seed < 0:
            raise UserError(f"seed {self.seed} is negative; give 0 or more")
        if self.num_workers < 0:
            raise UserError(f"num_workers {self.num_workers} is negative; 0 loads in the training process")
        for key in ("blr", "min_lr", "weight_decay", "clip_grad", "warmup_epochs", "warmup_steps"):
            check_range(self, key, 0)
        for key, high in (("adam_beta1", 0.9999), ("adam_beta2", 0.999999)):
            check_range(self, key, 0, high)
        if len(self.crop_scale) not in (1, 2) or not 0 < self.crop_scale[0] <= self.crop_scale[-1] <= 1:
            raise UserError(f"crop_scale {self.crop_scale} is not 0 < smallest <= largest <= 1; the paper has 0.2 1.0")


@dataclass
class PretrainRecipe(RunRecipe):
    """All keys of `hf-mae pretrain` but those of `MAEConfig`, which stand in `model_config`."""

    masks_per_image: int = _key(
        1, "masks with which each decoded image is seen in a step; total_batch_size counts them all"
    )
    image_size_schedule: list[str] | None = _key(
        None, "FRACTION:SIZE ..., e.g. 0:128 0.5:160 0.8:224: train on images of this size from that part of the run on"
    )
    mask_ratio_schedule: list[str] | None = _key(
        None, "FRACTION:RATIO ..., e.g. 0:0.6 0.5:0.75: train with this mask_ratio from that part of the run on"
    )
    streaming: bool | None = _key(None, "read in place, block by block; the default for what is not local")
    allow_data_change: bool = _key(False, "go on although the data is not what the checkpoint was trained on")
    max_bad_fraction: float = _key(0.01, "stop when more of the images than this can't be decoded")
    eval_crop_pct: float = _key(0.875, "share of the resized side that the evaluation crop keeps (224 of 256)")
    image_mean: list[float] | None = _key(None, "per channel; ImageNet's for 8-bit colour, else from the data")
    image_std: list[float] | None = _key(None, "per channel; ImageNet's for 8-bit colour, else from the data")
    quality_steps: int | None = _key(
        None, "steps between two looks at kNN, linear accuracy and RankMe; a fifth of the run when omitted, 0: none"
    )
    quality_samples: int = _key(2000, "training images for these at most; half as many are classified")
    push_to_hub: str | None = _key(None, "USER/NAME: push each checkpoint there while the run goes on, then the model")
    hub_private_repo: bool = _key(False, "the repository must be private")
    model_size: Literal["tiny", "small", "base", "large", "huge"] = _key("base", "row of the table of sizes")
    model_config: dict[str, Any] = field(default_factory=dict, metadata={"help": "keys of MAEConfig"})

    @property
    def images_per_step(self) -> int:
        return self.total_batch_size // self.masks_per_image

    @property
    def image_sizes(self) -> list[tuple[float, Any]]:
        """(part of the run, image size) as `image_size_schedule` says; empty without one."""
        return _points("image_size_schedule", self.image_size_schedule, size_value)

    @property
    def mask_ratios(self) -> list[tuple[float, float]]:
        """(part of the run, mask ratio) as `mask_ratio_schedule` says; empty without one."""
        return _points("mask_ratio_schedule", self.mask_ratio_schedule, float)

    def micro_batch(self, ranks: int) -> tuple[int, int]:
        return micro_batch(self.total_batch_size, self.per_device_batch_size, ranks, masks=self.masks_per_image)

    def to_dict(self) -> dict[str, Any]:
        flat = super().to_dict()
        model_config = flat.pop("model_config")
        return {**flat, **model_config}

    def check(self) -> None:
        super().check()
        check_crop_pct(self.eval_crop_pct)
        _ = self.image_sizes, self.mask_ratios  # raise if they can't be read
        check_range(self, "masks_per_image", 1)
        if self.total_batch_size % self.masks_per_image:
            raise UserError(
                f"total_batch_size {self.total_batch_size} is not a multiple of masks_per_image "
                f"{self.masks_per_image}; it counts each image as often as it is masked"
            )
        check_range(self, "max_bad_fraction", 0, 1)
        check_range(self, "quality_steps", 0)
        check_range(self, "quality_samples", 2)


def _points(key: str, words: list[str] | None, read: Callable[[str], T]) -> list[tuple[float, T]]:
    try:
        return read_points(words, read) if words is not None else []
    except ValueError as error:
        raise UserError(f"{key} {error}") from error


def check_range(recipe: RunRecipe, key: str, low: float, high: float | None = None) -> None:
    """Raise a UserError for a number that is not finite or not in [low, high]; None is in order."""
    value = getattr(recipe, key)
    if value is not None and not (math.isfinite(value) and low <= value <= (value if high is None else high)):
        limits = f"{low} or more" if high is None else f"in [{low}, {high}]"
        raise UserError(f"{key} {value} is out of range; give a number {limits}")


def check_crop_pct(eval_crop_pct: float) -> None:
    """Raise a UserError for a share that is none."""
    if not 0 < eval_crop_pct <= 1:
        raise UserError(f"eval_crop_pct {eval_crop_pct} lies outside (0, 1]; 0.875 is the usual one")


# Keys of MAEConfig that concern other uses of a model than pretraining are keys all the same.
CONFIG_KEYS = [name for name in MAEConfig.__annotations__ if not name.startswith("_")]
RECIPE_KEYS = [key.name for key in fields(PretrainRecipe) if key.name != "model_config"]


class _Parser(HfArgumentParser):
    """Raises what argparse would print with a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def pretrain_parser() -> ArgumentParser:
    """The command line of `hf-mae pretrain`: the keys of PretrainRecipe and of MAEConfig."""
    parser = _Parser(cast(Any, PretrainRecipe), prog="hf-mae pretrain", allow_abbrev=False)
    # The dictionary of the model's keys is no flag; its keys are.
    action: Any = next(action for action in parser._actions if action.dest == "model_config")
    action.container._remove_action(action)
    for option in action.option_strings:
        del parser._option_string_actions[option]
    group = parser.add_argument_group("model", "keys of MAEConfig; sizes as 224, 208x320 or 208,320")
    for key in CONFIG_KEYS:
        group.add_argument(f"--{key}", type=config_value, default=None, metavar="VALUE")
    return parser


def load_pretrain_recipe(arguments: list[str]) -> PretrainRecipe:
    """Merge defaults, recipe file and command line.

    Args:
        arguments: of the command line, e.g. `["--recipe", "quickstart", "--seed", "1"]`.

    Raises:
        UserError: for an unknown recipe or key (it names the nearest) or an impossible value.
    """
    parser = pretrain_parser()
    _merge_recipe(parser, arguments, RECIPE_KEYS, CONFIG_KEYS)
    namespace, rest = parser.parse_known_args(arguments)
    if rest:
        keys = [f"--{key}" for key in RECIPE_KEYS + CONFIG_KEYS]
        raise UserError(f"unknown argument '{rest[0]}'{_nearest(rest[0].split('=')[0], keys)}")
    return _recipe_from(namespace)


def _merge_recipe(
    parser: ArgumentParser, arguments: list[str], keys: list[str], untyped: Sequence[str] = (), kind: str = ""
) -> None:
    """Make the values of the recipe that the command line names, if any, the parser's defaults.

    Args:
        parser: of the command line.
        arguments: of the command line.
        keys: of the recipe, which the parser knows.
        untyped: more keys, whose values are taken as they are.
        kind: what the names of the package's recipes for this command start with.
    """
    first = ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe")
    name = first.parse_known_args(arguments)[0].recipe
    values = read_recipe(name, kind) if name else {}
    known = [*keys, *untyped]
    for key, value in values.items():
        if key not in known:
            raise UserError(f"unknown key '{key}' in recipe {name}{_nearest(str(key), known)}")
        if key in keys and value is not None:
            values[key] = _typed(parser, key, value, name)
    parser.set_defaults(**values)
    for action in parser._actions:
        action.required = action.required and action.dest not in values


def _typed(parser: ArgumentParser, key: str, value: Any, name: str | None) -> Any:
    """A value of a recipe file as the command line takes it: of the key's type, and one of its choices."""
    action = next(action for action in parser._actions if action.dest == key)
    # YAML reads a bare `no` as false, which is a word for mixed_precision.
    if isinstance(value, dict) and key.endswith("_schedule"):
        value = [f"{at}:{what}" for at, what in value.items()]
    words = ["no" if word is False else str(word) for word in (value if isinstance(value, list) else [value])]
    try:
        if isinstance(value, dict) or (len(words) != 1 and action.nargs != "+"):
            raise ArgumentError(action, f"expected one value, not {value}")
        return parser._get_values(action, words)
    except ArgumentError as error:
        raise UserError(f"recipe {name}: {error}") from error


def _recipe_from(namespace: Namespace) -> PretrainRecipe:
    values = vars(namespace)
    config = {key: values[key] for key in CONFIG_KEYS if values[key] is not None}
    return PretrainRecipe(**{key: values[key] for key in RECIPE_KEYS}, model_config=config).finish("pretrain")


def parse_dataclass(kind: type[T], arguments: list[str], prog: str, recipes: str | None = None) -> T:
    """Read the keys of a dataclass from a command line, and from the recipe that it names.

    Args:
        kind: the dataclass; its fields are the keys.
        arguments: e.g. `["--model", "outputs/quickstart"]`.
        prog: what the user typed before them.
        recipes: what the names of the package's recipes for this command start with; None: it takes no recipe.

    Raises:
        UserError: for an unknown key (it names the nearest), a missing one or a bad value.
    """
    parser = _Parser(cast(Any, kind), prog=prog, allow_abbrev=False)
    keys = [key.name for key in fields(cast(Any, kind))]
    if recipes is not None:
        _merge_recipe(parser, arguments, keys, kind=recipes)
    namespace, rest = parser.parse_known_args(arguments)
    if rest:
        flags = [f"--{key}" for key in keys]
        raise UserError(f"unknown argument '{rest[0]}'{_nearest(rest[0].split('=')[0], flags)}")
    return kind(**vars(namespace))


# What the names of recipes for other commands than pretrain start with.
OTHER_KINDS = ("finetune_", "linear_probe_")


def recipe_names(kind: str = "") -> list[str]:
    """Names of the recipes that the package ships: for pretraining, or those whose names start with `kind`."""
    folder = resources.files("hf_mae") / "recipes"
    names = sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))
    return [name for name in names if (name.startswith(kind) if kind else not name.startswith(OTHER_KINDS))]


def read_recipe(name: str, kind: str = "") -> dict[str, Any]:
    """The keys of a recipe of the package, or of a YAML file given by its path; `kind` as for `recipe_names`.

    Raises:
        UserError: if there is none, naming the nearest, or the file is not a table of keys.
    """
    names = recipe_names(kind)
    if name in names:
        text = (resources.files("hf_mae") / "recipes" / f"{name}.yaml").read_text()
    elif name.endswith((".yaml", ".yml")) and Path(name).is_file():
        text = Path(name).read_text()
    else:
        known = ", ".join(names)
        raise UserError(f"unknown recipe '{name}'{_nearest(name, names)}; there are {known}, or a .yaml file")
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"recipe {name} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"recipe {name} is not a table of keys; write lines such as 'epochs: 800'")
    return values


def _nearest(word: str, words: list[str]) -> str:
    match = difflib.get_close_matches(word, words, n=1)
    return f"; did you mean '{match[0]}'?" if match else ""


def size_value(text: str) -> int | list[int]:
    """An image size as it is typed: 224, 208x320 or 208,320."""
    size = config_value(text)
    if not isinstance(size, int | list):
        raise ValueError(f"{text} is no size")
    return size


def config_value(text: str) -> Any:
    """A value of MAEConfig as it is typed: sizes as 224, 208x320 or 208,320."""
    separator = next((s for s in ("x", ",") if s in text and all(part.isdigit() for part in text.split(s))), None)
    if separator:
        return [int(part) for part in text.split(separator)]
    value = yaml.safe_load(text)
    try:
        # YAML takes 1e-6, without a point, for a word.
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value

"""A dataclass, a recipe and a command line become one set of values; every mistake is one line."""

import re
import subprocess
import sys
from dataclasses import MISSING, dataclass, fields
from importlib import resources
from typing import Any, Literal, get_args, get_type_hints

import pytest
import yaml
from runs import recipe_names

from hf_mae import MAEConfig
from hf_mae.cli import COMMANDS
from hf_mae.commandline import GROUPS, parse, read_recipe
from hf_mae.configuration_mae import SIZES
from hf_mae.errors import UserError
from hf_mae.keys import ImageSize, Recipe, key, keys_of, names_where
from hf_mae.keys.evaluation_keys import FEATURE_FILES
from hf_mae.keys.finetune_keys import FinetuneRecipe
from hf_mae.keys.model_keys import ModelKeys
from hf_mae.keys.publishing_keys import ExportFormat, Format
from hf_mae.keys.run_keys import PretrainRecipe


@dataclass
class Seeded(Recipe):
    seed: int = key(0, "random seed of everything that is drawn", group="optimization")


@dataclass
class Keys(Seeded):
    recipe: str | None = key(None, "recipe to start from, by name or file")
    model: str = key(help_text="folder or Hub id of a pretrained model", group="model", metavar="DIR|ID")
    precision: Literal["auto", "no", "bf16"] = key("auto", "precision of the forward pass", group="hardware")
    epochs: float | None = key(800, "passes over the data", group="optimization")
    steps: int | None = key(None, "optimizer steps of the run", group="optimization", shown="from epochs")
    flip: bool = key(True, "mirror half of the images", group="data")
    streaming: bool | None = key(None, "read the data in place", group="data")
    crop_scale: list[float] = key([0.2, 1.0], "smallest and largest area of a crop", group="data")
    image_mean: list[float] | None = key(None, "mean of each channel, 50% grey by default", group="data")
    mask_ratio_schedule: list[str] | None = key(None, "mask ratios by fraction of the run", group="masking")
    image_size: ImageSize | None = key(None, "size of the images in pixels", group="data", shown="the model's")
    log_with: str | None = key(None, "tracker of the figures", group="logging")
    resume: Literal["auto", "none"] | None = key("none", "checkpoint to continue from", group="checkpoints")


@dataclass
class Prepare(Recipe):
    source: str = key(help_text="data set to read", positional=True, metavar="SRC")
    dest: str = key(help_text="folder to write", positional=True, metavar="DST")
    quality: int = key(90, "JPEG quality, 1 to 95")
    image_size: ImageSize | None = key(None, "size of the images in pixels")
    verify: bool = key(False, "read every image back")


@dataclass
class Report(Recipe):
    runs: list[str] = key(help_text="folders of runs", positional=True, metavar="RUN")
    output: str | None = key(None, "file to write")


def read(*words: str, kind: type = Keys, recipes: Any = None) -> Any:
    return parse(kind, ["--model", "m", *words] if kind is Keys else words, "hf-mae try", recipes=recipes)


def mistake(*words: str, kind: type = Keys, recipes: Any = None) -> str:
    with pytest.raises(UserError) as caught:
        read(*words, kind=kind, recipes=recipes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------ where values come from


def test_a_recipe_overrides_defaults_and_the_command_line_overrides_the_recipe(recipe_file):
    path = recipe_file("seed: 3\nflip: false\nsteps: 7")
    for words in (
        ["--recipe", path, "--seed", "4"],
        ["--seed", "4", "--config", path],
        [f"--config={path}", "--seed=4"],
    ):
        keys = read(*words)
        assert (keys.epochs, keys.flip, keys.steps, keys.seed, keys.recipe) == (800, False, 7, 4, path)


def test_the_command_line_overrides_a_recipe_with_the_default_itself_and_with_none(recipe_file):
    keys = read("--recipe", recipe_file("seed: 3\nepochs: 100"), "--seed", "0", "--epochs", "none")
    assert (keys.seed, keys.epochs) == (0, None)


def test_a_recipe_may_give_a_required_key_and_be_found_by_name(recipe_file, tmp_path):
    recipe_file("model: there")
    keys = parse(Keys, ["--recipe", "mine"], "hf-mae try", recipes={"mine": tmp_path / "mine.yaml"})
    assert (keys.model, keys.recipe) == ("there", "mine")


def test_lists_of_defaults_are_not_shared():
    read().crop_scale.append(3.0)
    assert read().crop_scale == Keys(model="m").crop_scale == [0.2, 1.0]


def assert_has(keys, name, value):
    """This key has the value, of the same type."""
    found = getattr(keys, name)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("precision: no", "precision", "no"),
        ("flip: no", "flip", False),
        ("flip: yes", "flip", True),
        ("epochs: 1e2", "epochs", 100.0),
        ("epochs: 1e-6", "epochs", 1e-6),
        ("epochs: null", "epochs", None),
        ("epochs: none", "epochs", None),
        ("epochs:", "epochs", None),
        ("streaming: ~", "streaming", None),
        ("log_with: none", "log_with", "none"),
        ("log_with: null", "log_with", None),
        ("log_with: 'null'", "log_with", "null"),
        ("log_with: 7", "log_with", "7"),
        ("resume: none", "resume", "none"),
        ("crop_scale: 0.3", "crop_scale", [0.3]),
        ("crop_scale: [0.3, 1]", "crop_scale", [0.3, 1.0]),
        ("image_mean: [-0.5, 1]", "image_mean", [-0.5, 1.0]),
        ("image_mean: none", "image_mean", None),
        ("image_size: 224", "image_size", 224),
        ("image_size: [208, 320]", "image_size", [208, 320]),
        ("image_size: 208x320", "image_size", [208, 320]),
        ("mask_ratio_schedule: {0: 0.6, 0.5: 0.75}", "mask_ratio_schedule", ["0:0.6", "0.5:0.75"]),
        ("mask_ratio_schedule: {0: 128, 0.5: [208, 320]}", "mask_ratio_schedule", ["0:128", "0.5:208x320"]),
        ("mask_ratio_schedule: ['0:0.6', '0.5:0.75']", "mask_ratio_schedule", ["0:0.6", "0.5:0.75"]),
    ],
)
def test_values_of_a_recipe_are_read_as_words_of_the_command_line(text, name, value, recipe_file):
    assert_has(read("--recipe", recipe_file(text)), name, value)


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--flip", "flip", True),
        ("--flip false", "flip", False),
        ("--flip=No", "flip", False),
        ("--flip 0", "flip", False),
        ("--streaming", "streaming", True),
        ("--streaming none", "streaming", None),
        ("--steps none", "steps", None),
        ("--steps 5", "steps", 5),
        ("--epochs 5", "epochs", 5.0),
        ("--log_with none", "log_with", "none"),
        ("--resume none", "resume", "none"),
        ("--crop_scale 0.2 1", "crop_scale", [0.2, 1.0]),
        ("--image_mean -0.5 2", "image_mean", [-0.5, 2.0]),
        ("--image_mean None", "image_mean", None),
        ("--image_size 224", "image_size", 224),
        ("--image_size 208 320", "image_size", [208, 320]),
        ("--image_size 208x320", "image_size", [208, 320]),
        ("--image_size=208,320", "image_size", [208, 320]),
        ("--image_size none", "image_size", None),
        ("--image_mean -0.5 -.5 -1e-3 -1e5", "image_mean", [-0.5, -0.5, -1e-3, -1e5]),
        ("--epochs -1.5E-5", "epochs", -1.5e-5),
        ("--seed 1 --seed 2", "seed", 2),
        ("--crop_scale 0.1 0.2 --crop_scale=0.3", "crop_scale", [0.3]),
        ("--mask_ratio_schedule 0:0.6 0.5:0.75", "mask_ratio_schedule", ["0:0.6", "0.5:0.75"]),
    ],
)
def test_typed_words_become_values_of_the_type_of_the_key(words, name, value):
    assert_has(read(*words.split()), name, value)


def test_a_word_may_have_spaces_equals_signs_and_percent_signs():
    assert read("--log_with=a b=c %d").log_with == "a b=c %d"


# ------------------------------------------------------------------------------------------ words without a flag


def test_words_without_a_flag_give_positional_keys_in_their_order():
    expected = Prepare(source="a", dest="b", quality=80)
    for words in ("a b --quality 80", "a --dest b --quality 80", "--dest=b --source=a --quality 80"):
        assert read(*words.split(), kind=Prepare) == expected
    for words in (
        "--quality 80 a b",
        "a --quality 80 b",
        "--quality=80 --verify no a b",
        "--verify false a b --quality 80",
    ):
        assert read(*words.split(), kind=Prepare) == expected
    for words in (
        "a b --output c",
        "--output c a b",
        "a --output c b",
        "--runs a b --output c",
        "--output c --runs a b",
    ):
        assert read(*words.split(), kind=Report) == Report(runs=["a", "b"], output="c")


def test_a_bare_boolean_flag_leaves_the_words_after_it_to_the_keys_without_a_flag():
    for words in ("--verify a b", "a b --verify", "a --verify b", "--verify true a b"):
        assert read(*words.split(), kind=Prepare) == Prepare(source="a", dest="b", verify=True)


def test_a_flag_of_several_words_takes_all_words_up_to_the_next_flag():
    sized = Prepare(source="a", dest="b", image_size=[20, 30])
    for words in ("a b --image_size 20 30", "--image_size=20x30 a b", "--image_size 20 30 --quality 90 a b"):
        assert read(*words.split(), kind=Prepare) == sized
    message = "--image_size 'a' is not an image size such as 224 or 208x320, or none"
    assert mistake("--image_size", "20", "30", "a", "b", kind=Prepare) == message


def test_a_positional_key_given_twice_or_a_word_too_many_is_an_error():
    assert mistake("a", "b", "--source", "c", kind=Prepare) == (
        "source is given twice, as 'a' and as --source; leave one of them out"
    )
    assert mistake("a", "b", "c", kind=Prepare) == (
        "'c' has no key; write --key c, with one of the keys of hf-mae try --help"
    )
    with pytest.raises(UserError, match=r"^'quickstart' has no key; write --key quickstart"):
        parse(Keys, ["quickstart"], "hf-mae try")


# ------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--seed one", "--seed 'one' is not a whole number"),
        ("--seed 2.5", "--seed '2.5' is not a whole number"),
        ("--seed none", "--seed 'none' is not a whole number"),
        ("--steps many", "--steps 'many' is not a whole number, or none"),
        ("--precision fp8", "--precision 'fp8' is not one of auto, no, bf16"),
        ("--flip 3", "--flip '3' is not true or false"),
        ("--crop_scale 0.2 wide", "--crop_scale 'wide' is not a number"),
        ("--image_mean none 0.5", "--image_mean [None, 0.5] is not a number, or none"),
        ("--image_size wide", "--image_size 'wide' is not an image size such as 224 or 208x320, or none"),
        ("--image_size 1 2 3", "--image_size '1 2 3' is not an image size such as 224 or 208x320, or none"),
        ("--seed", "--seed: expected one argument; see hf-mae try --help"),
        ("--crop_scale", "--crop_scale: expected at least one argument; see hf-mae try --help"),
        ("--seed 1 2", "'2' has no key; write --key 2, with one of the keys of hf-mae try --help"),
        ("--sed 1", "unknown argument '--sed'; did you mean '--seed'?"),
        ("--crop-scale 1", "unknown argument '--crop-scale'; did you mean '--crop_scale'?"),
        ("--crop=1", "unknown argument '--crop=1'; did you mean '--crop_scale'?"),
        ("-seed 1", "unknown argument '-seed'; did you mean '--seed'?"),
        ("--mask 0.5", "unknown argument '--mask'"),
        ("--xyzzy", "unknown argument '--xyzzy'"),
        (f"--steps {'x' * 5000}", f"--steps '{'x' * 96}... is not a whole number, or none"),
        (f"--{'x' * 5000}", f"unknown argument '--{'x' * 95}...'"),
    ],
)
def test_a_typing_mistake_is_one_line_with_key_value_and_what_is_allowed(words, message):
    assert mistake(*words.split()) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: one", "recipe FILE: seed 'one' is not a whole number"),
        ("seed: null", "recipe FILE: seed None is not a whole number"),
        ("seed: [1, 2]", "recipe FILE: seed ['1', '2'] is not a whole number"),
        ("seed: {a: 1}", "recipe FILE: seed {'a': '1'} is not a whole number"),
        ("precision: fp8", "recipe FILE: precision 'fp8' is not one of auto, no, bf16"),
        ("crop_scale: []", "recipe FILE: crop_scale [] is not a number"),
        ("crop_scale: [[1]]", "recipe FILE: crop_scale [['1']] is not a number"),
        (
            "image_size: [1, 2, 3]",
            "recipe FILE: image_size '1 2 3' is not an image size such as 224 or 208x320, or none",
        ),
        ("crop_scal: 1", "unknown key 'crop_scal' in recipe FILE; did you mean 'crop_scale'?"),
        ("null: 1", "unknown key 'None' in recipe FILE"),
        ("- seed", "recipe FILE is not a table of keys; write lines such as 'epochs: 800'"),
    ],
)
def test_a_mistake_in_a_recipe_is_one_line_that_names_the_recipe(text, message, recipe_file):
    path = recipe_file(text)
    assert mistake("--recipe", path).replace(path, "FILE") == message


def test_a_recipe_that_is_missing_or_broken_is_named(recipe_file, tmp_path):
    assert re.match(r"recipe .*mine.yaml is not YAML: ", mistake("--recipe", recipe_file("seed: [")))
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00")
    assert re.match(r"recipe .*mine.yaml is not YAML: ", mistake("--recipe", str(tmp_path / "mine.yaml")))
    recipes = {"quickstart": tmp_path / "mine.yaml", "base": tmp_path / "mine.yaml"}
    assert mistake("--recipe", "quikstart", recipes=recipes) == (
        "unknown recipe 'quikstart'; did you mean 'quickstart'? (known: quickstart, base; or give a .yaml file)"
    )
    for name in ("no/file.yaml", str(tmp_path)):
        assert mistake("--recipe", name) == f"unknown recipe '{name}'; give a .yaml file that exists"
    assert re.match(r"recipe .*mine.yaml is not YAML: ", mistake("--recipe", recipe_file("seed: " + "[" * 3000)))
    assert "which isn't read" in mistake("--recipe", recipe_file("recipe: quickstart\nseed: 3"))
    assert "can't be read: File name too long" in mistake("--recipe", "a" * 5000 + ".yaml")


def test_a_missing_key_is_named_with_what_it_is():
    with pytest.raises(UserError, match=r"^--model is missing: folder or Hub id of a pretrained model; see hf-mae try"):
        parse(Keys, [], "hf-mae try")
    assert mistake("a", kind=Prepare) == "--dest is missing: folder to write; see hf-mae try --help"


# ------------------------------------------------------------------------------------------ help


def help_of(capsys, kind: type = PretrainRecipe, **more: Any) -> str:
    with pytest.raises(SystemExit) as caught:
        parse(kind, ["--help"], "hf-mae try", **more)
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_help_says_required_choices_and_default_in_plain_words(capsys):
    text = help_of(capsys, Keys, description="What it does.", examples=["hf-mae try --model DIR"])
    flat = " ".join(text.split())
    assert text.startswith("usage: hf-mae try [--key value ...]\n\nWhat it does.\n")
    assert text.endswith("\nexamples:\n  hf-mae try --model DIR\n")
    for line in (
        "recipe to start from, by name or file data:",
        "--model DIR|ID folder or Hub id of a pretrained model (required)",
        "--precision WORD precision of the forward pass (auto, no, bf16; default: auto)",
        "--steps N optimizer steps of the run (default: from epochs)",
        "--flip [true|false] mirror half of the images (default: true)",
        "--streaming [true|false] read the data in place --crop_scale",
        "smallest and largest area of a crop (default: 0.2 1)",
        "mean of each channel, 50% grey by default --image_size",
        "size of the images in pixels (default: the model's)",
    ):
        assert line in flat
    assert "None" not in text


def test_usage_shows_the_first_words(capsys):
    assert help_of(capsys, Prepare).startswith("usage: hf-mae try SRC DST [--key value ...]\n")
    assert help_of(capsys, Report).startswith("usage: hf-mae try RUN ... [--key value ...]\n")


@pytest.mark.parametrize("columns", ["70", "100", "250"])
def test_the_help_of_pretrain_lists_each_key_once_in_its_group_within_100_columns(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    text = help_of(capsys)
    flags = re.findall(r"^  (--\w+)", text, re.MULTILINE)
    assert sorted(flags) == sorted(f"--{one.name}" for one in fields(PretrainRecipe))
    assert re.findall(r"^(\w+):$", text, re.MULTILINE) == ["options", *(name for name in GROUPS if name != "output")]
    assert max(map(len, text.splitlines())) <= min(100, int(columns))
    assert "None" not in text


def test_help_is_printed_without_torch_or_transformers():
    code = """
import sys
sys.argv = ["hf-mae", "pretrain", "--help"]
from hf_mae.commandline import parse
from hf_mae.keys.publishing_keys import Format, ExportFormat
from hf_mae.keys.run_keys import PretrainRecipe
try:
    parse(PretrainRecipe, ["--help"], "hf-mae pretrain")
finally:
    print("HEAVY", sorted({"torch", "transformers", "numpy"} & sys.modules.keys()))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "HEAVY []"


# ------------------------------------------------------------------------------------------ the keys of all commands


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_lists_each_key_once_with_help_and_says_which_are_required(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    keys = keys_of(COMMANDS[name].keys)
    text = help_of(capsys, COMMANDS[name].keys)
    assert sorted(re.findall(r"^  (--\w+)", text, re.MULTILINE)) == sorted(f"--{one}" for one in keys)
    assert text.count("(required)") + text.count("; required)") == sum(one.default is MISSING for one in keys.values())
    assert "None" not in text
    for one in keys.values():
        assert len(one.metadata["help"].split()) >= 5, one.name


def test_the_keys_that_a_resumed_run_may_change_are_these():
    # They say how a run is computed and shown, not what it computes.
    assert names_where(PretrainRecipe, free=True) == {
        "output_dir", "resume", "recipe", "num_workers", "per_device_batch_size", "mixed_precision", "compile",
        "gradient_checkpointing", "attn_implementation", "deterministic", "log_steps", "log_with", "save_steps",
        "keep_checkpoints", "eval_steps", "max_eval_samples", "max_bad_fraction", "dry_run", "allow_data_change",
        "quality_steps", "quality_samples", "push_to_hub", "hub_private_repo",
    }  # fmt: skip
    shared = names_where(PretrainRecipe, free=True) & keys_of(FinetuneRecipe).keys()
    assert names_where(FinetuneRecipe, free=True) == shared | {"predictions"}
    for kind in (PretrainRecipe, FinetuneRecipe):
        assert names_where(kind, place=True) == {
            "dataset", "dataset_config", "dataset_revision", "eval_dataset", "eval_split", "labels",
        }  # fmt: skip


def test_the_choices_of_a_key_are_what_the_package_can_do():
    from hf_mae.conversion import export, write
    from hf_mae.evaluation import embed

    assert get_args(Format) == tuple(write.WRITERS)
    assert get_args(ExportFormat) == tuple(export.WRITERS)
    assert FEATURE_FILES == tuple(embed.FEATURE_WRITERS)
    assert keys_of(PretrainRecipe)["model_size"].choices == tuple(SIZES)


def test_a_card_leaves_out_how_a_run_was_started():
    started = {"recipe", "output_dir", "resume", "dry_run", "log_with"}
    assert names_where(FinetuneRecipe, card=False) == started | {"predictions"}
    assert names_where(PretrainRecipe, card=False) == started | {"push_to_hub", "hub_private_repo"}


# ------------------------------------------------------------------------------------------ the keys of pretraining


# How ModelKeys writes the types of MAEConfig: JSON has no tuples, and an int is a float.
TYPES = {
    float | int: float,
    float | int | None: float,
    int | list[int] | tuple[int, ...]: ImageSize,
    list[float | int] | tuple[float | int, ...] | None: list[float],
}


# Keys of a classifier or a backbone, which do nothing in pretraining.
NOT_OF_PRETRAINING = {"head_initializer_range", "reshape_hidden_states", "pyramid_scales"}


def config_keys() -> list[str]:
    names = [name for name in MAEConfig.__annotations__ if not name.startswith("_")]
    assert set(names) >= NOT_OF_PRETRAINING
    return [name for name in names if name not in NOT_OF_PRETRAINING]


def test_the_keys_of_the_model_are_those_of_its_configuration():
    assert [one.name for one in fields(ModelKeys)] == config_keys()


@pytest.mark.parametrize("name", config_keys())
def test_a_key_of_the_model_has_the_type_and_shows_the_default_of_the_configuration(name):
    field, hint = ModelKeys.__dataclass_fields__[name], MAEConfig.__annotations__[name]
    assert get_type_hints(ModelKeys, include_extras=True)[name] == TYPES.get(hint, hint) | None
    assert field.default is None
    # Pretraining takes the channels of its data.
    assert field.metadata["shown"] == ("as in the data" if name == "num_channels" else getattr(MAEConfig(), name))


def test_given_keys_of_the_model_make_its_configuration():
    words = [
        "--image_size",
        "64x32",
        "--mask_cell",
        "2",
        "--mask_ratio",
        "0.5",
        "--norm_pix_loss",
        "--hidden_act",
        "relu",
    ]
    given = parse(PretrainRecipe, words, "hf-mae pretrain").given_model_keys()
    assert given == {
        "image_size": [64, 32], "mask_cell": 2, "mask_ratio": 0.5, "norm_pix_loss": True,
        "hidden_act": "relu",
    }  # fmt: skip
    assert {name: getattr(MAEConfig(**given), name) for name in given} == given


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_of_pretraining_is_read_with_the_values_of_its_file(name):
    recipes = {name: resources.files("hf_mae") / "recipes" / f"{name}.yaml"}
    keys = parse(PretrainRecipe, ["--recipe", name], "hf-mae pretrain", recipes=recipes)
    written = yaml.safe_load(recipes[name].read_text())
    assert {one: getattr(keys, one) for one in written} == written
    assert read_recipe(name, recipes).keys() == written.keys()

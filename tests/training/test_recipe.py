import re
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
import yaml
from runs import load_pretrain_recipe, recipe_names, shipped_recipe

from hf_mae import MAEConfig, MAEForPreTraining
from hf_mae.errors import UserError
from hf_mae.keys.model_keys import MODEL_KEYS
from hf_mae.keys.run_keys import PretrainRecipe, PretrainRunKeys, RunRecipe
from hf_mae.training.build import model_config_of

# ------------------------------------------------------------------------------------------ where values come from


def test_defaults_give_way_to_the_recipe_file_and_that_to_the_command_line(recipe_file):
    path = recipe_file("seed: 3\nblr: 1e-3\nhidden_size: 96\nmask_ratio: 0.6\nflip: false\nimage_size: [32, 48]")
    recipe = load_pretrain_recipe(["--recipe", path, "--seed", "4", "--mask_ratio", "0.5"])
    assert (recipe.weight_decay, recipe.total_batch_size) == (0.05, 4096)  # defaults
    assert (recipe.blr, recipe.flip) == (1e-3, False)  # file
    assert recipe.seed == 4  # command line
    assert recipe.given_model_keys() == {"hidden_size": 96, "mask_ratio": 0.5, "image_size": [32, 48]}
    assert recipe.output_dir == "outputs/mine"
    assert load_pretrain_recipe([]).seed == 0
    assert load_pretrain_recipe([]).given_model_keys() == {}
    assert load_pretrain_recipe([]).output_dir == "outputs/pretrain"
    assert load_pretrain_recipe(["--recipe=quickstart", "--output_dir", "x"]).output_dir == "x"
    assert load_pretrain_recipe(["--recipe=quickstart"]).output_dir == "outputs/quickstart"


def test_a_resolved_recipe_can_be_written_and_read_as_a_recipe_file(recipe_file):
    recipe = load_pretrain_recipe(
        ["--recipe", "quickstart", "--seed", "7", "--image_size", "16x8", "--crop_scale", "0.3", "0.9", "--streaming",
         "false", "--mixed_precision", "no", "--layer_norm_eps", "1e-5", "--epochs", "3"]
    )  # fmt: skip
    path = recipe_file(yaml.safe_dump(recipe.to_dict(), sort_keys=False))
    assert set(recipe.to_dict()) == own_keys() | recipe.given_model_keys().keys()
    again = load_pretrain_recipe(["--recipe", path])
    again.recipe = recipe.recipe
    assert again == recipe


def own_keys() -> set[str]:
    """The keys of pretraining that are not the model's."""
    return {field.name for field in fields(PretrainRecipe)} - set(MODEL_KEYS)


def test_every_field_and_every_key_of_the_configuration_is_a_flag(capsys):
    with pytest.raises(SystemExit):
        load_pretrain_recipe(["--help"])
    flags = re.findall(r"^  --(\w+)", capsys.readouterr().out, re.MULTILINE)
    own = {field.name for field in fields(RunRecipe)} | {field.name for field in fields(PretrainRunKeys)}
    config = set(MODEL_KEYS)
    assert {"hidden_size", "decoder_num_hidden_layers", "norm_pix_loss", "mask_ratio", "patch_size"} <= config
    assert sorted(flags) == sorted(own | config)
    assert own == own_keys()
    assert config < MAEConfig.__annotations__.keys()
    # All that can't be told apart by a name would be lost.
    assert not own & config


def test_every_key_of_the_configuration_reaches_the_model_configuration():
    default = MAEConfig()
    other = {
        "hidden_act": "relu", "mask_strategy": "block", "pooling": "cls", "position_resize": "sincos",
        "decoder_attention": "cross",
        "image_size": "64x32", "num_attention_heads": 6, "decoder_num_attention_heads": 8, "mask_cell": 2,
    }  # fmt: skip
    for key in MODEL_KEYS:
        value = getattr(default, key)
        if key in other:
            value = other[key]
        elif isinstance(value, bool):
            value = not value
        else:
            value = value * 2 if isinstance(value, int) and value else value / 2 if value else 0.25
            value = 1 if key == "eval_mask_seed" else value
        cross = ["--decoder_attention", "cross"] if key in ("decoder_fusion", "prediction_ratio") else []
        words = map(str, value if isinstance(value, list) else [value])
        config = model_config_of(load_pretrain_recipe([f"--{key}", *words, *cross]), num_channels=3)
        expected = [64, 32] if key == "image_size" else value
        assert getattr(config, key) == expected != getattr(default, key), key


@pytest.mark.parametrize("text", ["208x320", "208,320"])
def test_sizes_may_be_two_numbers(text):
    recipe = load_pretrain_recipe(["--image_size", text, "--patch_size", "16"])
    assert recipe.given_model_keys() == {"image_size": [208, 320], "patch_size": 16}
    assert model_config_of(recipe, 3).grid_size == (13, 20)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("layer_norm_eps", "1e-5", 1e-5),
        ("mask_ratio", "0.9", 0.9),
        ("norm_pix_loss", "true", True),
        ("norm_pix_loss", "False", False),
        ("pooling", "cls", "cls"),
        ("num_hidden_layers", "3", 3),
    ],
)
def test_values_of_the_configuration_have_their_type_when_typed_and_in_a_file(key, text, value, recipe_file):
    for arguments in ([f"--{key}", text], ["--recipe", recipe_file(f"{key}: {text}")]):
        found = load_pretrain_recipe(arguments).given_model_keys()[key]
        assert found == value
        assert type(found) is type(value)


def test_values_of_a_recipe_file_are_read_as_on_the_command_line(recipe_file):
    text = "mixed_precision: no\nflip: no\ncompile: yes\nepochs: 1e2\nimage_mean: [0.5, 1]\ntotal_steps: null\nmodel: 7"
    recipe = load_pretrain_recipe(["--recipe", recipe_file(text)])
    assert (recipe.mixed_precision, recipe.flip, recipe.compile, recipe.epochs) == ("no", False, True, 100.0)
    assert (recipe.image_mean, recipe.total_steps, recipe.model) == ([0.5, 1.0], None, "7")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("total_batch_size: many", "total_batch_size 'many' is not a whole number"),
        ("num_workers: 2.5", "num_workers '2.5' is not a whole number"),
        ("model_size: giant", "model_size 'giant' is not one of .*huge"),
        ("mixed_precision: fp8", "mixed_precision 'fp8' is not one of .*bf16"),
        ("flip: 3", "flip '3' is not true or false"),
        ("dataset: [a, b]", r"dataset \['a', 'b'\] is not a single word"),
        ("crop_scale: []", r"crop_scale \[\] is not a number"),
        ("- seed", "is not a table of keys; write lines such as 'epochs: 800'"),
        ("seed: [", "is not YAML: "),
    ],
)
def test_impossible_values_in_a_file_are_named_in_one_line(text, message, recipe_file):
    with pytest.raises(UserError, match=message) as caught:
        load_pretrain_recipe(["--recipe", recipe_file(text)])
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------ mistakes


def test_an_unknown_recipe_names_the_nearest_and_all():
    known = rf"\(known: {', '.join(recipe_names())}; or give a .yaml file\)"
    with pytest.raises(UserError, match=rf"unknown recipe 'quikstart'; did you mean 'quickstart'\? {known}"):
        load_pretrain_recipe(["--recipe", "quikstart"])
    with pytest.raises(UserError, match=r"unknown recipe 'there/is/none.yaml' \(known: "):
        load_pretrain_recipe(["--recipe", "there/is/none.yaml"])


def test_an_unknown_key_or_flag_names_the_nearest(recipe_file):
    with pytest.raises(UserError, match=r"unknown key 'mask_ration' in recipe .*; did you mean 'mask_ratio'\?"):
        load_pretrain_recipe(["--recipe", recipe_file("mask_ration: 0.5")])
    with pytest.raises(UserError, match=r"unknown argument '--total_batchsize'; did you mean '--total_batch_size'\?"):
        load_pretrain_recipe(["--total_batchsize", "64"])
    with pytest.raises(UserError, match=r"unknown argument '--norm_pix=true'; did you mean '--norm_pix_loss'\?"):
        load_pretrain_recipe(["--norm_pix=true"])
    with pytest.raises(UserError, match=r"unknown argument '--xyzzy'$"):
        load_pretrain_recipe(["--xyzzy", "1"])
    # No abbreviations: what --mask means could change with the next key.
    with pytest.raises(UserError, match="unknown argument '--mask'"):
        load_pretrain_recipe(["--mask", "0.5"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "one"], "--seed 'one' is not a whole number"),
        (["--seed", "-1"], r"seed -1 is out of range; give a number in \[0, 4294967295\]"),
        (["--model_size", "giant"], "--model_size 'giant' is not one of tiny, small, base, large, huge"),
        (["--total_batch_size", "0"], "total_batch_size 0 is too small; give 1 or more"),
        (["--per_device_batch_size", "-2"], "per_device_batch_size -2 is too small; give 1 or more"),
        (["--max_samples", "0"], "max_samples 0 is too small"),
        (["--keep_checkpoints", "1"], "keep_checkpoints 1 is too small; give 2 or more"),
        (["--save_steps", "0"], "save_steps 0 is too small"),
        (["--epochs", "0"], "epochs 0.0 is out of range"),
        (["--num_workers", "-1"], "num_workers -1 is negative; 0 loads in the training process"),
        (["--crop_scale", "0.5", "0.2"], r"crop_scale \[0.5, 0.2\] is not 0 < smallest <= largest <= 1; .* 0.2 1.0"),
        (["--crop_scale", "0", "1"], "is not 0 < smallest"),
        (["--crop_scale", "0.2", "1.1"], "is not 0 < smallest"),
        (["--crop_scale", "0.2", "0.5", "1"], "is not 0 < smallest"),
        (["--seed", "4294967296"], r"seed 4294967296 is out of range; give a number in \[0, 4294967295\]"),
        (["--epochs", "nan"], "epochs nan is out of range"),
        (["--epochs", "inf"], "epochs inf is out of range"),
        (["--total_steps", "9" * 400], r"total_steps 9{97}\.\.\. is out of range"),
        (["--warmup_steps", "9" * 400], "is out of range"),
        (["--clip_grad", "0"], "clip_grad 0.0 is out of range"),
        (["--image_std", "0.5", "0"], r"image_std \[0.5, 0.0\] is out of range"),
        (["--image_std", "nan"], "image_std .nan. is out of range"),
        (["--image_mean", "inf"], "image_mean .inf. is out of range"),
        (["--eval_crop_pct", "1e-300"], "eval_crop_pct 1e-300 is out of range"),
        (["--mask_ratio_schedule", "0:0.5", "nan:0.6"], "must start at 0, rise"),
        (["--eval_crop_pct", "0"], r"eval_crop_pct 0.0 is out of range; give a number in \[0.1, 1\]"),
    ],
)
def test_values_that_no_run_can_have_are_refused_with_the_remedy(arguments, message):
    with pytest.raises(UserError, match=message):
        load_pretrain_recipe(arguments)


def test_one_number_is_a_fixed_crop_scale():
    assert load_pretrain_recipe(["--crop_scale", "0.7"]).crop_scale == [0.7]


def test_numbers_of_a_model_that_do_not_go_together_are_a_recipe_error_of_one_line():
    recipe = load_pretrain_recipe(["--image_size", "100"])
    with pytest.raises(UserError, match=r"100x100 is not a multiple of patch_size 16x16.* 96x96") as caught:
        model_config_of(recipe, 3)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="--hidden_size 'wide' is not a whole number"):
        load_pretrain_recipe(["--hidden_size", "wide"])


# ------------------------------------------------------------------------------------------ derived values


@pytest.mark.parametrize(("blr", "batch", "lr"), [("1.5e-4", "4096", 2.4e-3), ("1e-3", "256", 1e-3), ("1", "64", 0.25)])
def test_the_learning_rate_is_linear_in_the_batch(blr, batch, lr):
    recipe = load_pretrain_recipe(["--blr", blr, "--total_batch_size", batch])
    assert recipe.lr == pytest.approx(lr, rel=1e-15)


@pytest.mark.parametrize(
    ("arguments", "samples", "expected"),
    [
        # ImageNet-1k: 1281167 / 4096 = 312.785 steps an epoch
        (["--total_batch_size", "4096"], 1_281_167, (250_228, 12_511)),
        (["--total_batch_size", "4096", "--epochs", "1600"], 1_281_167, (500_456, 12_511)),
        # 40 epochs of warm-up would be 40 % of this run: a tenth at most
        (["--total_batch_size", "4096", "--epochs", "100"], 1_281_167, (31_278, 3_127)),
        (["--total_batch_size", "100", "--total_steps", "77"], 1000, (77, 7)),
        (["--total_batch_size", "100", "--total_steps", "1000", "--warmup_epochs", "5"], 1000, (1000, 50)),
        (["--total_batch_size", "100", "--total_steps", "1000", "--warmup_steps", "500"], 1000, (1000, 500)),
        (["--total_batch_size", "100", "--total_steps", "1000", "--warmup_steps", "0"], 1000, (1000, 0)),
        (["--total_batch_size", "100", "--epochs", "2.5"], 1000, (25, 2)),
        (["--total_batch_size", "4096", "--epochs", "1"], 10, (1, 0)),
    ],
)
def test_steps_follow_from_epochs_and_the_warm_up_is_a_tenth_at_most(arguments, samples, expected):
    assert load_pretrain_recipe(arguments).steps(samples) == expected


def test_steps_need_steps_or_epochs():
    with pytest.raises(UserError, match=r"neither total_steps nor epochs is given; pass e.g. --epochs 800"):
        PretrainRecipe(epochs=None).steps(1000)


@pytest.mark.parametrize(
    ("total", "ranks", "per_device", "expected"),
    [
        (4096, 8, 64, (64, 8)),
        (4096, 8, 512, (512, 1)),
        (4096, 1, None, (64, 64)),
        (256, 8, None, (32, 1)),
        (256, 4, 256, (64, 1)),  # a recipe for one process, on four
        (96, 2, None, (48, 1)),
        (134, 2, None, (1, 67)),  # 67 is prime and more than 64
        (6, 3, 1, (1, 2)),
    ],
)
def test_micro_batches_make_up_the_total(total, ranks, per_device, expected):
    recipe = PretrainRecipe(total_batch_size=total, per_device_batch_size=per_device)
    assert recipe.micro_batch(ranks) == expected
    assert expected[0] * expected[1] * ranks == total


def test_a_remainder_is_an_error_that_names_the_sizes_that_fit():
    with pytest.raises(
        UserError,
        match=r"total_batch_size 96 is not a multiple of per_device_batch_size 20 x 2 processes; sizes that fit: "
        r"1, 2, 3, 4, 6, 8, 12, 16, 24, 48$",
    ):
        PretrainRecipe(total_batch_size=96, per_device_batch_size=20).micro_batch(2)
    with pytest.raises(
        UserError,
        match=r"total_batch_size 100 can't be split evenly over 8 processes; use \[1, 2, 4, 5\] processes, or a mult",
    ):
        PretrainRecipe(total_batch_size=100).micro_batch(8)


# ------------------------------------------------------------------------------------------ shipped recipes

# arXiv:2111.06377, Table 8 (pretraining), Sec. 4 and the released checkpoints.
TABLE_8 = {
    "adam_beta1": 0.9, "adam_beta2": 0.95, "weight_decay": 0.05, "blr": 1.5e-4, "total_batch_size": 4096,
    "epochs": 800, "warmup_epochs": 40, "min_lr": 0.0, "crop_scale": [0.2, 1.0], "flip": True, "clip_grad": None,
}  # fmt: skip
PAPERS_MODEL = {
    "image_size": 224, "num_channels": 3, "mask_ratio": 0.75, "norm_pix_loss": True, "mask_strategy": "random",
    "mask_cell": 1, "decoder_hidden_size": 512, "decoder_num_hidden_layers": 8, "decoder_num_attention_heads": 16,
    "decoder_intermediate_size": 2048, "drop_path_rate": 0, "layer_norm_eps": 1e-6, "qkv_bias": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "sizes", "millions"),
    [
        ("vit_base_in1k", (768, 12, 12, 3072, 16), 111.9),
        ("vit_large_in1k", (1024, 24, 16, 4096, 16), 329.5),
        ("vit_huge_in1k", (1280, 32, 16, 5120, 14), 657.1),
    ],
)
def test_the_papers_recipes_are_table_8(name, sizes, millions):
    recipe = load_pretrain_recipe(["--recipe", name])
    assert {key: getattr(recipe, key) for key in TABLE_8} == TABLE_8
    assert recipe.lr == pytest.approx(2.4e-3)
    assert recipe.dataset == "ILSVRC/imagenet-1k"
    assert recipe.steps(1_281_167) == (250_228, 12_511)
    config = model_config_of(recipe, 3)
    assert {key: getattr(config, key) for key in PAPERS_MODEL} == PAPERS_MODEL
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size")
    assert tuple(getattr(config, key) for key in keys) == sizes
    with torch.device("meta"):
        model = MAEForPreTraining(config)
    # mmpretrain's README counts them as the original does: all, with decoder and both tables.
    state = model.state_dict()
    assert sum(tensor.numel() for tensor in state.values()) / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize("name", ["cifar10_vit_tiny", "vit_base_in1k", "vit_large_in1k"])
def test_the_fast_recipes_differ_by_decoder_and_the_learning_rate_that_goes_with_it(name):
    usual, fast = shipped_recipe(name), shipped_recipe(f"{name}_fast")
    differing = {key: fast[key] for key in fast if fast[key] != usual.get(key)}
    blr, depth = differing.pop("blr"), differing.pop("decoder_num_hidden_layers", None)
    assert differing == {"decoder_attention": "cross", "decoder_fusion": True, "prediction_ratio": 0.25}
    assert blr == pytest.approx(usual["blr"] * 0.25 / 0.75, rel=0.02)
    assert depth == (None if name == "cifar10_vit_tiny" else 12)
    assert usual.keys() <= fast.keys()


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_loads_and_builds_its_model(name):
    recipe = load_pretrain_recipe(["--recipe", name])
    assert recipe.recipe == name
    written = shipped_recipe(name)
    assert {key: recipe.to_dict()[key] for key in written} == written
    with torch.device("meta"):
        model = MAEForPreTraining(model_config_of(recipe, written.get("num_channels", 3)))
    assert model.device.type == "meta"
    assert model.config.num_patches >= 16


def test_all_recipes_are_shipped():
    in1k = ["vit_base_in1k", "vit_base_in1k_fast", "vit_huge_in1k", "vit_large_in1k", "vit_large_in1k_fast"]
    assert recipe_names() == ["cifar10_vit_tiny", "cifar10_vit_tiny_fast", "quickstart", *in1k]


# ------------------------------------------------------------------------------------------ the command line


def test_help_answers_without_torch_or_transformers():
    code = """
import sys
sys.argv = ["/usr/local/bin/hf-mae", "--help"]
from hf_mae.cli import main
status = main()
heavy = sorted({"torch", "transformers", "numpy", "yaml"} & sys.modules.keys())
print("STATUS", status, heavy)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "usage: hf-mae COMMAND" in result.stdout
    assert re.search(r"^  pretrain +train", result.stdout, re.MULTILINE)
    assert result.stdout.splitlines()[-1] == "STATUS 0 []"


def test_the_help_of_pretrain_names_keys_with_their_defaults(capsys):
    with pytest.raises(SystemExit) as caught:
        load_pretrain_recipe(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "usage: hf-mae pretrain" in text
    for key in ("--total_batch_size", "--blr", "--mask_ratio", "--resume"):
        assert key in text
    assert "(default: 4096)" in " ".join(text.split())

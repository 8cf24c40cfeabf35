"""The command line: what it answers, and the one line that names every mistake."""

import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields, replace

import huggingface_hub
import numpy as np
import pytest
from PIL import Image
from runs import REPOSITORY, TINY_RUN, arguments, environment, events, recipe_names, run, start, tree, weights_hash
from tiny import TINY
from transformers import ViTMAEConfig, ViTMAEForPreTraining

import hf_mae
from hf_mae.cli import COMMANDS, main
from hf_mae.keys.run_keys import PretrainRecipe

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """A working folder and caches of this test alone; nothing is asked of the network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


@pytest.fixture
def mistake(capfd):
    """Starts a command that has to fail by the user's mistake; the message."""

    def message(*words) -> str:
        capfd.readouterr()
        assert start(*words) == 2
        out, err = capfd.readouterr()
        lines = err.splitlines()
        assert len(lines) == 1, err
        assert lines[0].startswith("hf-mae: error: ")
        assert len(lines[0]) < 700
        assert "Traceback" not in out
        return lines[0].removeprefix("hf-mae: error: ")

    return message


def pictures(folder, count=40, channels=3):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(rng.integers(0, 256, (12, 12, channels), np.uint8)).save(folder / f"{number:02d}.png")
    return folder


def tiles(folder, count=40, bands=13):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        np.save(folder / f"{number:02d}.npy", rng.integers(0, 65536, (bands, 24, 20)).astype(np.uint16))
    return folder


# ------------------------------------------------------------------------------------------ answers


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_names_every_command(words, capsys):
    assert start(*words) == 0
    printed = capsys.readouterr().out
    for command in ("pretrain", "evaluate", "inspect"):
        assert re.search(rf"^  {command} +\w", printed, re.MULTILINE)
    assert "hf-mae pretrain --recipe quickstart" in printed


def test_help_and_typing_errors_answer_before_anything_heavy_is_imported(tmp_path):
    # As the script that pip makes: what counts is its name.
    script = tmp_path / "hf-mae"
    script.write_text(
        "import sys\n"
        "from hf_mae.cli import main\n"
        "codes = main(['--help']), main([]), main(['--version']), main(['pretrian'])\n"
        "print(codes, sorted({'torch', 'transformers', 'numpy', 'yaml'} & sys.modules.keys()))\n"
    )
    result = subprocess.run([sys.executable, script], env=environment(), capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "(0, 0, 0, 2) []"
    assert result.stderr == "hf-mae: error: unknown command 'pretrian'; did you mean 'pretrain'?\n"


# Words of a command line that must be answered at once -> exit code.
AT_ONCE = [
    *((("--help",), 0), (("evaluate", "--help"), 0), (("evaluate",), 2), (("evaluate", "knnn"), 2)),
    *(((*name.split(), "--help"), 0) for name in COMMANDS),
    *(((*name.split(), "--no_such_key", "1"), 2) for name in COMMANDS),
    *((("pretrain", "--seed", "one"), 2), (("pretrain", "--blr", "-1"), 2), (("pretrain", "--recipe", "quikstart"), 2)),
    *((("finetune",), 2), (("prepare", "SRC"), 2), (("convert", "SRC", "DST", "--to", "gguf"), 2)),
]


def test_help_and_mistakes_of_every_command_answer_without_torch(tmp_path):
    script = tmp_path / "hf-mae"
    script.write_text(
        "import sys\n"
        "from hf_mae.cli import main\n"
        f"for words, expected in {AT_ONCE}:\n"
        "    try:\n"
        "        code = main(list(words))\n"
        "    except SystemExit as ended:\n"
        "        code = ended.code\n"
        "    if code != expected:\n"
        "        print('CODE', code, words)\n"
        "print('HEAVY', sorted({'torch', 'transformers', 'numpy', 'datasets'} & sys.modules.keys()))\n"
    )
    result = subprocess.run([sys.executable, script], env=environment(), capture_output=True, text=True, check=True)
    assert "CODE" not in result.stdout
    assert result.stdout.splitlines()[-1] == "HEAVY []"
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "words", [["--help"], ["pretrain", "--help"], ["evaluate", "knn", "--help"], ["pretrian"], ["pretrain", "--sed", 1]]
)
@pytest.mark.parametrize("program", ["script", "module"])
def test_help_and_mistakes_take_little_time(words, program, tmp_path):
    script = tmp_path / "hf-mae"
    script.write_text("import sys\nfrom hf_mae.cli import main\nsys.exit(main())\n")
    command = [sys.executable, *([script] if program == "script" else ["-m", "hf_mae.cli"]), *map(str, words)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, env=environment(), capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == (0 if "--help" in words else 2)
    # CPU time, which doesn't depend on what else the machine does; importing torch alone takes longer.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5


@pytest.mark.parametrize("words", [["evaluate", "--help"], ["evaluate", "-h"]])
def test_help_of_evaluate_lists_its_protocols(words, capsys):
    assert start(*words) == 0
    printed = capsys.readouterr().out
    for protocol in ("knn", "linear-probe", "classification"):
        assert re.search(rf"^  {protocol} +\w", printed, re.MULTILINE)


def test_a_program_called_with_the_name_of_the_command_line_registers_the_classes(tmp_path):
    (tmp_path / "program.py").write_text(
        "import hf_mae\nfrom transformers import AutoConfig\nprint(AutoConfig.for_model('mae').model_type)\n"
    )
    command = [sys.executable, "program.py", "hf_mae.cli"]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert result.stdout == "mae\n"


def test_version_is_the_packages(capsys):
    assert start("--version") == 0
    assert capsys.readouterr().out == f"{hf_mae.__version__}\n"


def test_help_of_pretrain_lists_every_key_of_recipes_and_models(capsys):
    with pytest.raises(SystemExit) as ended:
        start("pretrain", "--help")
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for key in fields(PretrainRecipe):
        assert re.search(rf"--{key.name}\b", printed), key.name
    assert {"hidden_size", "mask_ratio", "eval_mask_seed"} <= {key.name for key in fields(PretrainRecipe)}


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_recipe_of_the_package_can_be_started_on_other_data(tmp_path, recipe, capsys):
    pictures(tmp_path / "data")
    flat = ["--num_hidden_layers", 1, "--decoder_num_hidden_layers", 1]  # makes the huge one quickly
    assert start("pretrain", "--recipe", recipe, "--dataset", "data", "--dry_run", *flat) == 0
    printed = capsys.readouterr().out
    assert f"\n{recipe}: " in printed
    assert f"into outputs/{recipe}" in printed
    assert not (tmp_path / "outputs").exists()


def test_the_command_line_beats_a_recipe_file_which_beats_the_defaults(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("total_batch_size: 64\nblr: 1e-3\nmask_ratio: 0.75\nmixed_precision: no\n")
    words = arguments("out", total_batch_size=None, blr=None, dry_run=True, recipe="mine.yaml", mask_ratio=0.5)
    assert start(*words) == 0
    printed = capsys.readouterr().out
    assert "12 steps of 64 images" in printed
    assert "precision no), lr 0.00025\n" in printed


# ------------------------------------------------------------------------------------------ mistakes

# Words of a command line -> words of the message.
TYPED = {
    "an unknown command": (["pretrian"], ["unknown command 'pretrian'", "did you mean 'pretrain'?"]),
    "a command like no other": (["xyzzy"], ["unknown command 'xyzzy'", "pretrain", "inspect"]),
    "an unknown recipe": (["pretrain", "--recipe", "quikstart"], ["'quikstart'", "did you mean 'quickstart'?"]),
    "a recipe file that is not there": (["pretrain", "--recipe", "my.yaml"], ["recipe 'my.yaml'", ".yaml file"]),
    "an unknown flag": (["pretrain", "--total_stpes", "3"], ["'--total_stpes'", "did you mean '--total_steps'?"]),
    "an unknown flag with =": (["pretrain", "--mask_rate=0.5"], ["'--mask_rate=0.5'", "'--mask_ratio'"]),
    "a flag cut short": (["pretrain", "--total_s", "3"], ["'--total_s'", "did you mean"]),
    "a word too many": (["pretrain", "digits"], ["'digits' has no key", "--key digits"]),
    "an unknown flag of inspect": (["inspect", "--dataste", "digits"], ["did you mean '--dataset'?"]),
    "no number": (["pretrain", "--total_steps", "many"], ["--total_steps", "'many'"]),
    "no value": (["pretrain", "--total_steps"], ["--total_steps", "expected one argument"]),
    "none of the choices": (["pretrain", "--model_size", "giant"], ["'giant'", "huge"]),
    "neither true nor false": (["pretrain", "--flip", "perhaps"], ["--flip", "perhaps"]),
    "evaluate without a protocol": (["evaluate"], ["knn", "linear-probe"]),
    "an unknown protocol": (["evaluate", "linear_probe"], ["'linear_probe'", "did you mean 'linear-probe'?"]),
    "a missing folder": (["convert", "model.pth"], ["--output_dir is missing", "folder to write"]),
    "a missing model": (["finetune"], ["--model is missing", "folder or Hub id"]),
}


@pytest.mark.parametrize("words", TYPED.values(), ids=TYPED.keys())
def test_what_was_mistyped_is_named_in_one_line(mistake, words):
    message = mistake(*words[0])
    assert [word for word in words[1] if word not in message] == []


# Keys of a tiny run on digits -> words of the message.
IMPOSSIBLE = {
    "no steps": ({"total_steps": 0}, ["total_steps 0", "in [1, 1000000000]"]),
    "no mask left": ({"mask_ratio": 1}, ["mask_ratio 1", "[0, 1)"]),
    "no patch masked": ({"mask_ratio": 0}, ["mask_ratio 0.0", "none of the 16 patches", "use e.g. 0.75"]),
    "all but a patch masked": ({"mask_ratio": 0.99}, ["mask_ratio 0.99", "16 patches", "use 0.937 or less"]),
    "a mask that is a word": ({"mask_ratio": "most"}, ["mask_ratio", "most"]),
    "sizes that don't divide": ({"image_size": 225, "patch_size": 16}, ["225x225", "16x16", "224x224"]),
    "heads that don't divide": ({"num_attention_heads": 3}, ["hidden_size 32", "num_attention_heads 3"]),
    "an activation that isn't": ({"hidden_act": "gleu"}, ["gleu"]),
    "an attention that isn't": ({"attn_implementation": "eagre"}, ["eagre", "sdpa"]),
    "a remainder": ({"total_batch_size": 36, "per_device_batch_size": 8}, ["36", "8 x 1 processes", "9, 12, 18, 36"]),
    "negative workers": ({"num_workers": -1}, ["num_workers -1"]),
    "negative samples": ({"max_samples": -1}, ["max_samples -1"]),
    "more streams than images": ({"max_samples": 3, "num_workers": 4}, ["3 images", "--num_workers"]),
    "a crop from large to small": ({"crop_scale": [0.9, 0.5]}, ["crop_scale [0.9, 0.5]", "smallest <= largest"]),
    "two means for one": ({"image_mean": [0.5, 0.5], "image_std": [1, 1]}, ["image_mean", "2 numbers", "1 channel"]),
    "one checkpoint only": ({"keep_checkpoints": 1}, ["keep_checkpoints 1", "2 or more"]),
    "a tracker that isn't": ({"log_with": "wandbb"}, ["log_with wandbb", "tensorboard"]),
    "half precision on a CPU": ({"mixed_precision": "fp16"}, ["fp16", "GPU", "bf16"]),
    "a folder that isn't": ({"dataset": "./nowhere"}, ["no file or folder ./nowhere"]),
    "a name that is nothing": ({"dataset": "nowhere"}, ["nowhere", "digits", "check the name"]),
    "a pattern without files": ({"dataset": "shard-{000..002}.tar"}, ["shard-000.tar"]),
    "a split that isn't": ({"split": "tset"}, ["no split 'tset'", "train"]),
    "an evaluation split that isn't": ({"eval_split": "tset"}, ["no split 'tset'", "train"]),
    "all images held out": ({"eval_fraction": 0.9999999}, ["1797 rows", "eval_fraction 0.9999999", "--eval_dataset"]),
    "two ways to evaluate": ({"eval_fraction": 0.1, "eval_split": "train"}, ["eval_split is train; leave out one"]),
    "evaluation data that isn't": ({"eval_dataset": "./nowhere"}, ["./nowhere"]),
    "a model that isn't": ({"model": "./nowhere"}, ["--model ./nowhere can't be loaded"]),
    "a checkpoint that isn't": ({"resume": "nowhere/checkpoint-3"}, ["nowhere/checkpoint-3", "not a complete"]),
}  # fmt: skip


@pytest.mark.parametrize("case", IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
def test_what_cannot_be_is_named_in_one_line_and_writes_nothing(mistake, tmp_path, case):
    keys, words = case
    message = mistake(*arguments("out", **keys))
    assert [word for word in words if word not in message] == []
    assert not (tmp_path / "out").exists()


FILES = {
    "an unknown key": ("total_stpes: 3", ["unknown key 'total_stpes'", "mine.yaml", "did you mean 'total_steps'?"]),
    "a key of another command": ("protocol: knn", ["unknown key 'protocol'"]),
    "half a step": ("total_steps: 12.5", ["total_steps", "12.5"]),
    "a word for a number": ("blr: fast", ["blr", "fast"]),
    "none of the choices": ("model_size: giant", ["model_size", "giant"]),
    "a list": ("- total_steps", ["mine.yaml", "not a table of keys"]),
    "no YAML": ("crop_scale: [0.2", ["mine.yaml", "not YAML"]),
}


@pytest.mark.parametrize("case", FILES.values(), ids=FILES.keys())
def test_what_is_wrong_with_a_recipe_file_is_named_in_one_line(mistake, tmp_path, case):
    text, words = case
    (tmp_path / "mine.yaml").write_text(f"{text}\n")
    message = mistake("pretrain", "--recipe", "mine.yaml", "--dry_run")
    assert [word for word in words if word not in message] == []


def test_data_without_images_is_named_with_what_would_be_images(mistake, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.txt").write_text("one")
    message = mistake(*arguments("out", dataset="texts"))
    assert "no images in texts" in message
    assert ".png" in message
    datasets.Dataset.from_dict({"price": [1, 2], "weight": [0.5, 0.25]}).to_parquet("numbers.parquet")
    message = mistake(*arguments("out", dataset="numbers.parquet"))
    assert "no column of images among price, weight" in message
    assert "--image_column" in message


def test_another_channel_count_than_the_datas_is_named_with_the_right_one(tmp_path, mistake, capfd):
    tiles(tmp_path / "tiles")
    assert "13 channels, but num_channels is 3; pass --num_channels 13" in mistake(
        *arguments("out", dataset="tiles", num_channels=3)
    )
    assert start("inspect", "tiles", "--num_channels", 3) == 0
    assert "can't be decoded: WrongChannels" in capfd.readouterr().out
    pictures(tmp_path / "pictures")
    assert "3 channels, but num_channels is 13; pass --num_channels 3" in mistake(
        *arguments("out", dataset="pictures", num_channels=13)
    )


def test_an_output_folder_that_holds_another_run_is_left_as_it_is(mistake, tmp_path):
    run("out", total_steps=2)
    before = tree("out")
    message = mistake(*arguments("out", total_steps=2, seed=1))
    assert "out holds another run" in message
    assert "--resume auto" in message
    assert "--output_dir" in message
    assert tree("out") == before
    (tmp_path / "file").touch()
    assert "file is not a folder" in mistake(*arguments("file"))


@pytest.mark.parametrize(
    ("key", "value", "old"),
    [("mask_ratio", 0.75, 0.5), ("total_steps", 5, 2), ("flip", False, True), ("norm_pix_loss", True, None)],
)
def test_a_run_does_not_go_on_with_another_recipe(mistake, key, value, old):
    run("out", total_steps=2, save_steps=1)
    before = tree("out")
    message = mistake(*arguments("out", **{"total_steps": 2, "save_steps": 1, key: value, "resume": "auto"}))
    assert f"out/checkpoint-2 belongs to a run with {key} {old}, not {value}" in message
    assert tree("out") == before


def test_a_run_goes_on_with_keys_that_only_say_how_it_is_computed_and_shown(capsys):
    run("out", total_steps=2, save_steps=1)
    run(
        "out", total_steps=2, save_steps=2, resume="auto", num_workers=1, per_device_batch_size=8, log_steps=2,
        eval_steps=1, keep_checkpoints=3, mixed_precision="bf16", attn_implementation="eager", max_bad_fraction=0.5,
        gradient_checkpointing=True,
    )  # fmt: skip
    assert "continuing from out/checkpoint-2" in capsys.readouterr().out


def test_a_run_does_not_go_on_with_other_data(mistake, tmp_path):
    pictures(tmp_path / "data")
    options = {"dataset": "data", "total_steps": 2, "save_steps": 1}
    run("out", **options)
    Image.new("RGB", (12, 12)).save("data/one more.png")
    message = mistake(*arguments("out", resume="auto", **options))
    assert "data is not the data that this run was trained on" in message
    assert "--allow_data_change true" in message
    (tmp_path / "data" / "one more.png").unlink()
    run("out", resume="auto", **options)


def test_a_run_goes_on_with_changed_data_where_the_user_says_so(tmp_path, caplog):
    pictures(tmp_path / "data")
    options = {"dataset": "data", "total_steps": 4, "save_steps": 2}
    run("out", **options)
    shutil.rmtree("out/checkpoint-4")
    Image.new("RGB", (12, 12)).save("data/one more.png")
    run("out", resume="auto", allow_data_change=True, **options)
    assert "continuing with it, in a different order of samples from here on" in caplog.text
    assert [event["step"] for event in events("out") if "loss" in event] == [1, 2, 3, 4]


def test_a_data_set_that_was_moved_is_the_same_one(tmp_path):
    pictures(tmp_path / "data")
    options = {"total_steps": 4, "save_steps": 2}
    run("whole", dataset="data", **options)
    shutil.copytree("whole/checkpoint-2", "out/checkpoint-2")
    (tmp_path / "data").rename("elsewhere")
    run("out", dataset="elsewhere", resume="auto", **options)
    assert weights_hash("out") == weights_hash("whole")


def test_where_all_checkpoints_are_broken_the_run_does_not_start_anew(mistake, tmp_path):
    run("out", total_steps=2, save_steps=1)
    for checkpoint in ("checkpoint-1", "checkpoint-2"):
        (tmp_path / "out" / checkpoint / "data.json").write_text("{}")
    before = tree("out")
    result = start(*arguments("out", total_steps=2, save_steps=1, resume="auto"))
    assert result == 2
    assert tree("out") == before


def test_a_start_that_failed_can_be_corrected(mistake):
    message = mistake(*arguments("out", image_mean=[0.5, 0.5], image_std=[0.5, 0.5]))
    assert "image_mean has 2 numbers for 1 channels" in message
    run("out", total_steps=2, save_steps=1)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("blr", "nan"), ("blr", -1e-3), ("blr", "inf"), ("adam_beta1", 1.5), ("adam_beta2", 1.0), ("weight_decay", -1),
        ("max_bad_fraction", 1.1), ("clip_grad", -1), ("warmup_steps", -3), ("min_lr", -1),
    ],
)  # fmt: skip
def test_numbers_that_no_run_can_have_are_named(mistake, key, value):
    shown = value if key == "warmup_steps" else float(value)
    assert f"{key} {shown} is out of range; give a number" in mistake(*arguments("out", **{key: value}))


def test_a_broken_checkpoint_that_is_asked_for_by_name_is_not_gone_on_from(mistake, tmp_path):
    run("out", total_steps=2, save_steps=1)
    weights = tmp_path / "out" / "checkpoint-1" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    message = mistake(*arguments("other", total_steps=2, resume="out/checkpoint-1"))
    assert "out/checkpoint-1/model.safetensors is not what was saved" in message
    weights.unlink()
    message = mistake(*arguments("other", total_steps=2, resume="out/checkpoint-1"))
    assert "out/checkpoint-1/model.safetensors is missing" in message
    # A folder of a run is not one of its checkpoints.
    assert "not a complete checkpoint" in mistake(*arguments("other", total_steps=2, resume="out"))
    assert not (tmp_path / "other").exists()


# ------------------------------------------------------------------------------------------ missing packages


def test_a_package_of_an_extra_that_is_missing_is_named_with_the_extra(mistake, monkeypatch, tmp_path):
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "accelerate", None)
        for module in ("devices", "build", "pretrain", "log"):
            without.delitem(sys.modules, f"hf_mae.training.{module}", raising=False)
        message = mistake(*arguments("out"))
    assert message == "hf-mae pretrain needs the package accelerate: pip install 'hf-mae[train]'"
    datasets.Dataset.from_dict({"a": [1]}).to_parquet("numbers.parquet")
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = mistake(*arguments("out", dataset="numbers.parquet"))
    assert "needs the package datasets: pip install 'hf-mae[train]'" in message


def test_a_file_format_whose_package_is_missing_is_named_with_the_package(mistake, monkeypatch, tmp_path):
    tifffile = pytest.importorskip("tifffile")
    (tmp_path / "tiles").mkdir()
    for number in range(40):
        tifffile.imwrite(f"tiles/{number}.tif", np.zeros((8, 8, 7), np.uint16), photometric="minisblack")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    assert "pip install tifffile" in mistake(*arguments("out", dataset="tiles"))


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_a_model_of_transformers_is_answered_with_the_command_that_converts_it(mistake, tmp_path, command):
    peer = ViTMAEConfig(**{**TINY, "image_size": 8, "patch_size": 2, "num_channels": 1})
    ViTMAEForPreTraining(peer).save_pretrained("peer")
    message = mistake(command, "--model", "peer", "--dataset", "digits", "--output_dir", "out", "--num_workers", 0)
    assert message.startswith("--model peer can't be loaded: ")
    assert message.endswith("peer is a model of type vit_mae, not mae; convert it: hf-mae convert peer FOLDER")
    assert "attn" not in message


@pytest.mark.parametrize(
    ("command", "remedy"),
    [
        ("pretrain", "continue with --resume auto"),
        ("finetune", "continue with --resume auto"),
        ("push", "repeat the command to finish the upload"),
        ("convert", "repeat the command to start again"),
    ],
)
def test_an_interruption_says_what_to_do_for_that_command(command, remedy, monkeypatch, capsys):
    def interrupted(recipe):
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, command, replace(COMMANDS[command], run=interrupted))
    required = {"finetune": ["--model", "m"], "push": ["m", "--repo_id", "user/m"], "convert": ["m", "out"]}
    assert start(command, *required.get(command, [])) == 130
    assert capsys.readouterr().err == f"hf-mae: error: interrupted; {remedy}\n"


def test_convert_loads_nothing_of_training():
    code = (
        "import sys; from hf_mae.cli import main; status = main(['convert', 'nowhere.pth', 'out'])\n"
        "print(status, sorted(name for name in sys.modules if name.startswith(('hf_mae.training', 'hf_mae.data.'))))"
    )
    result = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert result.stdout == "2 ['hf_mae.data.transform']\n"  # the crop rule
    assert result.stderr.endswith("hf-mae: error: there is no file or folder nowhere.pth; check the path\n")


@pytest.mark.slow
@pytest.mark.parametrize("package", ["accelerate", "datasets", "sklearn"])
def test_a_process_without_a_package_of_an_extra_ends_with_one_line(tmp_path, package):
    script = tmp_path / "hf-mae"
    script.write_text(
        f"import sys\nsys.modules[{package!r}] = None\nfrom hf_mae.cli import main\nsys.exit(main(sys.argv[1:]))\n"
    )
    (tmp_path / "data").mkdir()
    dataset = "digits" if package == "sklearn" else "numbers.parquet"
    datasets.Dataset.from_dict({"a": [1]}).to_parquet("numbers.parquet")
    result = subprocess.run(
        [sys.executable, script, *arguments("out", dataset=dataset)], env=environment(), capture_output=True, text=True
    )
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("hf-mae: error: ")
    assert "pip install 'hf-mae[train]'" in line


@pytest.mark.slow
def test_the_commands_of_the_readme_for_a_first_run_work(tmp_path):
    """The quickstart recipe as it is, cut to a few steps; started as a module, as torchrun starts it."""
    command = [sys.executable, "-m", "hf_mae.cli", "pretrain", "--recipe", "quickstart", "--total_steps", "20"]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert "outputs/quickstart" in result.stdout.splitlines()[-1]
    load = result.stdout.splitlines()[-1].removeprefix("load it  ")
    subprocess.run([sys.executable, "-c", load], env=environment(), check=True)
    assert (REPOSITORY / "hf_mae" / "recipes" / "quickstart.yaml").is_file()
    assert TINY_RUN["dataset"] == "digits"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("finetune --model a --seed 4294967296", "seed 4294967296 is out of range"),
        ("finetune --model a --eval_crop_pct 1e-300", "eval_crop_pct 1e-300 is out of range"),
        ("evaluate linear-probe --model a --dataset d --seed 4294967296", "seed 4294967296 is out of range"),
        ("evaluate linear-probe --model a --dataset d --epochs nan", "epochs nan is out of range"),
        ("evaluate linear-probe --model a --dataset d --epochs 1e300", "epochs 1e+300 is out of range"),
        ("evaluate linear-probe --model a --dataset d --min_lr nan", "min_lr nan is out of range"),
        ("evaluate knn --model a --dataset d --temperature nan", "temperature nan is out of range"),
        ("evaluate knn --model a --dataset d --temperature inf", "temperature inf is out of range"),
        ("evaluate knn --model a --dataset d --k 5 0", "k [5, 0] is too small"),
        ("reconstruct a.png --model a --cell 99999999", "cell 99999999 is out of range; give a number in [16, 2048]"),
        ("reconstruct a.png --model a --seed 4294967296", "seed 4294967296 is out of range"),
        ("convert a b --image_size 0", "image_size 0 is too small; give 1 or more"),
        ("convert a b --image_size 0x8", "image_size [0, 8] is too small"),
        ("convert a b --num_channels 0", "num_channels 0 is too small"),
        ("convert a b --num_attention_heads 0", "num_attention_heads 0 is too small"),
        ("inspect d --max_samples 0", "max_samples 0 is too small"),
        ("demo --model a --port 99999", "port 99999 is out of range"),
        ("card a ''", "--output '' is not a single word"),
        ("card a /", "output / is not a .md file; change its ending"),
        ("report a --output ''", "--output '' is not a single word"),
    ],
)
def test_a_value_that_no_command_can_use_is_one_line(words, message, capsys):
    assert main(shlex.split(words)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize("words", [["--help"], ["evaluate", "--help"], ["pretrain", "--help"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_stops_early_is_no_error(words, unbuffered):
    read, write = os.pipe()
    os.close(read)
    command, env = [sys.executable, "-m", "hf_mae.cli", *words], environment(PYTHONUNBUFFERED=unbuffered)
    process = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=env)
    os.close(write)
    assert (process.returncode, process.stderr) == (0, "")

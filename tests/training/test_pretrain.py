"""`hf-mae pretrain` from the first line it prints to the last file it writes, with tiny models on real data."""

import math
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from runs import TINY_RUN, evaluations, events, losses, run, tree, weights_hash
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForPreTraining

from hf_mae import MAEForPreTraining, MAEModel

pytestmark = pytest.mark.usefixtures("own_caches", "no_process_is_left")


def test_a_run_leaves_a_model_its_numbers_its_picture_and_its_two_newest_checkpoints(finished):
    assert {path.name for path in finished.iterdir()} == {
        "config.json", "model.safetensors", "preprocessor_config.json", "run_config.yaml", "metrics.jsonl",
        "reconstructions", "checkpoint-9", "checkpoint-12",
    }  # fmt: skip
    assert {path.name for path in (finished / "reconstructions").iterdir()} == {
        "step-0.png", "step-5.png", "step-10.png", "step-12.png", "all.webp",
    }  # fmt: skip
    for folder in (finished / "checkpoint-9", finished / "checkpoint-12"):
        assert {path.name for path in folder.iterdir()} == {
            "config.json", "model.safetensors", "preprocessor_config.json", "optimizer.safetensors", "trainer.json",
            "data.json", "COMPLETE",
        }  # fmt: skip
    assert weights_hash(finished / "checkpoint-12") == weights_hash(finished) != weights_hash(finished / "checkpoint-9")


def test_every_file_of_a_run_is_as_readable_as_the_users_other_files(finished, tmp_path):
    (tmp_path / "another").touch()
    usual = stat.S_IMODE((tmp_path / "another").stat().st_mode)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in finished.rglob("*") if path.is_file()}
    assert {path: mode for path, mode in modes.items() if mode != usual} == {}


@pytest.mark.slow
def test_the_quality_of_the_features_is_measured_now_and_then_and_changes_nothing(finished, tmp_path, capfd):
    output_dir = run(tmp_path / "run", save_steps=3, quality_steps=5, quality_samples=300)
    measured = {event["step"]: event for event in events(output_dir) if "rankme" in event}
    assert list(measured) == [0, 5, 10, 12]
    assert all(0 < event["knn_top1"] < 100 and 0 < event["linear_top1"] <= 100 for event in measured.values())
    assert all(1 <= event["rankme"] <= 32 for event in measured.values())
    assert weights_hash(output_dir) == weights_hash(finished)
    last = measured[12]
    said = f"features kNN {last['knn_top1']:.1f} %, linear {last['linear_top1']:.1f} %, RankMe {last['rankme']:.1f}"
    assert said in capfd.readouterr().out
    # A run that goes on has measured before.
    shutil.copytree(output_dir / "checkpoint-9", tmp_path / "other" / "checkpoint-9")
    shutil.copy(output_dir / "metrics.jsonl", tmp_path / "other")
    run(tmp_path / "other", resume="auto", save_steps=3, quality_steps=5, quality_samples=300)
    assert {event["step"]: event for event in events(tmp_path / "other") if "rankme" in event} == measured


def test_the_resolved_recipe_is_saved_with_what_was_derived_from_it(finished):
    config = yaml.safe_load((finished / "run_config.yaml").read_text())
    for key, value in TINY_RUN.items():
        assert config["recipe"][key] == (value if key not in ("save_steps", "eval_steps") else config["recipe"][key])
    assert config["recipe"]["save_steps"] == 3
    assert config["recipe"]["weight_decay"] == 0.05  # a default
    assert "model_config" not in config["recipe"]  # its keys are there themselves
    derived = config["derived"]
    assert derived["torch"] == torch.__version__
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    assert derived["hardware"] == names[0]
    assert (derived["processes"], derived["strategy"], derived["grad_accum_steps"]) == (1, "one process", 1)
    assert derived["training_images"] + derived["evaluation_images"] == 1797
    assert derived["lr"] == pytest.approx(1e-3)
    assert "held out" in derived["evaluated_on"]


@pytest.mark.parametrize("folder", [".", "checkpoint-9", "checkpoint-12"])
def test_auto_classes_load_the_run_and_each_of_its_checkpoints(finished, folder):
    weights = load_file(finished / folder / "model.safetensors")
    encoder = AutoModel.from_pretrained(finished / folder)
    assert type(encoder) is MAEModel
    whole, report = AutoModelForPreTraining.from_pretrained(finished / folder, output_loading_info=True)
    assert type(whole) is MAEForPreTraining
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in whole.state_dict().items())
    assert all(torch.equal(tensor, weights[f"mae.{name}"]) for name, tensor in encoder.state_dict().items())
    processor = AutoImageProcessor.from_pretrained(finished / folder)
    digit = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    output = encoder(**processor(digit, return_tensors="pt"))
    assert output.last_hidden_state.shape == (1, 17, 32)


def test_the_end_names_losses_model_and_picture_and_a_line_of_python_that_works(finished_and_printed):
    output_dir, printed = finished_and_printed
    lines = printed.splitlines()
    losses_line, model, picture, load = lines[-4:]
    found = evaluations(output_dir)
    assert losses_line == f"evaluation loss {found[0]:.4f} before step 1, {found[12]:.4f} after step 12"
    assert model == f"model    {output_dir}"
    assert picture == f"picture  {output_dir / 'reconstructions' / 'step-12.png'}"
    names: dict = {}
    exec(load.removeprefix("load it  "), names)
    assert type(names["model"]) is MAEModel
    weight = load_file(output_dir / "model.safetensors")["mae.norm.weight"]
    assert torch.equal(names["model"].state_dict()["norm.weight"], weight)
    assert lines[0].startswith("data     digits (only one split): 1,705 images of split train, evaluated on 92 images")
    assert lines[1] == "images   1 channel of 8 bits (uint8), 8 x 8 pixels, used at 8 x 8"
    assert lines[2] == f"pretrain: 4 x 4 patches, 0.0 M parameters, from scratch, into {output_dir}"
    assert lines[3].startswith("12 steps of 32 images = 1 process x 1 x 32 (one process, cpu, precision no), lr ")


def test_the_loss_falls_below_that_of_predicting_the_mean(tmp_path):
    output_dir = run(
        tmp_path / "run", total_steps=90, warmup_steps=10, blr=24e-3, eval_steps=90, save_steps=90, log_steps=10
    )
    # Pixels are normalised: a model that predicts their mean has a loss of 1.
    assert evaluations(output_dir)[0] > 1.5
    assert evaluations(output_dir)[90] < 0.8
    assert losses(output_dir)[90] < 0.8
    trained = MAEForPreTraining.from_pretrained(output_dir)
    assert all(torch.isfinite(tensor).all() for tensor in trained.state_dict().values())


def test_the_same_seed_gives_the_same_run_and_another_seed_another(finished, tmp_path):
    assert weights_hash(run(tmp_path / "same", save_steps=3, eval_steps=5)) == weights_hash(finished)
    other = run(tmp_path / "other", seed=1, total_steps=2)
    assert evaluations(other)[0] != evaluations(finished)[0]


def test_a_dry_run_says_what_would_happen_and_writes_nothing(tmp_path, capfd):
    before = tree(tmp_path)
    run(tmp_path / "run", dry_run=True, log_with="tensorboard", dataset="digits")
    assert "12 steps of 32 images" in capfd.readouterr().out
    assert not (tmp_path / "run").exists()
    assert tree(tmp_path) == before


# ------------------------------------------------------------------------------------------ from another model


def test_a_pretrained_model_is_trained_on_at_another_size_and_channel_count(finished, tmp_path):
    # The learning rate of the first step is 0: what one step leaves is what the run started from.
    output_dir = run(tmp_path / "run", model=finished, image_size="16x12", num_channels=3, total_steps=1)
    before, after = (load_file(folder / "model.safetensors") for folder in (finished, output_dir))
    reshaped = {name for name in before if before[name].shape != after[name].shape}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in reshaped} == {
        "patch_embed", "position_embeddings", "decoder_pred", "decoder_pos_embed",
    }  # fmt: skip
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - reshaped)
    config = AutoModel.from_pretrained(output_dir).config
    assert (config.image_height_width, config.num_channels) == ((16, 12), 3)
    assert math.isfinite(losses(output_dir)[1])
    assert AutoImageProcessor.from_pretrained(output_dir).crop_size.width == 12


def test_continued_pretraining_starts_where_the_other_run_ended(finished, tmp_path):
    output_dir = run(tmp_path / "run", model=finished, total_steps=2, hidden_size=None, seed=5)
    # The evaluation masks and images are fixed, whatever the seed.
    assert evaluations(output_dir)[0] == pytest.approx(evaluations(finished)[12], rel=1e-6)

"""`hf-mae pretrain` from the first line it prints to the last file it writes, with tiny models on real data."""

import contextlib
import io
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from PIL import Image
from runs import (
    TINY_RUN,
    arguments,
    checkpoints,
    environment,
    evaluations,
    events,
    load_pretrain_recipe,
    losses,
    run,
    spawn,
    start,
    tree,
    wait_for_step,
    weights_difference,
    weights_hash,
)
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForPreTraining

import hf_mae.data.loader
from hf_mae import MAEForPreTraining, MAEImageProcessorPil, MAEModel
from hf_mae.data.sources import DataError
from hf_mae.errors import MissingPackage
from hf_mae.training.log import RunLog, Stopwatch
from hf_mae.training.pretrain import PretrainRun
from hf_mae.visualize.grid import with_title

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    """What `datasets` prepares stays with the test, and its bars out of the messages."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def no_process_is_left():
    yield
    left = multiprocessing.active_children()
    for process in left:
        process.kill()  # they ignore the SIGTERM by which this process would end them, and then wait for ever
    assert left == []


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A run of 12 steps that was left alone, and what it printed."""
    output_dir = tmp_path_factory.mktemp("runs") / "it's a run"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        run(output_dir, save_steps=3, eval_steps=5)
    return output_dir, printed.getvalue()


@pytest.fixture(scope="module")
def finished(told):
    return told[0]


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """The same run, with all of its checkpoints."""
    return run(tmp_path_factory.mktemp("stages") / "run", save_steps=3, eval_steps=5, keep_checkpoints=9)


def cut_off(whole: Path, step: int, output_dir: Path) -> Path:
    """The folder of a run as it was when it was killed after this step's checkpoint and before the next."""
    shutil.copytree(whole, output_dir)
    for later in checkpoints(output_dir):
        if later > step:
            shutil.rmtree(output_dir / f"checkpoint-{later}")
    for name in ("model.safetensors", "config.json", "preprocessor_config.json"):
        (output_dir / name).unlink()
    return output_dir


# ------------------------------------------------------------------------------------------ what a run leaves


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


def test_metrics_begin_with_an_evaluation_and_name_all_numbers_of_every_logged_step(finished):
    first, *others = events(finished)
    assert first.keys() == {"step", "eval_loss"}
    assert first["step"] == 0
    steps = [event for event in others if "loss" in event]
    assert [event["step"] for event in steps] == list(range(1, 13))
    wanted = {"step", "images_seen", "epoch", "loss", "lr", "grad_norm", "images_per_second", "data_wait"}
    for event in steps:
        assert event.keys() == wanted
        assert all(math.isfinite(value) for value in event.values())
        assert event["images_seen"] == 32 * event["step"]
        assert event["epoch"] == pytest.approx(event["images_seen"] / 1705)
        assert 0 <= event["data_wait"] <= 1
        assert event["images_per_second"] > 0
        assert event["grad_norm"] > 0
    # blr 8e-3 for 32 of 256 images: up in two steps, down half a cosine of ten.
    cosine = [0.5 * (1 + math.cos(math.pi * step / 10)) for step in range(10)]
    assert [event["lr"] for event in steps] == pytest.approx([0, 0.5e-3, *(1e-3 * share for share in cosine)])
    assert list(evaluations(finished)) == [0, 5, 10, 12]


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


def test_speed_counts_all_of_the_training_and_neither_evaluations_nor_saving(monkeypatch):
    now = 100.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    watch = Stopwatch()
    now += 2
    with watch.stopped():
        now += 50
    now += 1
    watch.waiting(1.5)
    assert watch.read() == (3.0, 0.5)
    now += 4
    assert watch.read() == (4.0, 0.0)


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


def test_the_picture_opens_and_shows_four_columns_that_differ(finished):
    with Image.open(finished / "reconstructions" / "step-12.png") as picture:
        pixels = np.asarray(picture.convert("L"), dtype=np.float32)
    assert min(pixels.shape) > 128
    # Twelve digits in six rows of two, each in cells of 128 pixels with margins of 6, under a title of 22.
    original, masked, predicted, pasted = (pixels[22:150, 6 + 134 * n : 134 + 134 * n] for n in range(4))
    for cell in (original, masked, predicted, pasted):
        assert cell.std() > 10
    gray = (masked == 128) | (masked == 127)
    assert gray.mean() == pytest.approx(0.5, abs=0.01)  # half of the patches are removed
    assert np.array_equal(original[~gray], masked[~gray])
    assert np.array_equal(predicted[gray], pasted[gray])
    assert np.abs(original - pasted)[~gray].max() <= 1
    assert np.abs(original - pasted)[gray].mean() > 1


def test_every_evaluation_shows_the_same_images_behind_the_same_masks(finished):
    pictures = []
    for step in (0, 5, 10, 12):
        with Image.open(finished / "reconstructions" / f"step-{step}.png") as picture:
            pictures.append(np.asarray(picture))
    shown, predicted = np.s_[:, 6:268], np.s_[:, 274:536]
    assert all(np.array_equal(picture[shown], pictures[0][shown]) for picture in pictures)
    assert all(not np.array_equal(a[predicted], b[predicted]) for a, b in itertools.pairwise(pictures))


def test_the_animation_shows_every_picture_with_its_step(finished):
    with Image.open(finished / "reconstructions" / "all.webp") as animation:
        assert animation.n_frames == 4
        for number, step in enumerate((0, 5, 10, 12)):
            animation.seek(number)
            with Image.open(finished / "reconstructions" / f"step-{step}.png") as picture:
                expected = with_title(picture, f"after step {step}").convert("RGB")
            difference = np.abs(np.asarray(animation.convert("RGB"), int) - np.asarray(expected, int))
            assert difference.mean() < 6  # WebP's loss


def test_pictures_of_a_run_that_started_anew_or_went_on_are_its_own(stages, tmp_path):
    output_dir = cut_off(stages, 6, tmp_path / "run")
    stale = output_dir / "reconstructions" / "step-7.png"
    Image.new("RGB", (4, 4)).save(stale)
    run(output_dir, save_steps=3, eval_steps=5, keep_checkpoints=9, resume="auto")
    names = {"step-0.png", "step-5.png", "step-10.png", "step-12.png", "all.webp"}
    assert {path.name for path in (output_dir / "reconstructions").iterdir()} == names
    for name in names:
        assert (output_dir / "reconstructions" / name).read_bytes() == (stages / "reconstructions" / name).read_bytes()


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


def test_the_end_names_losses_model_and_picture_and_a_line_of_python_that_works(told):
    output_dir, printed = told
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
    assert lines[0].startswith("pretrain: 1,705 images of digits, 1 x 8 x 8 uint8, 4 x 4 patches")
    assert "12 steps of 32 images = 1 process x 1 x 32 (one process, cpu" in lines[1]


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


def test_tensorboard_gets_every_number_into_the_folder_of_the_run(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    output_dir = run(tmp_path / "run", log_with="tensorboard", total_steps=3)
    folders = {path.parent for path in output_dir.rglob("events.out.tfevents.*")}
    found: dict[str, dict[int, float]] = {}
    images = []
    for folder in folders:
        reader = accumulator.EventAccumulator(str(folder))
        reader.Reload()
        for tag in reader.Tags()["scalars"]:
            found.setdefault(tag, {}).update({event.step: event.value for event in reader.Scalars(tag)})
        images += [image for tag in reader.Tags()["images"] for image in reader.Images(tag)]
    assert found["loss"] == pytest.approx(losses(output_dir), rel=1e-6)
    assert found["eval_loss"] == pytest.approx(evaluations(output_dir), rel=1e-6)
    assert found["lr"].keys() == {1, 2, 3}
    assert {image.step for image in images} == {0, 3}
    for image in images:
        with (
            Image.open(output_dir / "reconstructions" / f"step-{image.step}.png") as picture,
            Image.open(io.BytesIO(image.encoded_image_string)) as shown,
        ):
            assert np.array_equal(np.asarray(picture), np.asarray(shown))


# ------------------------------------------------------------------------------------------ going on exactly


@pytest.mark.parametrize("step", [3, 6, 9])
def test_a_run_cut_off_after_a_checkpoint_ends_with_the_same_weights_and_numbers(stages, tmp_path, step):
    output_dir = cut_off(stages, step, tmp_path / "run")
    run(output_dir, save_steps=3, eval_steps=5, keep_checkpoints=9, resume="auto")
    assert weights_hash(output_dir) == weights_hash(stages)
    assert losses(output_dir) == losses(stages)
    assert evaluations(output_dir) == evaluations(stages)
    assert [event["step"] for event in events(output_dir)] == [event["step"] for event in events(stages)]
    assert checkpoints(output_dir) == [3, 6, 9, 12]


@pytest.mark.gpu
def test_a_deterministic_run_on_a_gpu_goes_on_bit_by_bit(tmp_path):
    options = {"deterministic": True, "mixed_precision": "bf16", "num_workers": 2, "save_steps": 3}
    whole = run(tmp_path / "whole", **options)
    shutil.copytree(whole / "checkpoint-9", tmp_path / "run" / "checkpoint-9")
    run(tmp_path / "run", resume="auto", **options)
    assert weights_hash(tmp_path / "run") == weights_hash(whole)


def test_a_run_goes_on_with_other_workers_and_micro_batches(stages, tmp_path):
    output_dir = cut_off(stages, 3, tmp_path / "run")
    shared = {"eval_steps": 5, "resume": "auto", "keep_checkpoints": 9}
    run(output_dir, save_steps=3, num_workers=2, **shared)
    assert weights_hash(output_dir) == weights_hash(stages)
    shutil.rmtree(output_dir / "checkpoint-12")
    shutil.rmtree(output_dir / "checkpoint-9")
    run(output_dir, save_steps=2, num_workers=1, per_device_batch_size=8, **shared)
    assert checkpoints(output_dir) == [3, 6, 8, 10, 12]
    assert losses(output_dir) == pytest.approx(losses(stages), rel=1e-6)
    assert evaluations(output_dir) == pytest.approx(evaluations(stages), rel=1e-6)
    assert weights_difference(output_dir, stages) < 1e-6


def test_a_named_checkpoint_is_gone_on_from_in_a_folder_of_its_own(stages, tmp_path):
    before = tree(stages)
    output_dir = run(tmp_path / "run", save_steps=6, eval_steps=5, resume=stages / "checkpoint-6")
    assert weights_hash(output_dir) == weights_hash(stages)
    assert losses(output_dir) == {step: loss for step, loss in losses(stages).items() if step > 6}
    assert tree(stages) == before


def test_a_broken_checkpoint_is_named_and_the_one_before_gone_on_from(stages, tmp_path, caplog):
    output_dir = cut_off(stages, 9, tmp_path / "run")
    broken = output_dir / "checkpoint-9" / "optimizer.safetensors"
    content = bytearray(broken.read_bytes())
    content[-5] ^= 1
    broken.write_bytes(content)
    run(output_dir, save_steps=3, eval_steps=5, keep_checkpoints=9, resume="auto")
    assert f"{broken} is not what was saved" in caplog.text
    assert weights_hash(output_dir) == weights_hash(stages)
    assert losses(output_dir) == losses(stages)


def test_a_run_killed_before_its_first_checkpoint_starts_anew(stages, tmp_path):
    output_dir = cut_off(stages, 0, tmp_path / "run")
    assert checkpoints(output_dir) == []
    run(output_dir, save_steps=3, eval_steps=5, keep_checkpoints=9, resume="auto")
    assert weights_hash(output_dir) == weights_hash(stages)
    assert [event["step"] for event in events(output_dir)] == [event["step"] for event in events(stages)]


def test_a_run_that_is_over_stays_as_it_is_when_it_is_started_again(stages, tmp_path, capfd):
    output_dir = tmp_path / "run"
    shutil.copytree(stages, output_dir)
    run(output_dir, save_steps=3, eval_steps=5, keep_checkpoints=9, resume="auto")
    assert weights_hash(output_dir) == weights_hash(stages)
    assert events(output_dir) == events(stages)
    assert "after step 12" in capfd.readouterr().out


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_the_step_that_is_under_way_and_the_run_goes_on_from_it(
    stages, tmp_path, monkeypatch, capfd, signal_number
):
    log_event = RunLog.event

    def event_and_signal(log, step, **numbers):
        log_event(log, step, **numbers)
        if step == 4:
            os.kill(os.getpid(), signal_number)

    before = signal.getsignal(signal_number)
    output_dir = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(RunLog, "event", event_and_signal)
        run(output_dir, save_steps=12, eval_steps=5, num_workers=2)
    assert signal.getsignal(signal_number) is before
    assert multiprocessing.active_children() == []
    assert checkpoints(output_dir) == [4]
    assert not (output_dir / "model.safetensors").exists()
    assert "stopped on request after step 4" in "".join(capfd.readouterr())
    run(output_dir, save_steps=12, eval_steps=5, resume="auto")
    assert weights_hash(output_dir) == weights_hash(stages)
    assert losses(output_dir) == losses(stages)


LONG = {"total_steps": 400, "eval_steps": 400, "save_steps": 20, "warmup_steps": 20}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return run(tmp_path_factory.mktemp("long") / "run", **LONG)


@pytest.mark.slow
def test_sigterm_with_loader_workers_alive_saves_ends_well_and_leaves_no_process(uninterrupted, tmp_path):
    output_dir = tmp_path / "run"
    process = spawn(["-m", "hf_mae.cli", *arguments(output_dir, num_workers=2, **LONG)], tmp_path / "log")
    try:
        wait_for_step(output_dir, 30, process)
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 2
        process.terminate()
        assert process.wait(timeout=20) == 0, (tmp_path / "log").read_text()
        assert not any(child.is_running() for child in children)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    last = max(losses(output_dir))
    assert 30 <= last < 400
    assert checkpoints(output_dir)[-1] == last
    assert f"stopped on request after step {last}" in (tmp_path / "log").read_text()
    run(output_dir, resume="auto", **LONG)
    assert weights_hash(output_dir) == weights_hash(uninterrupted)
    assert losses(output_dir) == losses(uninterrupted)


@pytest.mark.slow
def test_two_runs_of_sigkill_change_nothing_about_the_weights(uninterrupted, tmp_path):
    output_dir = tmp_path / "run"
    for resume, step in (("none", 47), ("auto", 131)):
        command = arguments(output_dir, num_workers=2, resume=resume, **LONG)
        process = spawn(["-m", "hf_mae.cli", *command], tmp_path / f"log-{step}")
        try:
            wait_for_step(output_dir, step, process)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert not (output_dir / "model.safetensors").exists()
    run(output_dir, resume="auto", **LONG)
    assert weights_hash(output_dir) == weights_hash(uninterrupted)
    assert losses(output_dir) == losses(uninterrupted)
    assert not list(output_dir.glob(".tmp-*"))


# ------------------------------------------------------------------------------------------ how a step is computed


@pytest.mark.parametrize("micro_batch", [16, 8])
def test_micro_batches_make_the_same_steps_as_whole_batches(finished, tmp_path, micro_batch):
    output_dir = run(tmp_path / "run", save_steps=12, eval_steps=5, per_device_batch_size=micro_batch)
    derived = yaml.safe_load((output_dir / "run_config.yaml").read_text())["derived"]
    assert derived["grad_accum_steps"] == 32 // micro_batch
    assert losses(output_dir) == pytest.approx(losses(finished), rel=1e-6)
    # The last evaluation batch is smaller than the others: 92 images in batches of 32, 16 or 8.
    assert evaluations(output_dir) == pytest.approx(evaluations(finished), rel=1e-6)
    norms, other = ([e["grad_norm"] for e in events(folder) if "loss" in e] for folder in (output_dir, finished))
    assert norms == pytest.approx(other, rel=1e-5)
    assert weights_difference(output_dir, finished) < 1e-6


def test_gradients_longer_than_clip_grad_are_cut_to_it(finished, tmp_path, monkeypatch):
    lengths = []
    step = torch.optim.AdamW.step

    def measured(optimizer, *args, **kwargs):
        gradients = [p.grad.norm() for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        lengths.append(torch.stack(gradients).norm().item())
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", measured)
    output_dir = run(tmp_path / "run", clip_grad=20.0, total_steps=6, per_device_batch_size=16)
    logged = [event["grad_norm"] for event in events(output_dir) if "loss" in event]
    assert max(logged) > 25  # what is logged is the length before
    assert min(logged) < 20
    assert lengths == pytest.approx([min(length, 20.0) for length in logged], rel=1e-4)


def test_a_clip_that_is_never_reached_changes_nothing(finished, tmp_path):
    output_dir = run(tmp_path / "run", save_steps=12, eval_steps=5, clip_grad=1e6)
    assert losses(output_dir) == losses(finished)


def test_gradient_checkpointing_changes_memory_and_nothing_else(finished, tmp_path, monkeypatch):
    recomputed = []
    checkpoint = torch.utils.checkpoint.checkpoint

    def counted(*args, **kwargs):
        recomputed.append(1)
        return checkpoint(*args, **kwargs)

    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", counted)
    monkeypatch.setattr("transformers.modeling_utils.checkpoint", counted, raising=False)
    output_dir = run(tmp_path / "run", save_steps=12, eval_steps=5, gradient_checkpointing=True)
    assert len(recomputed) == 12 * 3  # steps and layers
    assert losses(output_dir) == pytest.approx(losses(finished), rel=1e-6)


def test_bf16_trains_nearly_as_float32_does_and_saves_float32(finished, tmp_path):
    output_dir = run(tmp_path / "run", save_steps=12, eval_steps=5, mixed_precision="bf16")
    assert yaml.safe_load((output_dir / "run_config.yaml").read_text())["derived"]["mixed_precision"] == "bf16"
    assert losses(output_dir) == pytest.approx(losses(finished), rel=0.05)
    assert losses(output_dir) != losses(finished)
    assert {tensor.dtype for tensor in load_file(output_dir / "model.safetensors").values()} == {torch.float32}


@pytest.mark.slow
def test_a_compiled_model_trains_as_the_other_does(tmp_path):
    # One layer and one batch size: each graph costs half a minute of compiling.
    options = {"num_hidden_layers": 1, "total_steps": 4, "max_eval_samples": 32}
    usual = run(tmp_path / "usual", **options)
    counters = torch._dynamo.utils.counters["stats"]
    counters.clear()
    compiled = run(tmp_path / "compiled", compile=True, **options)
    assert counters["unique_graphs"] >= 2  # training and evaluation
    assert losses(compiled) == pytest.approx(losses(usual), rel=1e-5)
    assert evaluations(compiled) == pytest.approx(evaluations(usual), rel=1e-5)
    assert weights_difference(compiled, usual) < 1e-5
    assert type(AutoModel.from_pretrained(compiled)) is MAEModel


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


# ------------------------------------------------------------------------------------------ other data


def pictures(folder: Path, count: int = 64, size=(20, 26)) -> list[Path]:
    """PNG files of smooth colours in folders two levels deep."""
    rng = np.random.default_rng(count)
    paths = []
    for number in range(count):
        coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC)
        path = folder / f"year-{number % 3}" / f"day-{number % 2}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        paths.append(path)
    return paths


def test_a_nested_folder_of_pictures_without_labels(tmp_path):
    pictures(tmp_path / "data")
    output_dir = run(tmp_path / "run", dataset=tmp_path / "data", total_steps=3)
    assert all(math.isfinite(loss) for loss in losses(output_dir).values())
    config = AutoModel.from_pretrained(output_dir).config
    assert config.num_channels == 3
    processor = AutoImageProcessor.from_pretrained(output_dir)
    assert list(processor.image_mean) == [0.485, 0.456, 0.406]
    assert processor.rescale_factor == pytest.approx(1 / 255)


def test_a_folder_with_a_split_for_evaluation_is_trained_on_the_other(tmp_path):
    pictures(tmp_path / "data" / "train", 40)
    pictures(tmp_path / "data" / "val", 24)
    output_dir = run(tmp_path / "run", dataset=tmp_path / "data", total_steps=2)
    derived = yaml.safe_load((output_dir / "run_config.yaml").read_text())["derived"]
    assert (derived["training_images"], derived["evaluation_images"]) == (40, 24)
    assert derived["evaluated_on"].startswith("split validation")


def test_tiles_of_thirteen_16_bit_bands_are_normalised_by_their_own_numbers(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "tiles").mkdir()
    # Bands of very different level, as satellites have; smooth, so that resizing keeps mean and deviation.
    level, spread = np.linspace(300, 40_000, 13), np.linspace(30, 6_000, 13)
    tiles = []
    for number in range(24):
        coarse = torch.tensor(rng.normal(size=(1, 13, 8, 12)))
        smooth = torch.nn.functional.interpolate(coarse, (208, 320), mode="bicubic")[0].numpy()
        tile = np.clip(level[:, None, None] + spread[:, None, None] * smooth, 0, 65535).astype(np.uint16)
        np.save(tmp_path / "tiles" / f"{number}.npy", tile)
        tiles.append(tile)
    output_dir = run(
        tmp_path / "run", dataset=tmp_path / "tiles", image_size="208x320", patch_size=16, total_batch_size=4,
        total_steps=3, warmup_steps=3, eval_crop_pct=None,
    )  # fmt: skip
    config = json.loads((output_dir / "preprocessor_config.json").read_text())
    assert config["rescale_factor"] == pytest.approx(1 / 65535)
    assert len(config["image_mean"]) == len(config["image_std"]) == 13
    assert config["image_mean"] == pytest.approx(level / 65535, rel=0.1)
    pixels = np.stack(tiles).astype(np.float64) / 65535
    # The statistics are those of the training part, nearly all of the tiles.
    assert config["image_mean"] == pytest.approx(pixels.mean(axis=(0, 2, 3)), rel=0.03)
    assert config["image_std"] == pytest.approx(pixels.std(axis=(0, 2, 3)), rel=0.1)

    model = AutoModelForPreTraining.from_pretrained(output_dir).eval()
    assert (model.config.image_height_width, model.config.num_channels) == ((208, 320), 13)
    inputs = AutoImageProcessor.from_pretrained(output_dir)(tiles[3], return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 13, 208, 320)
    assert inputs["pixel_values"].std().item() == pytest.approx(1, abs=0.3)
    loss = model(**inputs).loss.item()
    assert loss == pytest.approx(losses(output_dir)[3], rel=0.4)
    assert (output_dir / "reconstructions" / "step-3.png").exists()


def test_parquet_files(tmp_path):
    files = pictures(tmp_path / "pictures", 64)
    features = datasets.Features({"picture": datasets.Image(), "number": datasets.Value("int64")})
    rows = {"picture": [{"bytes": file.read_bytes(), "path": None} for file in files], "number": list(range(64))}
    (tmp_path / "data").mkdir()
    table = datasets.Dataset.from_dict(rows, features=features)
    for shard in range(2):
        table.shard(2, shard).to_parquet(tmp_path / "data" / f"train-{shard:05d}-of-00002.parquet")
    mapped = run(tmp_path / "mapped", dataset=tmp_path / "data", total_steps=2)
    in_place = run(tmp_path / "in place", dataset=tmp_path / "data", total_steps=2, streaming=True)
    for output_dir in (mapped, in_place):
        assert yaml.safe_load((output_dir / "run_config.yaml").read_text())["derived"]["training_images"] > 55
        assert all(math.isfinite(loss) for loss in losses(output_dir).values())


def test_tar_files_in_place_go_on_where_they_stopped(tmp_path):
    files = pictures(tmp_path / "pictures", 90)
    for shard in range(3):
        with tarfile.open(tmp_path / f"shard-{shard:03d}.tar", "w") as tar:
            for number, file in enumerate(files[shard::3]):
                tar.add(file, f"{shard}-{number:04d}.png")
    options = {"dataset": tmp_path / "shard-{000..002}.tar", "total_steps": 8, "save_steps": 4, "total_batch_size": 16}
    whole = run(tmp_path / "whole", **options)
    output_dir = cut_off(whole, 4, tmp_path / "run")
    run(output_dir, resume="auto", **options)
    assert weights_hash(output_dir) == weights_hash(whole)
    assert losses(output_dir) == losses(whole)


def test_a_run_passes_over_two_broken_files_and_names_them(tmp_path, capfd):
    files = pictures(tmp_path / "data", 100)
    # Known to be training images: the run itself says which rows it holds out.
    options = {"dataset": tmp_path / "data", "total_steps": 9, "save_steps": 3, "keep_checkpoints": 9}
    trained_on = PretrainRun(load_pretrain_recipe(arguments(tmp_path / "x", **options)[1:])).data.rows
    broken = [row.key for row in trained_on.read(trained_on.index[[7, 33]])]
    (tmp_path / "data" / broken[0]).write_bytes(files[0].read_bytes()[:90])
    (tmp_path / "data" / broken[1]).write_bytes(b"")
    output_dir = run(tmp_path / "run", max_bad_fraction=0.05, **options)
    assert all(math.isfinite(loss) for loss in losses(output_dir).values())
    named = [json.loads(line) for line in (output_dir / "bad_samples.jsonl").read_text().splitlines()]
    # Nine batches are three passes over the data.
    assert {sample["key"] for sample in named} == set(broken)
    assert {sample["reason"] for sample in named if sample["key"] == broken[1]} == {"EmptyFile"}
    assert 4 <= len(named) <= 6
    assert f"{len(named)} images skipped so far" in capfd.readouterr().out
    # Not one of them is named twice or forgotten by a run that was cut off.
    again = cut_off(output_dir, 3, tmp_path / "again")
    run(again, max_bad_fraction=0.05, resume="auto", **options)
    assert weights_hash(again) == weights_hash(output_dir)
    assert (again / "bad_samples.jsonl").read_text() == (output_dir / "bad_samples.jsonl").read_text()


# ------------------------------------------------------------------------------------------ evaluation


def test_evaluation_pixels_are_those_of_the_image_processor_to_the_last_digit(tmp_path):
    paths = pictures(tmp_path / "data", 30, size=(60, 45))
    pictures(tmp_path / "data" / "wide", 30, size=(40, 71))
    options = {"dataset": tmp_path / "data", "image_size": 16, "patch_size": 4, "eval_crop_pct": 0.875}
    output_dir = run(tmp_path / "run", total_steps=1, **options)
    recipe = load_pretrain_recipe(arguments(tmp_path / "other", eval_dataset=tmp_path / "data", **options)[1:])
    pretraining = PretrainRun(recipe)
    processor = AutoImageProcessor.from_pretrained(output_dir, backend="pil")
    assert type(processor) is MAEImageProcessorPil
    seen = 0
    for batch in pretraining.held_out.batches(0, 1):
        files = [Image.open(tmp_path / "data" / key) for key in batch.keys]
        expected = processor(files, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(pretraining.normalize(batch.images), expected, atol=1e-6, rtol=0)
        seen += len(files)
    assert seen == len(paths) + 30


# ------------------------------------------------------------------------------------------ errors while it runs


def test_too_many_broken_files_stop_the_run_in_one_line(tmp_path, capfd):
    files = pictures(tmp_path / "data", 60)
    for file in files[::4]:
        file.write_bytes(b"no picture")
    words = arguments(tmp_path / "run", dataset=tmp_path / "data", total_steps=40, max_bad_fraction=0.1, num_workers=2)
    assert start(*words) == 2
    *_, last = capfd.readouterr().err.splitlines()
    assert last.startswith("hf-mae: error: ")
    assert "max_bad_fraction 10.0%" in last
    assert str(tmp_path / "run" / "bad_samples.jsonl") in last
    assert max(losses(tmp_path / "run")) < 40
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("error", [DataError("no such thing; do another"), MissingPackage("x: pip install x")])
def test_an_error_while_loading_is_one_line_and_ends_the_workers(tmp_path, monkeypatch, capfd, workers, error):
    def broken(*_):
        raise error

    monkeypatch.setattr(hf_mae.data.loader, "training_view", broken)
    assert start(*arguments(tmp_path / "run", num_workers=workers)) == 2
    message = capfd.readouterr().err.splitlines()
    assert message[-1] == f"hf-mae: error: {error}"
    assert not any("Traceback" in line for line in message)
    assert multiprocessing.active_children() == []


@pytest.mark.slow
@pytest.mark.parametrize("where", ["training_view", "evaluation_view"])
def test_a_process_whose_loader_workers_fail_ends(tmp_path, where):
    """Also with an error that nobody expects, whose traceback holds on to everything."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, hf_mae.cli, hf_mae.data.loader as loader\n"
        f"good, calls = loader.{where}, []\n"
        "def sometimes(*args, **kwargs):\n"
        "    calls.append(1)\n"
        "    if len(calls) > 40:\n"
        "        raise ZeroDivisionError('a bug')\n"
        "    return good(*args, **kwargs)\n"
        f"loader.{where} = sometimes\n"
        "sys.exit(hf_mae.cli.main(sys.argv[1:]))\n"
    )
    command = arguments(tmp_path / "run", num_workers=2, per_device_batch_size=16)
    result = subprocess.run(
        [sys.executable, script, *command], env=environment(), capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 1
    assert "ZeroDivisionError: a bug" in result.stderr


@pytest.mark.parametrize("when", [0, 2])
def test_a_key_press_ends_the_run_and_its_workers(tmp_path, monkeypatch, capfd, when):
    def press(log, step, **_):
        if step == when:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(RunLog, "event", press)
    assert start(*arguments(tmp_path / "run", num_workers=1)) == 130
    assert capfd.readouterr().err.splitlines()[-1] == "hf-mae: error: interrupted; go on with --resume auto"
    assert multiprocessing.active_children() == []

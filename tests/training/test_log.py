"""What a run logs: metrics.jsonl, pictures, speed and trackers."""

import io
import math
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from runs import cut_off, evaluations, events, losses, run

from hf_mae.training.log import Stopwatch
from hf_mae.visualize.grid import with_title

pytestmark = pytest.mark.usefixtures("own_caches", "no_process_is_left")


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


def test_pictures_that_do_not_fit_the_newest_one_are_left_out_of_the_animation(stages, tmp_path, capsys):
    output_dir = cut_off(stages, 6, tmp_path / "run")
    whole = (output_dir / "reconstructions" / "step-0.png").read_bytes()
    header, rest = whole[:16], whole[33:]  # up to the sides of the image, and after them
    large = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    (output_dir / "reconstructions" / "step-1.png").write_bytes(
        header + large + struct.pack(">I", zlib.crc32(b"IHDR" + large)) + rest
    )
    note = b"zTXt" + b"a\0\0" + zlib.compress(b"a" * 10_000_000)
    chunk = struct.pack(">I", len(note) - 4) + note + struct.pack(">I", zlib.crc32(note))
    (output_dir / "reconstructions" / "step-2.png").write_bytes(whole[:33] + chunk + rest)
    capsys.readouterr()
    run(output_dir, save_steps=3, eval_steps=5, keep_checkpoints=9, resume="auto", max_eval_samples=2)
    assert "all.webp lacks 4 pictures, broken or of another size" in capsys.readouterr().out
    with Image.open(output_dir / "reconstructions" / "all.webp") as animation:
        assert animation.n_frames == 2  # of the steps 10 and 12; those of 0 and 5 show more images


def test_a_resumed_run_remembers_numbers_alone(stages, tmp_path, capsys):
    output_dir = cut_off(stages, 6, tmp_path / "run")
    with (output_dir / "metrics.jsonl").open("a") as file:
        for value in ('"x"', "[1]", "true", "NaN"):
            file.write(f'{{"step": 1, "eval_loss": {value}, "rankme": {value}, "knn_top1": null}}\n')
    run(output_dir, save_steps=3, eval_steps=5, keep_checkpoints=9, resume="auto")
    first, last = evaluations(stages)[0], evaluations(stages)[12]
    shown = capsys.readouterr().out
    assert f"evaluation loss {first:.4f} before step 1, {last:.4f} after step 12\n" in shown
    assert "RankMe" not in shown


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

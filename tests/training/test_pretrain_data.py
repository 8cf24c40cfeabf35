"""`hf-mae pretrain` on folders, parquet files, tars, 16-bit tiles and broken files."""

import json
import math
import multiprocessing
import tarfile

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from runs import arguments, cut_off, load_pretrain_recipe, losses, pictures, run, start, weights_hash
from transformers import AutoImageProcessor, AutoModel, AutoModelForPreTraining

from hf_mae.evaluation.encoder import FrozenEncoder
from hf_mae.training.build import stored_nodata
from hf_mae.training.pretrain import PretrainRun

datasets = pytest.importorskip("datasets")


pytestmark = pytest.mark.usefixtures("own_caches", "no_process_is_left")


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
    assert f"{len(named)} images could not be decoded so far" in capfd.readouterr().out
    # Not one of them is named twice or forgotten by a run that was cut off.
    again = cut_off(output_dir, 3, tmp_path / "again")
    run(again, max_bad_fraction=0.05, resume="auto", **options)
    assert weights_hash(again) == weights_hash(output_dir)
    assert (again / "bad_samples.jsonl").read_text() == (output_dir / "bad_samples.jsonl").read_text()


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


def test_missing_pixels_are_left_out_and_the_run_trains(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "tiles").mkdir()
    for number in range(24):
        tile = rng.normal(300, 50, (2, 32, 32)).astype(np.float32)
        tile[:, :16, :16] = np.nan  # whole patches
        tile[0, 20, 20] = np.nan
        np.save(tmp_path / "tiles" / f"{number}.npy", tile)
    output_dir = run(tmp_path / "run", dataset=tmp_path / "tiles", total_steps=3, image_size=32, patch_size=8)
    assert all(math.isfinite(loss) for loss in losses(output_dir).values())
    assert not any("skipped" in line for line in (output_dir / "metrics.jsonl").read_text().splitlines())
    assert AutoImageProcessor.from_pretrained(output_dir).image_mean == pytest.approx([300, 300], abs=5)
    assert not (output_dir / "bad_samples.jsonl").exists()


def test_a_value_of_missing_pixels_goes_with_the_model(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for number in range(24):
        tile = rng.integers(100, 200, (32, 32), dtype=np.uint8)
        tile[:, :16] = 0
        path = tmp_path / "tiles" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(tile).save(path)
    sized = {"image_size": 32, "patch_size": 8, "total_steps": 2, "save_steps": 1}
    data = {"dataset": tmp_path / "tiles", **sized}
    output_dir = run(tmp_path / "run", nodata=0, masks_per_image=2, **data)
    assert "32 x 32 pixels, used at 32 x 32, 0 stands for missing data\n" in capsys.readouterr().out
    assert all(math.isfinite(loss) for loss in losses(output_dir).values())
    processor = AutoImageProcessor.from_pretrained(output_dir)
    assert processor.nodata == 0
    assert processor.image_mean == pytest.approx([149.5 / 255], abs=0.01)
    # Resumed with another value, or none.
    cut = cut_off(output_dir, 1, tmp_path / "cut")
    for other in (255, None):
        words = arguments(cut, nodata=other, masks_per_image=2, resume="auto", **data)
        assert start(*words) == 2
        assert f"belongs to a run with nodata 0.0, not {other and float(other)}" in capsys.readouterr().err
    # Continued in another run, fine-tuned and evaluated.
    assert stored_nodata(run(tmp_path / "more", model=output_dir, **data)) == 0
    words = ["--model", output_dir, "--dataset", tmp_path / "tiles", "--num_workers", 0]
    tuned = tmp_path / "tuned"
    few = ["--total_batch_size", 8, "--total_steps", 1, "--eval_dataset", tmp_path / "tiles", "--output_dir", tuned]
    assert start("finetune", *words, *few) == 0
    assert stored_nodata(tuned) == 0
    assert start("embed", *words, "--output", tmp_path / "features.npy") == 0
    encoder = FrozenEncoder(str(output_dir), "mean")
    pixel_values = processor(Image.open(path), return_tensors="pt").pixel_values
    assert (pixel_values[0, 0, :, :16] == 0).all()
    expected = encoder.encoder(pixel_values).last_hidden_state[:, 1:].mean(dim=1)
    found = np.load(tmp_path / "features.npy")
    assert np.abs(found - expected.detach().numpy()).max(axis=1).min() < 1e-5
    capsys.readouterr()
    assert start("finetune", *words, *few[:-2], "--output_dir", tmp_path / "x", "--rand_augment", "rand-m9") == 2
    assert "not 1 channels of uint8 with missing pixels (nodata 0); pass --rand_augment none" in capsys.readouterr().err

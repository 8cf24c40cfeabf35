"""`hf-mae reconstruct`."""

import numpy as np
import pytest
import torch
from PIL import Image
from reconstructions import model_for
from runs import start

from hf_mae import MAEImageProcessor, MAEImageProcessorPil, MAEModel
from hf_mae.visualize.command import Reconstructor
from hf_mae.visualize.grid import CAPTION, HEADER, MARGIN, reconstruction_grid
from hf_mae.visualize.reconstruction import reconstruct


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model_for(3, 32, 32, norm_pix_loss=True).save_pretrained(folder)
    MAEImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture
def photos(tmp_path):
    rng, folder = np.random.default_rng(0), tmp_path / "photos"
    folder.mkdir()
    for number in range(5):
        Image.fromarray(rng.integers(0, 256, (50, 60, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


def test_the_command_draws_files_and_folders_with_several_mask_ratios(saved, photos, tmp_path, capsys):
    out = tmp_path / "new" / "x.png"
    single = photos / "0.png"
    assert start("reconstruct", "--model", saved, "--images", single, photos, "--max_images", 3,
                 "--mask_ratios", 0.5, 0.75, "--output", out, "--cell", 48) == 0  # fmt: skip
    printed = capsys.readouterr().out
    assert f"picture  {out}" in printed
    assert "masked 50%: " in printed and "masked 75%: " in printed  # noqa: PT018
    with Image.open(out) as picture:
        rows = (picture.height - 2 * HEADER) // (48 + MARGIN + CAPTION)
        assert rows == 4
        assert picture.width == 9 * (48 + MARGIN) + 2 * MARGIN


def test_without_mask_ratios_the_model_s_own_is_used(tmp_path, capsys):
    model_for(3, 32, 32, mask_ratio=0.5).save_pretrained(tmp_path)
    MAEImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    Image.new("RGB", (40, 40), "teal").save(tmp_path / "photo.png")
    assert start("reconstruct", tmp_path / "photo.png", "--model", tmp_path, "--output", tmp_path / "x.png") == 0
    assert "masked 50%: " in capsys.readouterr().out


def test_the_command_shows_what_the_functions_give(saved, photos, tmp_path):
    out = tmp_path / "x.png"
    assert start("reconstruct", "--model", saved, "--images", photos / "1.png", "--seed", 7, "--output", out) == 0
    reconstructor = Reconstructor(str(saved))
    with Image.open(photos / "1.png") as image:
        expected = MAEImageProcessorPil.from_pretrained(saved)(image, return_tensors="pt").pixel_values
        found = reconstructor.pixel_values([image])
    assert torch.allclose(found, expected, atol=1e-6)
    result = reconstruct(reconstructor.model, found, 0.75, seed=7)
    mean, std = reconstructor.processor.image_mean, reconstructor.processor.image_std
    with Image.open(out) as picture:
        expected = reconstruction_grid([result], mean, std, details=True)
        assert np.array_equal(np.asarray(picture), np.asarray(expected))


def test_another_size_is_cropped_as_the_own_one(saved, photos, tmp_path):
    reconstructor = Reconstructor(str(saved), [48, 64])
    assert reconstructor.spec.eval_resize == (54, 73)  # 64 / 0.875 is 73.1; the model's own 32 pixels are cut out of 36
    assert reconstructor.pixel_values([(photos / "1.png").read_bytes()]).shape == (1, 3, 48, 64)
    assert Reconstructor(str(saved), [48]).spec.eval_resize == 54


def test_a_crop_of_another_shape_is_filled_by_the_image(saved):
    white = np.full((100, 100, 3), 255, np.uint8)
    pixel_values = Reconstructor(str(saved), [32, 64]).pixel_values([white])
    assert pixel_values.shape == (1, 3, 32, 64)
    assert (pixel_values == pixel_values[:, :, :1, :1]).all()


def test_images_of_every_kind_are_shown_or_named(saved, tmp_path, capsys):
    rng, folder = np.random.default_rng(0), tmp_path / "kinds"
    folder.mkdir()
    Image.fromarray(rng.integers(0, 256, (40, 40, 4), dtype=np.uint8), "CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(rng.integers(0, 65536, (40, 40), dtype=np.uint16)).save(folder / "deep.png")
    frames = [Image.fromarray(rng.integers(0, 256, (40, 40), dtype=np.uint8)) for _ in range(2)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    (folder / "text.png").write_text("not an image")
    Image.new("1", (12000, 9000)).save(folder / "huge.png")
    names = ["cmyk.jpg", "deep.png", "moving.gif", "text.png", "huge.png"]
    assert start("reconstruct", "--model", saved, "--images", *[folder / name for name in names],
                 "--output", tmp_path / "x.png", "--cell", 32) == 0  # fmt: skip
    printed = capsys.readouterr().out
    assert f"left out {folder / 'text.png'}: " in printed
    assert f"left out {folder / 'huge.png'}: 12000 x 9000 pixels" in printed
    assert printed.count("left out") == 2
    with Image.open(tmp_path / "x.png") as picture:
        assert (picture.height - 2 * HEADER) // (32 + MARGIN + CAPTION) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": "missing.png"}, "there is no file missing.png; check --images"),
        ({"images": "text.png"}, "text.png can't be shown: "),
        ({"model": "./nowhere"}, "--model ./nowhere can't be loaded"),
        ({"model": "encoder"}, "--model encoder has no weights for decoder"),
        ({"output": "x.txt"}, "output x.txt is not a .png, .webp, .jpg or .jpeg file; change its ending"),
        ({"mask_ratios": 1.0}, "mask_ratio 1.0"),
        ({"mask_ratios": 0}, "mask_ratio"),
        ({"bands": 5}, "bands [5] can't be shown; give one or three numbers from 0 to 2"),
        ({"image_size": 30}, "30"),
        ({"statistics": "own"}, "statistics"),
    ],
    ids=str,
)
def test_what_a_user_did_wrong_is_told_in_one_line(saved, photos, tmp_path, monkeypatch, capsys, changes, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "text.png").write_text("not an image")
    MAEModel.from_pretrained(saved).save_pretrained("encoder")
    MAEImageProcessor.from_pretrained(saved).save_pretrained("encoder")
    keys = {"model": saved, "images": photos / "0.png", "output": "x.png"} | changes
    words = [word for key, value in keys.items() for word in (f"--{key}", value)]
    assert start("reconstruct", *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("hf-mae: error: ") and error.count("\n") == 1  # noqa: PT018


def test_photos_are_shown_upright(saved, tmp_path):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(tmp_path / "turned.png", exif=exif)
    photo.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "upright.png")
    files = [(tmp_path / name).read_bytes() for name in ("turned.png", "upright.png")]
    turned, upright = Reconstructor(str(saved)).pixel_values(files)
    assert torch.equal(turned, upright)

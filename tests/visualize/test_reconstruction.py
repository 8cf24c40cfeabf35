from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from runs import start
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from tiny import draw_noise, pixels, tiny

from hf_mae import MAEForPreTraining, MAEImageProcessor, MAEImageProcessorPil, MAEModel, patchify
from hf_mae.modeling_mae import normalize_patches
from hf_mae.visualize.command import Reconstructor
from hf_mae.visualize.grid import CAPTION, HEADER, MARGIN, reconstruction_grid
from hf_mae.visualize.reconstruction import _ssim_map, from_visible_neighbours, masked_psnr, masked_ssim, reconstruct

SHAPES = [(1, 32, 32), (2, 32, 32), (3, 32, 32), (13, 32, 32), (3, 16, 48), (1, 48, 16), (13, 16, 48)]


def model_for(channels: int, height: int, width: int, **overrides) -> MAEForPreTraining:
    return tiny(MAEForPreTraining, num_channels=channels, image_size=[height, width], **overrides)


def removed_pixels(mask: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, N) -> (B, H, W): the slow way, patch by patch."""
    pixel = torch.zeros(len(mask), height, width, dtype=torch.bool)
    columns = width // 8
    for image in range(len(mask)):
        for patch in range(mask.shape[1]):
            top, left = patch // columns * 8, patch % columns * 8
            pixel[image, top : top + 8, left : left + 8] = mask[image, patch] == 1
    return pixel


def predict_perfectly(model, monkeypatch, wrong_where_visible: bool = True):
    """The model's forward with the true target as prediction, nonsense where nothing is predicted."""
    forward = model.forward

    def perfect(pixel_values, **options):
        output = forward(pixel_values, **options)
        target = patchify(pixel_values, model.config.patch_height_width)
        if model.config.norm_pix_loss:
            target = normalize_patches(target)
        logits = torch.where(output.mask.unsqueeze(-1) == 1, target, torch.full_like(target, 1e6))
        return SimpleNamespace(logits=logits if wrong_where_visible else target, mask=output.mask)

    monkeypatch.setattr(model, "forward", perfect)


# ------------------------------------------------------------------------------------------ reconstruct


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("norm_pix_loss", "statistics"), [(False, "true"), (True, "true"), (True, "raw")])
def test_visible_patches_are_kept_to_the_bit_and_removed_ones_predicted(shape, norm_pix_loss, statistics):
    model = model_for(*shape, norm_pix_loss=norm_pix_loss)
    images, noise = pixels(2, *shape), draw_noise(2, model.config.num_patches)
    result = reconstruct(model, images, noise=noise, statistics=statistics)
    output = model(images, noise=noise)
    where = removed_pixels(output.mask, *shape[1:])
    assert torch.equal(result.removed, where[:, None])
    assert 0 < where.float().mean() < 1
    hidden = where[:, None].expand_as(images)
    assert torch.equal(result.masked, torch.where(hidden, torch.zeros(()), images))
    assert torch.equal(result.pasted[~hidden], images[~hidden])
    assert torch.equal(result.pasted[hidden], result.predicted[hidden])
    assert result.statistics == (statistics if norm_pix_loss else None)
    # The slow way: patch by patch, its statistics put back
    for image in range(2):
        for patch in range(output.mask.shape[1]):
            top, left = patch // (shape[2] // 8) * 8, patch % (shape[2] // 8) * 8
            own = images[image, :, top : top + 8, left : left + 8]
            expected = output.logits[image, patch].view(8, 8, shape[0]).permute(2, 0, 1)
            if norm_pix_loss and statistics == "true":
                expected = expected * (own.var() + 1e-6).sqrt() + own.mean()
            found = result.predicted[image, :, top : top + 8, left : left + 8]
            assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_a_perfect_prediction_with_the_true_statistics_gives_the_image_back(shape, norm_pix_loss, monkeypatch):
    model = model_for(*shape, norm_pix_loss=norm_pix_loss)
    predict_perfectly(model, monkeypatch)
    images = 100 + 30 * pixels(2, *shape)
    result = reconstruct(model, images, statistics="true")
    assert result.removed.float().mean() > 0.5
    if norm_pix_loss:
        # Normalising and undoing it rounds: a few times 2**-24 of pixels of up to 250.
        assert (result.pasted - images).abs().max() < 1e-4
    else:
        assert torch.equal(result.pasted, images)


@pytest.mark.parametrize("statistics", ["visible", "raw"])
def test_only_the_true_statistics_read_a_hidden_pixel(statistics):
    model = model_for(3, 32, 48, norm_pix_loss=True)
    images = pixels(2, 3, 32, 48)
    first = reconstruct(model, images, seed=3, statistics=statistics)
    changed = torch.where(first.removed, torch.full_like(images, 1e4), images)
    again = reconstruct(model, changed, seed=3, statistics=statistics)
    assert torch.equal(first.pasted, again.pasted)
    assert torch.equal(first.masked, again.masked)
    with_truth = [reconstruct(model, x, seed=3, statistics="true").pasted for x in (images, changed)]
    assert not torch.equal(*with_truth)


def test_the_visible_neighbours_weigh_by_a_gaussian_of_their_distance():
    grid_size, removed = (3, 4), torch.zeros(1, 12, 1, dtype=torch.bool)
    removed[0, [0, 5, 6, 11]] = True
    values = torch.randn(1, 12, 2)
    found = from_visible_neighbours(values.masked_fill(removed, float("nan")), removed, grid_size)
    for patch in range(12):
        expected = values[0, patch]
        if removed[0, patch]:
            total, weights = torch.zeros(2), 0.0
            for other in set(range(12)) - {0, 5, 6, 11}:
                distance = (patch // 4 - other // 4) ** 2 + (patch % 4 - other % 4) ** 2
                weight = np.exp(-distance / 2)
                total, weights = total + weight * values[0, other], weights + weight
            expected = total / weights
        assert torch.allclose(found[0, patch], expected, atol=1e-6)


def test_without_a_choice_the_masks_are_those_of_every_evaluation():
    model, images = model_for(3, 32, 32), pixels()
    first, again = reconstruct(model, images), reconstruct(model, images)
    assert torch.equal(first.pasted, again.pasted)
    assert torch.equal(first.removed[:, 0], removed_pixels(model(images).mask, 32, 32))
    assert first.mask_ratio == 0.75
    assert not first.pasted.requires_grad


def test_a_seed_gives_an_image_its_mask_in_any_batch_and_a_higher_ratio_hides_more_of_the_same():
    model, images = model_for(3, 32, 32), pixels(3)
    alone, together = reconstruct(model, images[:1], seed=5), reconstruct(model, images, seed=5)
    assert torch.equal(alone.removed, together.removed[:1])
    assert not torch.equal(together.removed[0], together.removed[1])
    assert not torch.equal(together.removed, reconstruct(model, images, seed=6).removed)
    half = reconstruct(model, images, mask_ratio=0.5, seed=5)
    assert half.mask_ratio == 0.5
    assert not (half.removed & ~together.removed).any()


def test_a_mask_of_ones_own_is_the_one_that_is_used():
    model, images = model_for(3, 32, 32), pixels(1)
    mask = torch.zeros(1, 16)
    mask[0, [1, 7, 8]] = 1
    result = reconstruct(model, images, mask=mask)
    assert torch.equal(result.removed[:, 0], removed_pixels(mask, 32, 32))
    with pytest.raises(ValueError, match="seed came with mask"):
        reconstruct(model, images, mask=mask, seed=1)
    with pytest.raises(ValueError, match="'own' is none of visible, true, raw"):
        reconstruct(model, images, statistics="own")  # pyright: ignore[reportArgumentType]


def test_an_image_of_another_size_is_reconstructed_too():
    model, images = model_for(3, 32, 32), pixels(1, 3, 48, 64)
    assert reconstruct(model, images, seed=0).pasted.shape == images.shape


# ------------------------------------------------------------------------------------------ scores


@pytest.mark.parametrize("side", [8, 24])
def test_scores_equal_those_of_scikit_image(side):
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.random((2, 3, side, side)))
    others = (images + 0.1 * torch.from_numpy(rng.standard_normal(images.shape))).clamp(0, 1)
    everywhere = torch.ones(2, 1, side, side, dtype=torch.bool)
    for index in range(2):
        image, other = images[index].numpy(), others[index].numpy()
        assert masked_psnr(images, others, everywhere)[index].item() == pytest.approx(
            peak_signal_noise_ratio(image, other, data_range=1)
        )
        _, expected = structural_similarity(image, other, data_range=1, channel_axis=0, full=True)
        inner = slice(3, side - 3)  # at the edges there is more than one way to go on
        assert np.allclose(_ssim_map(images, others)[index, :, inner, inner], expected[:, inner, inner], atol=1e-9)


def test_only_hidden_pixels_count_in_the_scores():
    images, removed = torch.full((1, 3, 16, 16), 0.5), torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    removed[..., :8] = True
    others = images.clone()
    others[..., 8:] = 0
    assert masked_psnr(images, others, removed).isinf().all()
    others[..., :8] += 0.1
    assert masked_psnr(images, others, removed).item() == pytest.approx(20, abs=1e-4)
    assert masked_ssim(images, images, removed).item() == pytest.approx(1)
    assert masked_ssim(images, others, removed).item() < 0.99


# ------------------------------------------------------------------------------------------ the picture


def columns_of(count: int) -> int:
    return 4 if count == 1 else 7


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("count", "pairs"), [(1, 2), (5, 2), (4, 3)])
@pytest.mark.parametrize("details", [False, True])
def test_the_picture_has_a_place_for_every_image(shape, count, pairs, details):
    model = model_for(*shape, norm_pix_loss=False)
    channels, height, width = shape
    results = [reconstruct(model, pixels(count, *shape), ratio) for ratio in (0.5, 0.75)]
    picture = reconstruction_grid(
        results, [0.5] * channels, [0.25] * channels, details=details, cell=64, pairs=pairs
    )  # fmt: skip
    w, h = (64, 64) if height == width else (64, 21) if width > height else (21, 64)
    across = min(pairs, count)
    rows = -(-count // across)
    cells = 1 + 2 * (4 if details else 3)
    assert picture.mode == "RGB"
    assert picture.size == (
        across * (cells * (w + MARGIN) + 2 * MARGIN), HEADER + rows * (h + MARGIN + CAPTION * details)
    )  # fmt: skip


def cells(picture, count: int, pairs: int, side: int) -> np.ndarray:
    """(count, 4, side, side, 3): original, masked, reconstruction, and that with the visible patches."""
    array, step = np.asarray(picture), 4 * (side + MARGIN) + 2 * MARGIN
    return np.stack(
        [
            np.stack([array[top : top + side, left + c * (side + MARGIN) :][:, :side] for c in range(4)])
            for index in range(count)
            for top, left in [(HEADER + index // pairs * (side + MARGIN), index % pairs * step + MARGIN)]
        ]
    )


@pytest.mark.parametrize("channels", [1, 2, 3, 13])
@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("bands", [None, "others"])
def test_a_row_is_original_masked_reconstruction_and_both(channels, norm_pix_loss, bands, monkeypatch):
    model = model_for(channels, 32, 32, norm_pix_loss=norm_pix_loss)
    predict_perfectly(model, monkeypatch)
    chosen = [channels - 1] if channels < 3 else [channels - 1, 0, 1]
    shown_bands = chosen if bands else [0, 1, 2] if channels >= 3 else [0]
    bytes_ = torch.randint(0, 256, (3, channels, 32, 32)).float()
    bytes_[:, :, 0, 0] = 255  # nothing to stretch
    mean, std = [0.1 + 0.05 * c for c in range(channels)], [0.2 + 0.01 * c for c in range(channels)]
    images = (bytes_ / 255 - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    result = reconstruct(model, images, noise=draw_noise(3), statistics="true")
    picture = reconstruction_grid([result], mean, std, shown_bands if bands else None, cell=32, pairs=2)
    original, masked, reconstruction, pasted = cells(picture, 3, 2, 32).swapaxes(0, 1)
    shown = bytes_[:, shown_bands] if channels >= 3 else bytes_[:, shown_bands].expand(-1, 3, -1, -1)
    expected = shown.permute(0, 2, 3, 1).numpy()
    assert np.array_equal(original, expected)
    assert np.array_equal(pasted, expected)
    where = removed_pixels(model(images, noise=draw_noise(3)).mask, 32, 32).numpy()[..., None]
    assert np.array_equal(masked, np.where(where, 128, expected))
    assert np.array_equal(reconstruction, np.where(where, expected, 128))


@pytest.mark.parametrize("bands", [[0, 1], [3], [0, 1, -1], []])
def test_bands_that_are_not_there_are_refused(bands):
    result = reconstruct(model_for(3, 32, 32), pixels(1))
    with pytest.raises(ValueError, match="give one or three of 0 to 2"):
        reconstruction_grid([result], [0.5] * 3, [0.2] * 3, bands)


def test_the_error_is_white_where_there_is_none_and_gray_where_nothing_was_hidden(monkeypatch):
    model = model_for(3, 32, 32, norm_pix_loss=False)
    predict_perfectly(model, monkeypatch)
    result = reconstruct(model, torch.rand(1, 3, 32, 32), seed=0)
    result.pasted[..., :8, :] = 1 - result.pixel_values[..., :8, :].round()
    picture = reconstruction_grid([result], [0.0] * 3, [1.0] * 3, details=True, cell=32)
    left = MARGIN + 4 * (32 + MARGIN)
    error, hidden = np.asarray(picture)[HEADER : HEADER + 32, left : left + 32], result.removed[0, 0].numpy()
    assert (error[~hidden] == 128).all()
    assert (error[8:][hidden[8:]] == 255).all()
    worst = error[:8][hidden[:8]]
    assert np.array_equal(worst, np.broadcast_to([178, 0, 0], worst.shape))


def test_small_images_are_enlarged_pixel_by_pixel():
    model = model_for(1, 16, 16)
    images = torch.rand(1, 1, 16, 16)
    images[0, 0, 0, 0] = 1
    picture = reconstruction_grid([reconstruct(model, images)], [0.0], [1.0], cell=64)
    original = cells(picture, 1, 1, 64)[0, 0, :, :, 0]
    expected = (images[0, 0] * 255).round().byte().numpy().repeat(4, axis=0).repeat(4, axis=1)
    assert np.array_equal(original, expected)


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.05), (-4.0, 900.0), (270.0, 300.0)])
def test_images_that_do_not_fill_the_range_are_stretched_and_removed_patches_stay_gray(low, high, monkeypatch):
    model = model_for(1, 32, 32)
    predict_perfectly(model, monkeypatch)
    unit = torch.rand(1, 1, 32, 32)
    unit[0, 0, 0, 0], unit[0, 0, 0, 1] = 0, 1
    noise = draw_noise(1)
    result = reconstruct(model, low + unit * (high - low), noise=noise, statistics="true")
    original, masked, _, pasted = cells(reconstruction_grid([result], [0.0], [1.0], cell=32), 1, 1, 32)[0, ..., 0]
    expected = (unit[0, 0] * 255).numpy()
    assert np.abs(original - expected).max() <= 0.51
    assert np.abs(pasted - expected).max() <= 0.51
    where = removed_pixels(model(unit, noise=noise).mask, 32, 32)[0].numpy()
    assert (masked[where] == 128).all()
    assert np.array_equal(masked[~where], original[~where])


@pytest.mark.parametrize(("count", "cell"), [(1, 32), (1, 128), (4, 128)])
def test_the_picture_says_how_it_came_back_to_pixels_and_where_ground_truth_is_used(count, cell):
    def picture(norm_pix_loss, statistics):
        result = reconstruct(
            model_for(3, 32, 32, norm_pix_loss=norm_pix_loss), pixels(count), statistics=statistics
        )  # fmt: skip
        return np.asarray(reconstruction_grid([result], [0.5] * 3, [0.2] * 3, cell=cell))

    plain, *footed = picture(False, "true"), picture(True, "visible"), picture(True, "true"), picture(True, "raw")
    texts = [with_footer[len(plain) :] for with_footer in footed]
    for text in texts:
        assert len(text) == HEADER
        # All of the text is on the picture: white is left at both ends.
        inked = np.flatnonzero((text < 255).any(axis=(0, 2)))
        assert MARGIN <= inked[0] < 2 * MARGIN
        assert inked[-1] < text.shape[1] - 1
    assert len({text[:, :200].tobytes() for text in texts}) == 3
    if cell == 128:
        # The columns' titles have a star; all else of the first line is the same.
        column = 2 * (cell + MARGIN) + MARGIN
        visible, true, _ = footed
        assert not np.array_equal(visible[:HEADER, column:], true[:HEADER, column:])
        assert np.array_equal(visible[:HEADER, :column], true[:HEADER, :column])


# ------------------------------------------------------------------------------------------ the command


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
                 "--mask_ratios", 0.5, 0.75, "--out", out, "--cell", 48) == 0  # fmt: skip
    printed = capsys.readouterr().out
    assert f"picture  {out}" in printed
    assert "masked 50%: " in printed and "masked 75%: " in printed  # noqa: PT018
    with Image.open(out) as picture:
        rows = (picture.height - 2 * HEADER) // (48 + MARGIN + CAPTION)
        assert rows == 4
        assert picture.width == 9 * (48 + MARGIN) + 2 * MARGIN


def test_the_command_shows_what_the_functions_give(saved, photos, tmp_path):
    out = tmp_path / "x.png"
    assert start("reconstruct", "--model", saved, "--images", photos / "1.png", "--seed", 7, "--out", out) == 0
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
    assert reconstructor.spec.eval_resize == (54, 72)
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
                 "--out", tmp_path / "x.png", "--cell", 32) == 0  # fmt: skip
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
        ({"model": "nowhere"}, "--model nowhere can't be loaded"),
        ({"model": "encoder"}, "--model encoder has no weights for decoder"),
        ({"out": "x.txt"}, "out x.txt is no name of a picture; give it the ending .png, .webp or .jpg"),
        ({"mask_ratios": 1.0}, "mask_ratio 1.0"),
        ({"mask_ratios": 0}, "mask_ratio"),
        ({"bands": 5}, "bands [5] can't be shown; give one or three of 0 to 2"),
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
    keys = {"model": saved, "images": photos / "0.png", "out": "x.png"} | changes
    words = [word for key, value in keys.items() for word in (f"--{key}", value)]
    assert start("reconstruct", *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("hf-mae: error: ") and error.count("\n") == 1  # noqa: PT018

"""Pictures of reconstructions."""

import numpy as np
import pytest
import torch
from reconstructions import SHAPES, model_for, predict_perfectly, removed_pixels
from tiny import draw_noise, pixels

from hf_mae.visualize.grid import CAPTION, HEADER, MARGIN, reconstruction_grid
from hf_mae.visualize.reconstruction import reconstruct


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
    with pytest.raises(ValueError, match="give one or three numbers from 0 to 2"):
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
def test_images_are_stretched_to_the_range_and_removed_patches_stay_gray(low, high, monkeypatch):
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

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import draw_noise, pixels, tiny

from hf_mae import MAEForPreTraining, patchify
from hf_mae.modeling_mae import normalize_patches
from hf_mae.visualize import HEADER, MARGIN, reconstruct, reconstruction_grid

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
@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_visible_patches_are_kept_to_the_bit_and_removed_ones_predicted(shape, norm_pix_loss):
    model = model_for(*shape, norm_pix_loss=norm_pix_loss)
    images, noise = pixels(2, *shape), draw_noise(2, model.config.num_patches)
    masked, reconstruction, removed = reconstruct(model, images, noise)
    output = model(images, noise=noise)
    where = removed_pixels(output.mask, *shape[1:])
    assert torch.equal(removed, where[:, None].float())
    assert 0 < where.float().mean() < 1
    hidden = where[:, None].expand_as(images)
    assert torch.equal(masked, torch.where(hidden, torch.zeros(()), images))
    assert torch.equal(reconstruction[~hidden], images[~hidden])
    # The slow way: patch by patch, its statistics put back
    for image in range(2):
        for patch in output.mask[image].nonzero().flatten().tolist():
            top, left = patch // (shape[2] // 8) * 8, patch % (shape[2] // 8) * 8
            own = images[image, :, top : top + 8, left : left + 8]
            expected = output.logits[image, patch].view(8, 8, shape[0]).permute(2, 0, 1)
            if norm_pix_loss:
                expected = expected * (own.var() + 1e-6).sqrt() + own.mean()
            found = reconstruction[image, :, top : top + 8, left : left + 8]
            assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_a_perfect_prediction_gives_the_image_back(shape, norm_pix_loss, monkeypatch):
    model = model_for(*shape, norm_pix_loss=norm_pix_loss)
    predict_perfectly(model, monkeypatch)
    images = 100 + 30 * pixels(2, *shape)
    _, reconstruction, removed = reconstruct(model, images)
    assert removed.mean() > 0.5
    if norm_pix_loss:
        # Normalising and undoing it rounds: a few times 2**-24 of pixels of up to 250.
        assert (reconstruction - images).abs().max() < 1e-4
    else:
        assert torch.equal(reconstruction, images)


def test_without_noise_the_masks_are_those_of_every_evaluation():
    model, images = model_for(3, 32, 32), pixels()
    first, again = reconstruct(model, images), reconstruct(model, images)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(first[2][:, 0] == 1, removed_pixels(model(images).mask, 32, 32))
    assert not any(tensor.requires_grad for tensor in first)


# ------------------------------------------------------------------------------------------ the picture


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("count", "pairs"), [(1, 2), (5, 2), (4, 3)])
def test_the_picture_has_a_place_for_every_image(shape, count, pairs):
    model = model_for(*shape)
    channels, height, width = shape
    images = pixels(count, *shape)
    picture = reconstruction_grid(model, images, [0.5] * channels, [0.25] * channels, cell=64, pairs=pairs)
    w, h = (64, 64) if height == width else (64, 21) if width > height else (21, 64)
    columns = min(pairs, count)
    rows = -(-count // columns)
    assert picture.mode == "RGB"
    assert picture.size == (columns * (3 * (w + MARGIN) + 2 * MARGIN), HEADER + rows * (h + MARGIN))


def cells(picture, count: int, pairs: int, side: int) -> np.ndarray:
    """(count, 3, side, side, 3): original, masked and reconstruction of every image."""
    array, step = np.asarray(picture), 3 * (side + MARGIN) + 2 * MARGIN
    return np.stack(
        [
            np.stack([array[top : top + side, left + c * (side + MARGIN) :][:, :side] for c in range(3)])
            for index in range(count)
            for top, left in [(HEADER + index // pairs * (side + MARGIN), index % pairs * step + MARGIN)]
        ]
    )


@pytest.mark.parametrize("channels", [1, 2, 3, 13])
@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_a_row_is_original_masked_and_reconstruction(channels, norm_pix_loss, monkeypatch):
    model = model_for(channels, 32, 32, norm_pix_loss=norm_pix_loss)
    predict_perfectly(model, monkeypatch)
    bytes_ = torch.randint(0, 256, (3, channels, 32, 32)).float()
    bytes_[:, 0, 0, 0] = 255  # nothing to stretch
    mean, std = [0.1 * (c + 1) for c in range(channels)], [0.2 + 0.01 * c for c in range(channels)]
    images = (bytes_ / 255 - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    noise = draw_noise(3)
    picture = reconstruction_grid(model, images, mean, std, noise, cell=32, pairs=2)
    original, masked, reconstruction = cells(picture, 3, 2, 32).swapaxes(0, 1)
    shown = bytes_[:, :3] if channels >= 3 else bytes_[:, :1].expand(-1, 3, -1, -1)
    expected = shown.permute(0, 2, 3, 1).numpy()
    assert np.array_equal(original, expected)
    assert np.array_equal(reconstruction, expected)
    where = removed_pixels(model(images, noise=noise).mask, 32, 32).numpy()
    assert np.array_equal(masked, np.where(where[..., None], 128, expected))


def test_small_images_are_enlarged_pixel_by_pixel():
    model = model_for(1, 16, 16)
    images = torch.rand(1, 1, 16, 16)
    images[0, 0, 0, 0] = 1
    picture = reconstruction_grid(model, images, [0.0], [1.0], cell=64)
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
    picture = reconstruction_grid(model, low + unit * (high - low), [0.0], [1.0], noise, cell=32)
    original, masked, reconstruction = cells(picture, 1, 1, 32)[0, :, :, :, 0].astype(int)
    expected = (unit[0, 0] * 255).numpy()
    assert np.abs(original - expected).max() <= 0.51
    assert np.abs(reconstruction - expected).max() <= 0.51
    where = removed_pixels(model(unit, noise=noise).mask, 32, 32)[0].numpy()
    assert (masked[where] == 128).all()
    assert np.array_equal(masked[~where], original[~where])


@pytest.mark.parametrize(("count", "cell"), [(1, 32), (1, 128), (4, 128)])
def test_only_where_ground_truth_is_used_the_picture_says_so(count, cell):
    pictures = [
        reconstruction_grid(
            model_for(3, 32, 32, norm_pix_loss=norm_pix_loss), pixels(count), [0.5] * 3, [0.2] * 3, cell=cell
        )
        for norm_pix_loss in (False, True)
    ]
    plain, footed = (np.asarray(picture) for picture in pictures)
    assert len(footed) == len(plain) + HEADER
    footer = footed[len(plain) :]
    assert (footer < 128).any()
    # All of the text is on the picture: white is left at both ends.
    inked = np.flatnonzero((footer < 255).any(axis=(0, 2)))
    assert MARGIN <= inked[0] < 2 * MARGIN
    assert 380 < inked[-1] < footer.shape[1] - 1
    if cell == 128:
        # The column's title has a star; all else of the first line is the same.
        column = 2 * (cell + MARGIN) + MARGIN
        assert not np.array_equal(plain[:HEADER, column : column + cell], footed[:HEADER, column : column + cell])
        assert np.array_equal(plain[:HEADER, :column], footed[:HEADER, :column])

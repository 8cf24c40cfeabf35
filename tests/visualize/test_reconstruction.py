"""Reconstructions, and the scores of their hidden part."""

import numpy as np
import pytest
import torch
from reconstructions import SHAPES, model_for, predict_perfectly, removed_pixels
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from tiny import draw_noise, pixels

from hf_mae.visualize.reconstruction import _ssim_map, from_visible_neighbours, masked_psnr, masked_ssim, reconstruct


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


def test_a_seed_fixes_an_images_mask_and_a_higher_ratio_hides_more_of_the_same():
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
    with pytest.raises(ValueError, match="seed can't be combined with mask"):
        reconstruct(model, images, mask=mask, seed=1)
    with pytest.raises(ValueError, match="'own' is unknown; use one of visible, true, raw"):
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

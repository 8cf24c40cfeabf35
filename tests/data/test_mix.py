import random

import numpy as np
import pytest
import torch
from tiny import pixels
from torch.nn import functional as F

from hf_mae.data.mix import Mixing, RandAugment, RandomErasing, seeded


@pytest.fixture
def weight_of_three_tenths(monkeypatch):
    monkeypatch.setattr(torch.distributions.Beta, "sample", lambda self, shape=(): torch.tensor(0.3))


# ------------------------------------------------------------------------------------------ mixing


def test_mixup_of_three_images_by_hand(weight_of_three_tenths):
    images = torch.stack([torch.full((1, 2, 2), value) for value in (1.0, 10.0, 100.0)])
    mixed, labels = Mixing(4, mixup=0.8)(images, torch.tensor([0, 1, 3]))
    # 0.3 of its own, 0.7 of the one before it.
    expected = torch.tensor([0.3 * 1 + 0.7 * 100, 0.3 * 10 + 0.7 * 1, 0.3 * 100 + 0.7 * 10]).view(3, 1, 1, 1)
    torch.testing.assert_close(mixed, expected.expand(3, 1, 2, 2))
    torch.testing.assert_close(labels, torch.tensor([[0.3, 0, 0, 0.7], [0.7, 0.3, 0, 0], [0, 0.7, 0, 0.3]]))


def test_cutmix_of_three_images_by_hand(monkeypatch):
    monkeypatch.setattr(torch.distributions.Beta, "sample", lambda self, shape=(): torch.tensor(0.75))
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: torch.tensor([2 if args[0] == 8 else 0]))
    images = torch.stack([torch.full((1, 4, 8), value) for value in (1.0, 10.0, 100.0)])
    mixed, labels = Mixing(3, cutmix=1.0)(images, torch.tensor([0, 1, 2]))
    # A box of half the sides around row 0 and column 2: rows 0 up to 1, columns 0 up to 4, an eighth of the area.
    own = torch.ones(4, 8)
    own[0:1, 0:4] = 0
    for i, (mine, other) in enumerate([(1.0, 100.0), (10.0, 1.0), (100.0, 10.0)]):
        assert torch.equal(mixed[i, 0], torch.where(own == 1, mine, other))
    torch.testing.assert_close(labels, torch.tensor([[7, 0, 1], [1, 7, 0], [0, 1, 7]]) / 8)


def test_labels_say_how_much_of_each_image_is_there():
    images = F.one_hot(torch.arange(6), 6).float().view(6, 6, 1, 1).expand(6, 6, 16, 16)  # channel i marks image i
    for seed in range(40):
        mixing = Mixing(6, mixup=0.8, cutmix=1.0)
        mixed, labels = mixing(images, torch.arange(6), np.random.default_rng(seed))
        torch.testing.assert_close(mixed.mean(dim=(2, 3)), labels)
        torch.testing.assert_close(labels.sum(dim=1), torch.ones(6))


def test_mixup_and_cutmix_take_turns_by_chance():
    images = F.one_hot(torch.arange(4), 4).float().view(4, 4, 1, 1).expand(4, 4, 16, 16)
    cut = 0
    for seed in range(200):
        mixed, _ = Mixing(4, mixup=0.8, cutmix=1.0)(images, torch.arange(4), np.random.default_rng(seed))
        cut += bool(((mixed == 0) | (mixed == 1)).all())  # a box has the pixels of one image or of the other
    assert 70 <= cut <= 130


def test_weights_follow_the_beta_distribution():
    weights = []
    for seed in range(2000):
        labels = Mixing(2, mixup=0.8)(torch.zeros(2, 1, 1, 1), torch.tensor([0, 1]), np.random.default_rng(seed))[1]
        weights.append(float(labels[0, 0]))
    # Beta(a, a) has mean 1/2 and variance 1 / (4 (2 a + 1)).
    assert np.mean(weights) == pytest.approx(0.5, abs=0.03)
    assert np.var(weights) == pytest.approx(1 / (4 * 2.6), rel=0.06)


def test_label_smoothing_by_hand_with_mixing_and_without(weight_of_three_tenths):
    images, labels = torch.zeros(2, 1, 2, 2), torch.tensor([0, 2])
    plain = Mixing(4, label_smoothing=0.1)(images, labels)[1]
    torch.testing.assert_close(plain, torch.tensor([[0.925, 0.025, 0.025, 0.025], [0.025, 0.025, 0.925, 0.025]]))
    mixed = Mixing(4, mixup=0.8, label_smoothing=0.1)(images, labels)[1]
    expected = torch.tensor([0.27 + 0.025, 0.025, 0.63 + 0.025, 0.025])
    torch.testing.assert_close(mixed, torch.stack([expected, expected[[2, 1, 0, 3]]]))


def test_soft_labels_without_mixing_give_torchs_smoothed_cross_entropy():
    logits, labels = torch.randn(5, 7), torch.tensor([3, 0, 6, 2, 2])
    _, smooth = Mixing(7, label_smoothing=0.1)(torch.zeros(5, 1, 1, 1), labels)
    torch.testing.assert_close(F.cross_entropy(logits, smooth), F.cross_entropy(logits, labels, label_smoothing=0.1))


def test_with_nothing_on_a_batch_stays_as_it_is():
    images, labels = pixels(3), torch.tensor([2, 0, 1])
    same, same_labels = Mixing(3)(images, labels, np.random.default_rng(0))
    assert same is images
    assert same_labels is labels


# ------------------------------------------------------------------------------------------ random numbers


def test_libraries_draw_from_the_given_numbers_and_the_global_ones_are_left_alone():
    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    untouched = [draw() for _ in range(3)]
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    first = draw()
    with seeded(np.random.default_rng(5)):
        inside = draw()
    assert [first, draw(), draw()] == untouched
    with seeded(np.random.default_rng(5)):
        assert draw() == inside
    with seeded(np.random.default_rng(6)):
        assert draw() != inside


# ------------------------------------------------------------------------------------------ random erasing


def test_erasing_puts_noise_into_one_rectangle_of_the_stated_size():
    rng, image = np.random.default_rng(0), torch.full((3, 40, 60), 7.0)
    areas, ratios, noise, changed = [], [], [], 0
    for _ in range(400):
        erased = RandomErasing(0.25)(image, rng)
        where = erased[0] != 7
        if not where.any():
            assert torch.equal(erased, image)
            continue
        changed += 1
        rows, columns = where.any(dim=1).nonzero(), where.any(dim=0).nonzero()
        height, width = len(rows), len(columns)
        assert where.sum() == height * width  # a whole rectangle
        assert int(rows[-1] - rows[0]) + 1 == height
        areas.append(height * width / 2400)
        ratios.append(height / width)
        noise.append(erased[:, where].flatten())
    assert 70 <= changed <= 130
    assert 0.015 < min(areas) < 0.06
    assert 0.25 < max(areas) < 0.35
    assert min(ratios) < 0.5 < 2 < max(ratios)
    values = torch.cat(noise)
    assert float(values.mean()) == pytest.approx(0, abs=0.02)  # each pixel its own number, N(0, 1)
    assert float(values.std()) == pytest.approx(1, abs=0.02)


# ------------------------------------------------------------------------------------------ RandAugment


@pytest.mark.parametrize("channels", [1, 3])
def test_randaugment_keeps_shape_and_type_and_repeats_itself(channels):
    pytest.importorskip("timm", reason="timm is not installed: pip install 'hf-mae[train]'")
    change = RandAugment("rand-m9-mstd0.5-inc1", (32, 48), [0.5] * channels)
    image = (pixels(1, channels, 32, 48)[0].sigmoid() * 255).to(torch.uint8).numpy()
    results = [change(image, np.random.default_rng(seed)) for seed in range(40)]
    assert all(result.shape == image.shape and result.dtype == np.uint8 for result in results)
    different = sum(not np.array_equal(result, image) for result in results)
    # Two changes, each made in half of the cases.
    assert 22 <= different <= 37
    assert all(np.array_equal(change(image, np.random.default_rng(seed)), results[seed]) for seed in range(40))


def test_randaugment_is_what_timm_makes_for_the_original():
    factory = pytest.importorskip("timm.data.transforms_factory", reason="timm is not installed: hf-mae[train]")
    ours = RandAugment("rand-m9-mstd0.5-inc1", (224, 224), [0.485, 0.456, 0.406]).transform
    whole = factory.create_transform(
        224, is_training=True, auto_augment="rand-m9-mstd0.5-inc1", interpolation="bicubic", re_prob=0.25,
        re_mode="pixel", re_count=1,
    )  # fmt: skip
    (theirs,) = (step for step in whole.transforms if type(step).__name__ == "RandAugment")
    assert repr(ours) == repr(theirs)
    assert [(op.hparams, op.kwargs) for op in ours.ops] == [(op.hparams, op.kwargs) for op in theirs.ops]


@pytest.mark.slow
def test_randaugment_gets_through_thousands_of_images():
    # One image of some hundreds is asked to be posterized to 0 bits, which Pillow refuses.
    pytest.importorskip("timm", reason="timm is not installed: pip install 'hf-mae[train]'")
    for policy in ("rand-m9-mstd0.5-inc1", "rand-m10-n3"):
        change = RandAugment(policy, (8, 8), [0.5, 0.5, 0.5])
        image = np.random.default_rng(0).integers(0, 256, (3, 8, 8), dtype=np.uint8)
        assert all(change(image, np.random.default_rng(seed)).shape == (3, 8, 8) for seed in range(3000))


def test_words_that_timm_does_not_know_are_told_in_one_line():
    pytest.importorskip("timm", reason="timm is not installed: pip install 'hf-mae[train]'")
    for policy in ("strong", "rand-x9"):
        with pytest.raises(ValueError, match=f"rand_augment {policy} is unknown to timm; use e.g. rand-m9-mstd0.5"):
            RandAugment(policy, (32, 32), [0.5])

import random

import numpy as np
import pytest
import torch
from memory_source import MemorySource, memory_rows, noise_images
from PIL import Image
from tiny import pixels
from torch.nn import functional as F

from hf_mae import MAEImageProcessorPil
from hf_mae.data.labelled import Collator, LabelledImages, without_bad
from hf_mae.data.mix import Mixing, RandAugment, RandomErasing, seeded
from hf_mae.data.order import Rows
from hf_mae.data.transform import ImageSpec, pixel_dtype, resize_before_crop
from hf_mae.errors import DataError
from hf_mae.image_processing_mae import MAEImageProcessor

SPEC = ImageSpec(size=(6, 5), num_channels=1, dtype="uint8", num_patches=1, eval_resize=(6, 5))


def processor(channels: int = 1, **settings) -> MAEImageProcessor:
    mean, std = [0.4, 0.5, 0.6][:channels], [0.2, 0.25, 0.3][:channels]
    return MAEImageProcessor(num_channels=channels, image_mean=mean, image_std=std, **settings)


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
        with pytest.raises(ValueError, match=f"rand_augment {policy} is nothing that timm knows; use rand-m9-mstd0.5"):
            RandAugment(policy, (32, 32), [0.5])


# ------------------------------------------------------------------------------------------ labelled images


def test_the_scoring_view_is_pixel_by_pixel_the_image_processors():
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((300, 260), (257, 400), (256, 256))]
    settings = {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}
    assert resize_before_crop((224, 224), 0.875) == 256
    ours = processor(3, **settings)
    view = ImageSpec(size=(224, 224), num_channels=3, dtype=pixel_dtype(ours), num_patches=196, eval_resize=256)
    dataset = LabelledImages(Rows(MemorySource([images])), torch.arange(3), view, ours)
    pil = MAEImageProcessorPil(num_channels=3, image_mean=ours.image_mean, image_std=ours.image_std, **settings)
    for i, image in enumerate(images):
        expected = pil(Image.fromarray(image), return_tensors="pt").pixel_values[0]
        torch.testing.assert_close(dataset[i]["pixel_values"], expected, atol=2e-6, rtol=0)
        assert dataset[i]["labels"] == i
        assert "rng" not in dataset[i]


@pytest.mark.parametrize(("factor", "dtype"), [(1 / 255, "uint8"), (1 / 65535, "uint16"), (None, "float32")])
def test_a_processor_tells_which_pixels_it_was_made_for(factor, dtype):
    rescale = {"do_rescale": False} if factor is None else {"rescale_factor": factor}
    assert pixel_dtype(processor(**rescale)) == dtype


def test_training_views_are_functions_of_seed_epoch_and_row():
    def view_of(index: int, seed: int, epoch: int, **options) -> torch.Tensor:
        rows = memory_rows([4, 3], **options)
        dataset = LabelledImages(rows, torch.arange(len(rows)), SPEC, processor(), seed, random_erasing=0.5)
        dataset.set_epoch(epoch)
        return dataset[index]["pixel_values"]

    assert torch.equal(view_of(5, 0, 0), view_of(5, 0, 0))
    # The fifth of all rows is the third of every other one.
    assert torch.equal(view_of(4, 0, 0), view_of(2, 0, 0, max_samples=4))
    assert not torch.equal(view_of(5, 0, 0), view_of(5, 1, 0))
    assert not torch.equal(view_of(5, 0, 0), view_of(5, 0, 1))


def test_an_epoch_leaves_out_other_rows_so_that_every_batch_is_whole():
    rows = memory_rows([10])
    dataset = LabelledImages(rows, torch.arange(10), SPEC, processor(), seed=0, multiple=4)
    assert len(dataset) == 8
    seen = []
    for epoch in range(30):
        dataset.set_epoch(epoch)
        labels = [int(dataset[i]["labels"]) for i in range(8)]
        assert len(set(labels)) == 8
        seen += labels
    assert 15 < min(seen.count(i) for i in range(10)) < max(seen.count(i) for i in range(10)) <= 30  # 24 on average
    # The view of a row does not depend on its place.
    whole = LabelledImages(rows, torch.arange(10), SPEC, processor(), seed=0)
    whole.set_epoch(29)
    sample = dataset[3]
    assert torch.equal(whole[int(sample["labels"])]["pixel_values"], sample["pixel_values"])
    assert len(LabelledImages(rows, torch.arange(10), SPEC, processor(), seed=0, multiple=16)) == 10


def broken_rows(bad: set[int], count: int = 12) -> Rows:
    images: list = list(noise_images([count])[0])
    return Rows(MemorySource([[b"no image" if i in bad else image for i, image in enumerate(images)]]))


def test_a_broken_training_image_is_replaced_and_named_in_the_first_epoch(tmp_path):
    file = tmp_path / "bad.jsonl"
    targets = torch.arange(12)
    dataset = LabelledImages(broken_rows({3, 7}), targets, SPEC, processor(), seed=0, bad_file=file)
    samples = [dataset[i] for i in range(12)]
    assert [int(samples[i]["labels"]) for i in range(12) if i not in (3, 7)] == [0, 1, 2, 4, 5, 6, 8, 9, 10, 11]
    assert not {int(samples[3]["labels"]), int(samples[7]["labels"])} & {3, 7}
    lines = file.read_text().splitlines()
    assert '{"key": "shard0#3", "reason": "UnidentifiedImageError"}' in lines
    assert any('"shard0#7"' in line for line in lines)
    dataset.set_epoch(1)
    assert dataset[3]["pixel_values"].shape == (1, 6, 5)
    assert file.read_text().splitlines() == lines


def test_the_label_of_a_replacement_is_its_own():
    images = [np.full((6, 5, 1), 20 * i, dtype=np.uint8) for i in range(8)]
    source = MemorySource([[b"" if i == 2 else image for i, image in enumerate(images)]])
    dataset = LabelledImages(Rows(source), torch.arange(8), SPEC, processor(), seed=0)
    sample = dataset[2]
    gray = (sample["pixel_values"] * 0.2 + 0.4) * 255
    torch.testing.assert_close(gray, torch.full((1, 6, 5), 20.0 * int(sample["labels"])), atol=1e-3, rtol=0)


def test_a_data_set_of_broken_images_stops_with_one_line():
    dataset = LabelledImages(broken_rows(set(range(12))), torch.arange(12), SPEC, processor(), seed=0)
    with pytest.raises(DataError, match=r"10 random images of memory in a row can't be decoded \(shard0#.*check"):
        dataset[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_taken_out_of_what_is_scored(workers):
    rows = broken_rows({0, 5, 11})
    bad = without_bad(rows, SPEC, workers)
    assert bad == [(f"shard0#{i}", "UnidentifiedImageError") for i in (0, 5, 11)]
    assert rows.index.tolist() == [1, 2, 3, 4, 6, 7, 8, 9, 10]
    with pytest.raises(DataError, match="none of 12 images of memory can be decoded"):
        without_bad(broken_rows(set(range(12))), SPEC)


def test_only_training_samples_are_mixed():
    rows, targets = memory_rows([4]), torch.tensor([0, 1, 0, 1])
    collate = Collator(Mixing(2, mixup=0.8, label_smoothing=0.1))
    trained, scored = (LabelledImages(rows, targets, SPEC, processor(), seed) for seed in (0, None))
    batch = collate([trained[i] for i in range(4)])
    assert batch["labels"].shape == (4, 2)
    again = collate([trained[i] for i in range(4)])
    assert all(torch.equal(batch[key], again[key]) for key in batch)  # also by the images' own numbers
    batch = collate([scored[i] for i in range(4)])
    assert torch.equal(batch["labels"], targets)
    assert torch.equal(batch["pixel_values"][2], scored[2]["pixel_values"])
    assert set(batch) == {"pixel_values", "labels"}

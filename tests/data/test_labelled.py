import numpy as np
import pytest
import torch
from memory_source import MemorySource, memory_rows, noise_images
from PIL import Image

from hf_mae import MAEImageProcessorPil
from hf_mae.data.labelled import Collator, LabelledImages, without_bad
from hf_mae.data.mix import Mixing
from hf_mae.data.order import Rows
from hf_mae.data.transform import ImageSpec, pixel_dtype, resize_before_crop
from hf_mae.errors import DataError
from hf_mae.image_processing_mae import MAEImageProcessor

SPEC = ImageSpec(size=(6, 5), num_channels=1, dtype="uint8", num_patches=1, eval_resize=(6, 5))


def processor(channels: int = 1, **settings) -> MAEImageProcessor:
    mean, std = [0.4, 0.5, 0.6][:channels], [0.2, 0.25, 0.3][:channels]
    return MAEImageProcessor(num_channels=channels, image_mean=mean, image_std=std, **settings)


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

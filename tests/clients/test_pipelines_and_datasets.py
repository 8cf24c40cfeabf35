"""transformers' pipelines and a `datasets` program, from a saved folder."""

import datasets
import numpy as np
import pytest
import torch
from peers import CLASSIFIERS, ENCODERS, NAMES, classifier, encoder
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, BitImageProcessor, ViTImageProcessor, pipeline

from hf_mae import MAEImageProcessor

PROCESSORS = {"ours": MAEImageProcessor, "dinov2": BitImageProcessor, "vit": ViTImageProcessor}


@pytest.fixture
def photos():
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (40, 50 + i, 3), dtype=np.uint8)) for i in range(5)]


def saved(model, name, folder):
    model.save_pretrained(folder)
    crop = {} if name == "vit" else {"crop_size": {"height": 32, "width": 32}}
    size = {"height": 32, "width": 32} if name == "vit" else {"shortest_edge": 36}
    PROCESSORS[name](size=size, **crop).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_image_classification_of_images_paths_and_batches(name, photos, tmp_path):
    model = classifier(name)
    folder = saved(model, name, tmp_path)
    photos[0].save(tmp_path / "photo.png")
    inputs = AutoImageProcessor.from_pretrained(folder)(photos, return_tensors="pt")
    with torch.no_grad():
        scores = model(**inputs).logits.softmax(dim=1)
    classify = pipeline("image-classification", model=folder, device="cpu")
    answers = classify(photos, batch_size=3, top_k=2)
    for answer, row in zip(answers, scores, strict=True):
        best = row.topk(2)
        assert [one["label"] for one in answer] == [NAMES[i] for i in best.indices.tolist()]
        assert [one["score"] for one in answer] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert classify(str(tmp_path / "photo.png"), top_k=2)[0]["score"] == pytest.approx(answers[0][0]["score"], abs=1e-5)
    one = classify(photos[0], function_to_apply="none")
    with torch.no_grad():
        expected = model(inputs["pixel_values"][:1]).logits.max().item()
    assert one[0]["score"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ENCODERS)
def test_feature_extraction_with_and_without_pooling(name, photos, tmp_path):
    model = encoder(name)
    folder = saved(model, name, tmp_path)
    inputs = AutoImageProcessor.from_pretrained(folder)(photos[:2], return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs)
    for pool, key in ((False, "last_hidden_state"), (True, "pooler_output")):
        extract = pipeline("image-feature-extraction", model=folder, device="cpu", pool=pool)
        for features, row in zip(extract(photos[:2], return_tensors=True), expected[key], strict=True):
            torch.testing.assert_close(features[0], row, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_datasets_map_in_batches_and_torch_format_feed_the_model(name, photos, tmp_path):
    folder = saved(classifier(name), name, tmp_path)
    processor = AutoImageProcessor.from_pretrained(folder)
    rows = datasets.Dataset.from_dict(
        {"image": photos, "label": [0, 1, 2, 0, 1]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
    )
    mapped = rows.map(lambda batch: processor(batch["image"]), batched=True, batch_size=2, remove_columns=["image"])
    mapped = mapped.rename_column("label", "labels")
    mapped.set_format("torch")
    batch = next(iter(DataLoader(mapped, batch_size=5)))
    assert batch["pixel_values"].shape == (5, 3, 32, 32)
    torch.testing.assert_close(batch["pixel_values"], processor(photos, return_tensors="pt")["pixel_values"])
    assert classifier(name)(**batch).loss.item() > 0


@pytest.mark.parametrize("return_tensors", [None, "np", "pt"])
@pytest.mark.parametrize("name", PROCESSORS)
def test_a_processor_returns_what_is_asked_for(name, return_tensors, photos):
    values = PROCESSORS[name]()(photos, return_tensors=return_tensors)["pixel_values"]
    kind = {None: list, "np": np.ndarray, "pt": torch.Tensor}[return_tensors]
    assert isinstance(values, kind)
    assert len(values) == 5
    assert tuple(values[0].shape) == (3, 224, 224)

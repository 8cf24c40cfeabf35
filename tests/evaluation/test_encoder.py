"""Frozen features are those of the saved encoder and image processor."""

import numpy as np
import pytest
import torch
from features import table_of
from memory_source import MemorySource, noise_images
from tiny import save_model

from hf_mae import MAEForPreTraining, MAEImageProcessor, MAEModel
from hf_mae.data.order import Rows
from hf_mae.data.sources import DataError, open_source
from hf_mae.evaluation.encoder import FrozenEncoder


@pytest.fixture
def folder(tmp_path):
    return save_model(tmp_path / "model")


@pytest.mark.parametrize("pooling", ["mean", "cls", "both", "patches"])
def test_features_are_what_the_saved_processor_and_encoder_give(folder, pooling):
    encoder, source = FrozenEncoder(folder, pooling), open_source("digits")
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    table = table_of(encoder, Rows(source, max_samples=20))
    rows = torch.linspace(0, len(source) - 1, 20).round().long().tolist()
    images = [row.image for row in source.read(0, rows)]
    assert table.labels == [row.label for row in source.read(0, rows)]
    assert table.keys == [row.key for row in source.read(0, rows)]
    pixel_values = MAEImageProcessor.from_pretrained(folder)(images, return_tensors="pt").pixel_values
    with torch.no_grad():
        tokens = MAEModel.from_pretrained(folder)(pixel_values).last_hidden_state
    expected = {
        "mean": sum(tokens[:, 1 + patch] for patch in range(4)) / 4,
        "cls": tokens[:, 0],
        "both": torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1),
        "patches": tokens[:, 1:],
    }[pooling]
    torch.testing.assert_close(table.values, expected, atol=1e-5, rtol=0)
    if pooling != "patches":
        assert table.values.shape == (20, encoder.width)
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())


@pytest.mark.parametrize(
    ("channels", "size", "patch", "dtype"),
    [(13, (24, 16), (8, 4), np.uint16), (2, (8, 24), 4, np.float32), (3, (16, 16), 8, np.uint8)],
)  # fmt: skip
def test_images_of_any_shape_channels_and_type_have_features(tmp_path, channels, size, patch, dtype):
    factor = {np.uint8: 1 / 255, np.uint16: 1 / 65535, np.float32: 1.0}[dtype]
    folder = save_model(tmp_path / "model", channels, size, patch, factor)
    images = noise_images([6], (20, 18, channels), dtype)
    encoder = FrozenEncoder(folder, "mean")
    table = table_of(encoder, Rows(MemorySource(images)), batch_size=4)
    pixel_values = MAEImageProcessor.from_pretrained(folder)(
        list(images[0].transpose(0, 3, 1, 2)), return_tensors="pt", input_data_format="channels_first"
    ).pixel_values
    with torch.no_grad():
        expected = MAEModel.from_pretrained(folder)(pixel_values).pooler_output
    # The two libraries' filters may differ by a step of the pixels' unit.
    torch.testing.assert_close(table.values, expected, atol=2e-2, rtol=0)
    assert table.values.std(dim=0).mean() > 1e-3


def test_features_do_not_depend_on_the_size_of_the_batch(tmp_path):
    folder = save_model(tmp_path / "model", 3, (32, 32), 8)
    encoder, rows = FrozenEncoder(folder, "mean"), Rows(MemorySource(noise_images([37], (40, 36, 3))))
    tables = [table_of(encoder, rows, batch_size).values for batch_size in (1, 7, 16, 64)]
    for table in tables[1:]:
        torch.testing.assert_close(table, tables[0], atol=1e-6, rtol=0)


def test_a_model_saved_in_half_precision_is_used_in_float32(folder, tmp_path):
    MAEForPreTraining.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    MAEImageProcessor.from_pretrained(folder).save_pretrained(tmp_path / "half")
    encoder = FrozenEncoder(str(tmp_path / "half"), "mean")
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}


def test_autocast_changes_features_a_little(folder):
    rows = Rows(open_source("digits"), max_samples=20)
    exact, fast = (table_of(FrozenEncoder(folder, "mean", how), rows).values for how in ("no", "bf16"))
    assert fast.dtype == torch.float32
    assert 0 < (exact - fast).abs().max() < 0.1


def test_a_frozen_encoder_can_not_be_put_into_training_mode(folder):
    encoder = FrozenEncoder(folder, "mean")
    torch.nn.Sequential(encoder).train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_images_that_can_not_be_decoded_are_left_out_and_named(folder):
    images = [
        bytes([number]) * 9 if number in (3, 4, 5, 11) else image for number, image in enumerate(noise_images([12])[0])
    ]
    table = table_of(FrozenEncoder(folder, "mean"), Rows(MemorySource([images], labels=range(12))), batch_size=2)
    assert table.labels == [0, 1, 2, 6, 7, 8, 9, 10]
    assert table.values.shape[0] == 8
    assert set(table.bad) <= {(f"shard0#{number}", "UnidentifiedImageError") for number in (3, 4, 5, 11)}
    assert ("shard0#3", "UnidentifiedImageError") in table.bad
    assert table.num_rows == 12


def test_nothing_but_bad_images_is_an_error(folder):
    with pytest.raises(DataError, match="none of the 3 images of split train of memory can be decoded"):
        table_of(FrozenEncoder(folder, "mean"), Rows(MemorySource([[b"no"] * 3])))

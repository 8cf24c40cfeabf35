"""Configs and processors from elsewhere with numbers that no model has: one line says so, and no memory is filled."""

import json
import resource
from pathlib import Path

import numpy as np
import pytest
from peers import SHAPE, pretrainer
from PIL import Image
from tiny import PROCESSORS

from hf_mae import MAEConfig, MAEForImageClassification, MAEImageProcessor
from hf_mae.cli import main

HUGE, NAN, INF = 10**12, float("nan"), float("inf")
CONFIGS = [
    *({key: HUGE} for key in SHAPE),
    *({key: 0} for key in SHAPE),
    *({key: -4} for key in SHAPE),
    {"num_channels": HUGE}, {"num_channels": 0}, {"num_labels": HUGE}, {"mask_cell": HUGE}, {"mask_cell": 0},
    {"patch_size": 1, "image_size": 2**16}, {"image_size": [32]}, {"patch_size": [8, 8, 8]}, {"image_size": [32, HUGE]},
    {"layer_norm_eps": NAN}, {"layer_norm_eps": -1e-6}, {"initializer_range": INF}, {"head_initializer_range": NAN},
    {"drop_path_rate": NAN}, {"drop_path_rate": 1.0}, {"mask_ratio": NAN}, {"mask_ratio": INF}, {"mask_ratio": -0.1},
    {"decoder_attention": "cross", "prediction_ratio": NAN}, {"eval_mask_seed": 2**70}, {"eval_mask_seed": -1},
    {"pyramid_scales": [1e300]}, {"pyramid_scales": [0.0]}, {"pyramid_scales": [NAN]}, {"out_indices": [99]},
]  # fmt: skip
SQUARES = [{"height": side, "width": side} for side in (HUGE, 2**15, 0, -8)]
PROCESSOR_SETTINGS = [
    *({key: square} for key in ("size", "crop_size") for square in SQUARES),
    *({"size": {"shortest_edge": edge}} for edge in (HUGE, 2**15, 0, -5)),
    {"size": HUGE}, {"crop_size": HUGE}, {"size": {"longest_edge": 32}}, {"crop_size": {"shortest_edge": 32}},
    {"num_channels": HUGE}, {"num_channels": 0}, {"num_channels": -3},
    *({"rescale_factor": factor} for factor in (0.0, -1.0, 1e300, NAN, INF)),
    {"image_mean": []}, {"image_mean": [0.5] * 2}, {"image_mean": [0.5] * 10**5}, {"image_mean": [NAN] * 3},
    {"image_std": [1.0] * 4}, {"image_std": [0.0] * 3}, {"image_std": [-1.0] * 3}, {"image_std": [INF] * 3},
    {"image_std": 0.0},
]  # fmt: skip


def name_of(settings) -> str:
    return str(settings)[:60]


@pytest.fixture(autouse=True)
def one_gigabyte_more():
    """An allocation above 1 GiB fails, instead of filling the machine."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def assert_one_line(error) -> None:
    assert "\n" not in (message := str(error))
    assert 20 < len(message) < 250, message


@pytest.mark.parametrize("settings", CONFIGS, ids=name_of)
def test_an_absurd_config_is_refused_in_one_line(settings, tmp_path):
    with pytest.raises(ValueError, match=next(reversed(settings))) as caught:
        MAEConfig(**SHAPE | settings)
    assert_one_line(caught.value)
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | settings | {"model_type": "mae"}))
    with pytest.raises(ValueError, match=next(reversed(settings))):
        MAEForImageClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("settings", PROCESSOR_SETTINGS, ids=name_of)
@pytest.mark.parametrize("backend", PROCESSORS)
def test_absurd_settings_of_a_processor_are_refused_in_one_line(backend, settings, tmp_path):
    photo = Image.fromarray(np.zeros((40, 50, 3), np.uint8))
    (name,) = settings
    for make in (
        lambda: PROCESSORS[backend](**settings)(photo, return_tensors="pt"),
        lambda: PROCESSORS[backend]()(photo, return_tensors="pt", **settings),
    ):
        with pytest.raises(ValueError, match=name) as caught:
            make()
        assert_one_line(caught.value)


@pytest.mark.parametrize("backend", PROCESSORS)
@pytest.mark.parametrize("size", [(1, 20000), (20000, 1)])
def test_a_long_narrow_size_is_not_absurd(backend, size):
    sides = dict(zip(("height", "width"), size, strict=True))
    processor = PROCESSORS[backend](size=sides, crop_size=sides)
    photo = Image.fromarray(np.zeros((40, 50, 3), np.uint8))
    assert processor(photo, return_tensors="pt")["pixel_values"].shape == (1, 3, *size)


@pytest.mark.parametrize(
    "settings",
    [
        {"crop_size": SQUARES[0]},
        {"size": {"shortest_edge": 0}},
        {"rescale_factor": INF},
        {"image_std": [0.0] * 3},
        {"num_channels": HUGE},
    ],
    ids=name_of,
)
def test_commands_refuse_a_model_with_an_absurd_processor(settings, tmp_path, capsys):
    pretrainer("ours").save_pretrained(tmp_path)
    processor = MAEImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    stored = processor.to_dict() | settings
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stored))
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(tmp_path / "photo.png")
    capsys.readouterr()
    photo, output = str(tmp_path / "photo.png"), str(tmp_path / "out.png")
    assert main(["reconstruct", photo, "--model", str(tmp_path), "--output", output]) == 2
    error = capsys.readouterr().err
    assert next(iter(settings)) in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out.png").exists()

"""What pretraining, fine-tuning, evaluation, conversion, reconstruction and the image processor see of an image."""

import math
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from memory_source import MemorySource, random_image
from timm.data import create_transform

from hf_mae import FinetuneRecipe, MAEConfig, MAEImageProcessor, MAEImageProcessorPil, PretrainRecipe
from hf_mae.conversion import convert
from hf_mae.conversion.processors import evaluation_processor
from hf_mae.data.labelled import LabelledImages
from hf_mae.data.loader import EvaluationSet
from hf_mae.data.order import Rows
from hf_mae.data.stats import probe_rows
from hf_mae.data.transform import ImageSpec, evaluation_spec, make_normalizer
from hf_mae.errors import UserError
from hf_mae.keys.publishing_keys import ConvertRecipe
from hf_mae.training import finetune_setup
from hf_mae.training.build import PretrainData, build_processor, make_spec
from hf_mae.visualize import command

ROWS = Rows(MemorySource([[random_image(*shape) for shape in ((50, 70), (33, 31), (300, 260), (9, 400))]]))
SIZES = [*((side, side) for side in range(8, 513)), (208, 320), (33, 65), (512, 8)]


@pytest.fixture
def reconstructed(monkeypatch):
    """(processor of a model, size of its images, size asked for) -> a Reconstructor."""

    def make(processor: MAEImageProcessor, own: tuple[int, int], other: tuple[int, int] | None = None):
        config = config_of(other or own)
        model = SimpleNamespace(config=config, to=lambda device: None)
        monkeypatch.setattr(command, "load_with_processor", lambda kind, path, **overrides: (model, processor))
        return command.Reconstructor("model", other)

    return make


def config_of(size: tuple[int, int]) -> MAEConfig:
    return MAEConfig(image_size=list(size), patch_size=list(size), mask_ratio=0.0, hidden_size=4, num_attention_heads=1)


def expected_resize(size: tuple[int, int], crop_pct: str) -> int | tuple[int, int]:
    height, width = (math.floor(side / Fraction(crop_pct)) for side in size)
    return height if size[0] == size[1] else (height, width)


def resize_of(processor: MAEImageProcessor) -> int | tuple[int, int]:
    sizes = dict(processor.size)
    return sizes.get("shortest_edge") or (sizes["height"], sizes["width"])


def pretraining(config: MAEConfig, crop_pct: float) -> tuple[MAEImageProcessor, ImageSpec]:
    recipe, data = PretrainRecipe(eval_crop_pct=crop_pct), PretrainData(ROWS, ROWS, 3, probe_rows(ROWS), "")
    processor = build_processor(recipe, None, data, config)
    return processor, make_spec(recipe, data, config, processor)


def finetuning(config: MAEConfig, crop_pct: float | None) -> tuple[MAEImageProcessor, ImageSpec]:
    processor = finetune_setup.build_processor(FinetuneRecipe(model="model", eval_crop_pct=crop_pct), config)
    return processor, evaluation_spec(config, processor)


@pytest.fixture(autouse=True)
def a_pretrained_models_processor(monkeypatch):
    """Fine-tuning reads it from a folder, which takes time at a thousand sizes."""
    monkeypatch.setattr(MAEImageProcessor, "from_pretrained", lambda path, **settings: MAEImageProcessor(**settings))


@pytest.mark.parametrize(
    "crop_pct", ["0.875", "1", *(pytest.param(pct, marks=pytest.mark.slow) for pct in ("0.9", "0.77"))]
)
def test_every_command_resizes_and_crops_alike_at_every_size(crop_pct, reconstructed):
    for size in SIZES:
        config = config_of(size)
        processors = [
            pretraining(config, float(crop_pct))[0], finetuning(config, float(crop_pct))[0],
            evaluation_processor(config, float(crop_pct)),
        ]  # fmt: skip
        specs = [pretraining(config, float(crop_pct))[1], *(evaluation_spec(config, one) for one in processors)]
        specs.append(reconstructed(processors[0], size).spec)
        resizes = {resize_of(one) for one in processors} | {spec.eval_resize for spec in specs}
        assert resizes == {expected_resize(size, crop_pct)}, size
        crops = {(one.crop_size["height"], one.crop_size["width"]) for one in processors}
        assert crops | {spec.size for spec in specs} == {size}


def test_the_default_crop_is_the_same_for_fine_tuning_and_conversion():
    for size in SIZES:
        config = config_of(size)
        expected = expected_resize(size, "0.875" if max(size) <= 224 else "1")
        processors = finetuning(config, None)[0], evaluation_processor(config)
        assert {resize_of(one) for one in processors} == {expected}, size


@pytest.mark.parametrize("crop_pct", ["0.875", "1"])
def test_reconstruction_at_another_size_crops_as_a_model_of_that_size(crop_pct, reconstructed):
    processor = evaluation_processor(config_of((224, 224)), float(crop_pct))
    for size in SIZES:
        spec = reconstructed(processor, (224, 224), size).spec
        assert (spec.size, spec.eval_resize) == (size, expected_resize(size, crop_pct))


@pytest.mark.parametrize("own", [(8, 8), (32, 32), (224, 224), (208, 320)], ids=str)
@pytest.mark.parametrize("crop_pct", ["0.875", "1", "0.9", "0.95", "0.77", "0.6"])
def test_reconstruction_and_conversion_at_another_size_keep_the_crops_share(own, crop_pct, reconstructed):
    def moved(size, source):
        config = config_of(own)
        model = SimpleNamespace(config=config, resize_input=lambda to, _: setattr(config, "image_size", [*size]))
        source = SimpleNamespace(model=model, processor=source)
        convert._adapt(source, ConvertRecipe(model="a", output_dir="b", image_size=[*size]))
        assert evaluation_spec(config, source.processor).size == size
        return resize_of(source.processor)

    for size in SIZES[::7]:
        stored = [evaluation_processor(config_of(own), float(crop_pct)) for _ in range(2)]
        resizes = {moved(size, stored[0]), reconstructed(stored[1], own, size).spec.eval_resize}
        assert len(resizes) == 1, size
        if max(own) > 200 or crop_pct == "0.875":  # of 8 pixels, 0.9 and 0.95 leave no trace
            assert resizes == {expected_resize(size, crop_pct)}, size


def test_a_224_model_moved_to_448_is_cropped_out_of_512(reconstructed):
    for stored in ({"shortest_edge": 256}, {"height": 256, "width": 256}):
        processor = MAEImageProcessor(size=stored, crop_size={"height": 224, "width": 224})
        assert reconstructed(processor, (224, 224), (448, 448)).spec.eval_resize == 512


@pytest.mark.parametrize(
    "settings",
    [
        {"resample": 2}, {"resample": 1}, {"do_normalize": False}, {"rescale_factor": 1 / 127.5},
        {"rescale_factor": 0.00392157}, {"do_rescale": False, "resample": 0}, {"image_mean": 0.5, "image_std": 0.25},
        {"do_center_crop": False, "size": {"height": 32, "width": 32}},
    ],
    ids=str,
)  # fmt: skip
def test_evaluation_sees_the_pixels_of_the_image_processor_whatever_its_settings(settings, reconstructed):
    sizes = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
    processor, pil = (kind(**{**sizes, **settings}) for kind in (MAEImageProcessor, MAEImageProcessorPil))
    images = ROWS.source.shards[0]
    expected = torch.cat([pil(image, return_tensors="pt").pixel_values for image in images])
    spec = evaluation_spec(config_of((32, 32)), processor)
    (batch,) = EvaluationSet(ROWS, spec, len(ROWS))
    found = make_normalizer(processor)(batch.images)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-6)
    assert torch.equal(reconstructed(processor, (32, 32)).pixel_values(images).cpu(), found)


@pytest.mark.parametrize("settings", [{"do_resize": False}, {"do_center_crop": False}, {}], ids=str)
def test_a_processor_that_gives_other_sizes_than_the_models_is_refused_in_one_line(settings):
    with pytest.raises(UserError, match=r"gives images of .*, not of the model's \(32, 32\)$"):
        evaluation_spec(config_of((32, 32)), MAEImageProcessor(**settings))


def test_the_resize_is_timms():
    for side in range(8, 513, 7):
        resize = create_transform((3, side, side), is_training=False, crop_pct=0.875).transforms[0]
        assert resize.size == resize_of(evaluation_processor(config_of((side, side)), 0.875))


def test_a_stored_processor_keeps_its_sizes(reconstructed):
    # Pretraining rounded to the nearest once: 32 / 0.875 was 37.
    stored = MAEImageProcessor(size={"shortest_edge": 37}, crop_size={"height": 32, "width": 32})
    config, data = config_of((32, 32)), PretrainData(ROWS, ROWS, 3, probe_rows(ROWS), "")
    assert evaluation_spec(config, stored).eval_resize == 37
    assert make_spec(PretrainRecipe(eval_crop_pct=0.875), data, config, stored).eval_resize == 37
    assert reconstructed(stored, (32, 32)).spec.eval_resize == 37


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (33, 33), (224, 224), (40, 24)], ids=str)
def test_every_command_sees_the_same_pixels(size, reconstructed):
    config = config_of(size)
    processor, spec = pretraining(config, 0.875)
    (batch,) = EvaluationSet(ROWS, spec, len(ROWS))
    pixel_values = make_normalizer(processor)(batch.images)  # of pretraining, and of evaluation
    of_finetuning, view = finetuning(config, 0.875)
    labelled = LabelledImages(ROWS, torch.arange(len(ROWS)), view, of_finetuning)
    assert torch.equal(torch.stack([labelled[i]["pixel_values"] for i in range(len(ROWS))]), pixel_values)
    images = ROWS.source.shards[0]
    assert torch.equal(reconstructed(processor, size).pixel_values(images).cpu(), pixel_values)
    converted = evaluation_processor(config, 0.875)
    pil = MAEImageProcessorPil(size=dict(converted.size), crop_size=dict(converted.crop_size))
    expected = torch.cat([pil(image, return_tensors="pt").pixel_values for image in images])
    torch.testing.assert_close(pixel_values, expected, atol=2e-6, rtol=0)

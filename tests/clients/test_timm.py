"""timm: its optimizers and moving averages on our models, and our folders in transformers' wrapper of timm."""

import json

import numpy as np
import pytest
import timm
import torch
from peers import CLASSIFIERS, NAMES, batch_of, classifier, encoder, labelled_rows
from PIL import Image
from timm.models import load_checkpoint
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3, get_state_dict
from tiny import pixels
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline

from hf_mae import MAEImageProcessor
from hf_mae.cli import main

BY_NAME = pytest.mark.parametrize("name", CLASSIFIERS)


@BY_NAME
def test_a_moving_average_follows_the_weights(name):
    model = classifier(name)
    average = ModelEmaV3(model, decay=0.75)
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        average.update(model)
        for key, value in model.state_dict().items():
            expected[key] = expected[key].lerp(value, 0.25) if value.is_floating_point() else value
    for key, value in average.module.state_dict().items():
        torch.testing.assert_close(value, expected[key], atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        assert not torch.equal(average(pixels(2)).logits, model(pixels(2)).logits)


@pytest.mark.parametrize("optimizer", ["adamw", "lamb", "lion", "sgd", "adafactor"])
@BY_NAME
def test_timms_optimizers_lower_the_loss(name, optimizer):
    model, batch = classifier(name).train(), batch_of(labelled_rows())
    stepper = create_optimizer_v2(model, opt=optimizer, lr=1e-3, weight_decay=0.05)
    schedule = CosineLRScheduler(stepper, t_initial=8, warmup_t=1, warmup_lr_init=1e-4)
    losses = []
    for step in range(8):
        loss = model(**batch).loss
        loss.backward()
        stepper.step()
        stepper.zero_grad()
        schedule.step(step)
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@BY_NAME
def test_timms_groups_decay_matrices_only(name):
    model = classifier(name)
    plain, decayed = param_groups_weight_decay(model, 0.05)
    assert plain["weight_decay"] == 0
    assert all(parameter.ndim == 1 for parameter in plain["params"])
    assert all(parameter.ndim > 1 for parameter in decayed["params"])
    count = sum(len(group["params"]) for group in (plain, decayed))
    assert count == len([parameter for parameter in model.parameters() if parameter.requires_grad])
    scales = {group["lr_scale"] for group in param_groups_layer_decay(model, layer_decay=0.5)}
    assert max(scales) == 1


@BY_NAME
def test_timm_loads_a_checkpoint_of_its_own_training_script(name, tmp_path):
    model = classifier(name)
    torch.save({"state_dict": get_state_dict(model), "epoch": 3}, tmp_path / "last.pth.tar")
    other = classifier(name)
    load_checkpoint(other, str(tmp_path / "last.pth.tar"), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(other(pixels(2)).logits, model(pixels(2)).logits)


# ------------------------------------------------------------------------- our folder, converted `--to timm`


def converted(model, folder):
    model.save_pretrained(folder / "ours")
    size = {"height": 32, "width": 32}
    MAEImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder / "ours")
    assert main(["convert", str(folder / "ours"), str(folder / "timm"), "--to", "timm"]) == 0
    return folder / "timm"


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_transformers_wrapper_classifies_a_converted_folder_with_our_names(pooling, tmp_path):
    model = classifier("ours", pooling=pooling)
    folder = converted(model, tmp_path)
    wrapped = AutoModelForImageClassification.from_pretrained(folder).eval()
    assert "Timm" in type(wrapped).__name__
    torch.testing.assert_close(wrapped(pixels(3)).logits, model(pixels(3)).logits, atol=1e-5, rtol=1e-4)
    assert wrapped.config.id2label == NAMES
    assert wrapped.config.label2id == {label: number for number, label in NAMES.items()}


@torch.no_grad()
def test_transformers_wrapper_encodes_a_converted_folder(tmp_path):
    model = encoder("ours", pooling="cls")
    wrapped = AutoModel.from_pretrained(converted(model, tmp_path)).eval()
    assert "Timm" in type(wrapped).__name__
    output, expected = wrapped(pixels(3)), model(pixels(3))
    torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(output.pooler_output, expected.pooler_output, atol=1e-5, rtol=1e-4)


def test_the_pipeline_names_the_classes_of_a_converted_folder(tmp_path):
    folder = converted(classifier("ours"), tmp_path)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    answers = pipeline("image-classification", model=str(folder), device="cpu")(photo)
    ours = pipeline("image-classification", model=str(tmp_path / "ours"), device="cpu")(photo)
    assert {answer["label"] for answer in answers} == set(NAMES.values())
    assert answers[0]["label"] == ours[0]["label"]
    assert AutoImageProcessor.from_pretrained(folder)(photo, return_tensors="pt")["pixel_values"].shape == (
        1,
        3,
        32,
        32,
    )


@torch.no_grad()
def test_timm_itself_makes_a_converted_folder_and_reads_its_names(tmp_path):
    model = classifier("ours")
    folder = converted(model, tmp_path)
    made = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    torch.testing.assert_close(made(pixels(3)), model(pixels(3)).logits, atol=1e-5, rtol=1e-4)
    assert made.pretrained_cfg["label_names"] == list(NAMES.values())
    settings = json.loads((folder / "config.json").read_text())
    assert settings["label_names"] == list(NAMES.values())
    assert main(["convert", str(folder), str(tmp_path / "back")]) == 0
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "back").config.id2label == NAMES


def test_placeholders_are_not_written_as_names(tmp_path):
    folder = converted(classifier("ours", id2label={i: f"LABEL_{i}" for i in range(3)}, label2id=None), tmp_path)
    assert "label_names" not in json.loads((folder / "config.json").read_text())

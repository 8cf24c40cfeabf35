"""Quantisation: integer weights keep the outputs close, and the peer's as close."""

import copy

import pytest
import torch
from peers import CLASSIFIERS, ENCODERS, classifier, encoder, need, need_names
from tiny import pixels
from torch import nn


def similarity(one: torch.Tensor, other: torch.Tensor) -> float:
    """Cosine of two outputs; 1 means that nothing was lost."""
    return nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0).item()


@torch.no_grad()
def assert_close_but_quantised(model, quantised):
    one, other = model(pixels(4)), quantised(pixels(4))
    logits = getattr(one, "logits", None) is not None
    key = "logits" if logits else "last_hidden_state"
    assert not torch.equal(one[key], other[key])
    assert similarity(one[key], other[key]) > 0.99


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_torchs_dynamic_quantisation_of_a_classifier(name):
    model = classifier(name)
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    assert any("quantized" in type(module).__module__ for module in quantised.modules())
    assert_close_but_quantised(model, quantised)


@pytest.mark.parametrize("name", ENCODERS)
def test_torchs_dynamic_quantisation_of_an_encoder(name):
    model = encoder(name)
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    assert_close_but_quantised(model, quantised)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_torchao_makes_int8_weights(name):
    quantize_, config = need_names("torchao.quantization", "quantize_", "Int8WeightOnlyConfig", package="torchao")
    model = classifier(name)
    quantised = copy.deepcopy(model)
    quantize_(quantised, config())
    assert any("torchao" in type(p.data).__module__ for p in quantised.parameters())
    assert_close_but_quantised(model, quantised)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_optimum_quanto_makes_int8_weights_and_freezes_them(name):
    quanto = need("optimum.quanto", "optimum-quanto")
    model = classifier(name)
    quantised = copy.deepcopy(model)
    quanto.quantize(quantised, weights=quanto.qint8)
    quanto.freeze(quantised)
    assert any(isinstance(module, quanto.QLinear) for module in quantised.modules())
    assert_close_but_quantised(model, quantised)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_from_pretrained_quantises_with_a_config(name, tmp_path):
    """The line of transformers' documentation."""
    need("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import AutoModelForImageClassification, TorchAoConfig

    model = classifier(name)
    model.save_pretrained(tmp_path)
    quantised = AutoModelForImageClassification.from_pretrained(
        tmp_path, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), dtype=torch.float32
    )
    assert any("torchao" in type(p.data).__module__ for p in quantised.parameters())
    assert_close_but_quantised(model, quantised)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_half_precision_on_a_cpu_keeps_the_outputs_close(name):
    model = classifier(name)
    for dtype in (torch.bfloat16, torch.float16):
        half = copy.deepcopy(model).to(dtype)
        with torch.no_grad():
            logits = half(pixels(4).to(dtype)).logits
        assert logits.dtype == dtype
        assert similarity(model(pixels(4)).logits.detach(), logits.float()) > 0.999

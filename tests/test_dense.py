"""The backbone in transformers' dense models: feature pyramids, weights of a pretrained encoder, gradients."""

import pytest
import torch
import torch.nn.functional as F
from tiny import pixels, tiny, tiny_config
from transformers import (
    AutoModelForDepthEstimation,
    AutoModelForObjectDetection,
    AutoModelForSemanticSegmentation,
    DetrConfig,
    DPTConfig,
    RTDetrConfig,
    UperNetConfig,
)

from hf_mae import MAEBackbone, MAEConfig, MAEForPreTraining, MAEModel
from hf_mae.layers_mae import sincos_table

SCALES = [4, 2, 1, 0.5]
BOXES = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.3]])}] * 2
DETR = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_queries": 5, "num_labels": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pretrained")
    tiny(MAEForPreTraining).save_pretrained(path)
    return path


# ---------------------------------------------------------------------------------------------- the pyramid


@pytest.mark.parametrize("out_indices", [[1, 2, 3, 4], [4], None], ids=["four blocks", "the last", "the default"])
def test_a_pyramid_has_the_strides_that_its_scales_say(out_indices):
    model = tiny(MAEBackbone, out_indices=out_indices, pyramid_scales=SCALES)
    maps = model(pixels(2, 3, 48, 80)).feature_maps
    assert [tuple(map_.shape) for map_ in maps] == [(2, 48, 48 // s, 80 // s) for s in (2, 4, 8, 16)]
    assert model.channels == [48] * 4


def doubled(feature_map, deconvolution):
    """Each pixel becomes 2 x 2, each of which is a linear function of it, pixel by pixel."""
    B, _, h, w = feature_map.shape
    out = torch.zeros(B, deconvolution.out_channels, 2 * h, 2 * w)
    for a in (0, 1):
        for b in (0, 1):
            pixel = torch.einsum("bdhw,de->behw", feature_map, deconvolution.weight[:, :, a, b])
            out[:, :, a::2, b::2] = pixel + deconvolution.bias.view(-1, 1, 1)
    return out


@pytest.mark.parametrize("out_indices", [[1, 2, 3, 4], [4]], ids=["four blocks", "the last"])
@torch.no_grad()
def test_the_levels_are_what_figure_2_of_vitdet_says(out_indices):
    model = tiny(MAEBackbone, out_indices=out_indices, pyramid_scales=SCALES)
    images = pixels(2, 3, 32, 48)
    tokens = model(images, output_hidden_states=True).hidden_states
    plain = [tokens[i][:, 1:].transpose(1, 2).reshape(2, 48, 4, 6) for i in out_indices]
    first, second, third, fourth = plain * 4 if len(plain) == 1 else plain
    (up, again), norm = model.pyramid[0].doublings, model.pyramid[0].norms[0]
    middle = doubled(first, up).permute(0, 2, 3, 1)
    centred = middle - middle.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight + norm.bias
    expected = [
        doubled(F.gelu(normed).permute(0, 3, 1, 2), again),
        doubled(second, model.pyramid[1].doublings[0]),
        third,
        torch.stack([fourth[:, :, a::2, b::2] for a in (0, 1) for b in (0, 1)]).amax(0),
    ]
    for level, (map_, wanted) in enumerate(zip(model(images).feature_maps, expected, strict=True)):
        torch.testing.assert_close(map_, wanted, atol=1e-5, rtol=1e-5, msg=f"level {level}")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"pyramid_scales": [4, 3]}, r"pyramid_scales \[4, 3\] are not all powers of two from 1/64 to 64; give e.g."),
        ({"pyramid_scales": [0, 1]}, r"pyramid_scales \[0, 1\] are not all powers of two"),
        (
            {"pyramid_scales": SCALES, "out_indices": [2, 4]},
            r"\[4, 2, 1, 0.5\] don't match the 2 maps of out_indices \[2, 4\]; give one index per scale",
        ),
        ({"pyramid_scales": [1], "reshape_hidden_states": False}, r"reshape_hidden_states False gives tokens; leave"),
    ],
    ids=["no power", "zero", "other lengths", "tokens"],
)
def test_a_pyramid_that_cannot_be_is_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        MAEBackbone(tiny_config(**keys))


def test_a_pyramid_survives_saving(tmp_path):
    model = tiny(MAEBackbone, out_indices=[1, 2, 3, 4], pyramid_scales=(4, 2, 1, 0.5))
    model.save_pretrained(tmp_path)
    loaded = MAEBackbone.from_pretrained(tmp_path)
    assert loaded.config.pyramid_scales == SCALES == MAEConfig.from_pretrained(tmp_path).pyramid_scales
    for one, other in zip(model(pixels()).feature_maps, loaded(pixels()).feature_maps, strict=True):
        assert torch.equal(one, other)


def test_a_new_pyramid_on_a_pretrained_encoder_starts_as_a_linear_layer_does(folder):
    # Loading goes by the meta device: a weight that nobody initialises would hold anything.
    torch.manual_seed(0)
    model = MAEBackbone.from_pretrained(folder, pyramid_scales=[4])
    for layer in model.pyramid[0].doublings:
        bound = (6 / (48 + 48)) ** 0.5
        assert 0.95 * bound < layer.weight.abs().max() <= bound
        assert torch.equal(layer.bias, torch.zeros(48))
    assert torch.equal(model.pyramid[0].norms[0].weight, torch.ones(48))


# ---------------------------------------------------------------------------------------------- in other models


def upernet(config):
    return UperNetConfig(
        backbone_config=config, hidden_size=16, auxiliary_in_channels=48, auxiliary_channels=16, num_labels=5
    )


def dpt(config):
    return DPTConfig(backbone_config=config, neck_hidden_sizes=[8, 16, 32, 32], fusion_hidden_size=16)


def detr(config):
    return DetrConfig(use_timm_backbone=False, backbone=None, backbone_config=config, **DETR)


def rt_detr(config):
    return RTDetrConfig(
        backbone_config=config, encoder_in_channels=[48] * 3, encoder_hidden_dim=32, decoder_in_channels=[32] * 3,
        feat_strides=[4, 8, 16], num_denoising=4, **{**DETR, "num_queries": 10},
    )  # fmt: skip


FOUR, TWO_BY_TWO = {"out_indices": [1, 2, 3, 4]}, torch.arange(5).repeat(2, 32, 10)[:, :, :48]
CASES = {
    "UperNet, a pyramid": (
        AutoModelForSemanticSegmentation, upernet, {**FOUR, "pyramid_scales": SCALES}, {"labels": TWO_BY_TWO}
    ),
    "UperNet, one stride": (AutoModelForSemanticSegmentation, upernet, FOUR, {"labels": TWO_BY_TWO}),
    "DPT": (AutoModelForDepthEstimation, dpt, {**FOUR, "reshape_hidden_states": False}, {}),
    "DETR": (AutoModelForObjectDetection, detr, {}, {"labels": BOXES}),
    "RT-DETR, a pyramid": (AutoModelForObjectDetection, rt_detr, {"pyramid_scales": [2, 1, 0.5]}, {"labels": BOXES}),
}  # fmt: skip


def backbone_in(model) -> MAEBackbone:
    (found,) = (module for module in model.modules() if isinstance(module, MAEBackbone))
    return found


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def dense(request, folder):
    """One of transformers' dense models with a pretrained backbone, and what its forward takes besides images."""
    auto, config, keys, inputs = request.param
    pretrained = MAEBackbone.from_pretrained(folder, **keys)
    model = auto.from_config(config(pretrained.config))
    backbone_in(model).load_state_dict(pretrained.state_dict())
    return auto, model, inputs


def main_output(output):
    return output.predicted_depth if "predicted_depth" in output else output.logits


def test_a_dense_model_has_the_pretrained_weights_and_sees_what_the_encoder_sees(dense, folder):
    backbone = backbone_in(dense[1]).eval()
    encoder = MAEModel.from_pretrained(folder).eval()
    own, theirs = backbone.state_dict(), encoder.state_dict()
    assert {name for name in theirs if not name.startswith("norm.")} == {n for n in own if "pyramid" not in n}
    assert all(torch.equal(value, theirs[name]) for name, value in own.items() if "pyramid" not in name)
    images = pixels(2, 3, 32, 48)
    states = backbone(images, output_hidden_states=True).hidden_states
    wanted = encoder(images, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
    assert len(states) == 5
    assert all(torch.equal(one, other) for one, other in zip(states, wanted, strict=True))


def test_a_dense_model_trains_on_oblong_images_down_to_the_first_layer(dense):
    _, model, inputs = dense
    model.train()
    output = model(pixel_values=pixels(2, 3, 32, 48), **inputs)
    loss = output.loss if inputs else output.predicted_depth.square().mean()
    assert torch.isfinite(loss)
    loss.backward()
    backbone = backbone_in(model)
    without = [name for name, p in backbone.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []
    table = backbone.embeddings.position_embeddings
    assert torch.equal(table((4, 6)), sincos_table((4, 6), 48))
    assert torch.equal(table.table, sincos_table((4, 4), 48)), "the model's own table stays"


def test_a_dense_model_is_saved_and_loaded_with_its_backbone(dense, tmp_path):
    auto, model, _ = dense
    model.eval().save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path).eval()
    assert type(backbone_in(loaded)) is MAEBackbone
    with torch.no_grad():
        one, other = (main_output(each(pixel_values=pixels(2, 3, 32, 48))) for each in (model, loaded))
    # Not bit for bit: where weights lie otherwise in memory, a convolution may round otherwise.
    torch.testing.assert_close(one, other, atol=1e-6, rtol=0)

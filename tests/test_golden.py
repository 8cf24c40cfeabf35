"""Figures of the original implementation (golden_original.json) on weights that a formula gives."""

from zlib import crc32

import pytest
import torch
from golden import GOLDEN
from torch import nn

from hf_mae import MAEConfig, MAEForImageClassification, MAEForPreTraining, mae_vit_base
from hf_mae.conversion.layouts import their_names
from hf_mae.layers_mae import MAEPositions, sincos_table

# "img 64, patch 16, width 96, 3 blocks, 4 heads, decoder 48, 2 blocks, 4 heads, mlp ratio 4"
NUMBERS = {
    "image_size": 64,
    "patch_size": 16,
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 384,
    "decoder_hidden_size": 48,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 4,
    "decoder_intermediate_size": 192,
}


def original_name(name: str) -> str:
    return their_names(name, "original")[0]


def formula(key: str, tensor: torch.Tensor, around: float = 0.0) -> torch.Tensor:
    index = torch.arange(tensor.numel(), dtype=torch.float64)
    values = 0.05 * torch.sin(0.37 * index + crc32(key.encode()) % 1000) + around
    return values.reshape(tensor.shape).to(torch.float32)


def fill(model: nn.Module) -> None:
    """Give every parameter the values of the formula; the position tables stay."""
    norms = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(formula(original_name(name), parameter, around=float(name in norms)))


def image_and_noise() -> tuple[torch.Tensor, torch.Tensor]:
    index = torch.arange(2 * 3 * 64 * 64, dtype=torch.float64)
    image = (torch.sin(0.1 * index) + 0.5 * torch.cos(0.013 * index)).reshape(2, 3, 64, 64)
    x = torch.sin(torch.arange(1, 2 * 16 + 1, dtype=torch.float64) * 12.9898) * 43758.5453
    return image.float(), (x - x.floor()).reshape(2, 16).float()


def assert_is(value: torch.Tensor | float, golden: list | float, last_digit: float) -> None:
    """Equal up to 1e-5 of the figures' scale and to half of their last printed digit."""
    value, golden = torch.as_tensor(value, dtype=torch.float64), torch.tensor(golden, dtype=torch.float64)
    assert value.shape == golden.shape
    allowed = 1e-5 * float(golden.abs().max()) + last_digit / 2
    assert float((value - golden).abs().max()) <= allowed


@pytest.fixture(params=[False, True], ids=["raw pixels", "normalised pixels"])
def pretraining(request):
    """The original's figures, and our model and output on the same weights, image and noise."""
    model = MAEForPreTraining(MAEConfig(**NUMBERS, norm_pix_loss=request.param)).eval()
    fill(model)
    image, noise = image_and_noise()
    return GOLDEN["pretraining"][f"norm_pix_loss={request.param}"], model, model(image, noise=noise)


def test_the_loss_is_the_originals(pretraining):
    golden, _, output = pretraining
    assert_is(output.loss.item(), golden["loss"], last_digit=1e-7)


def test_the_mask_is_the_originals(pretraining):
    golden, _, output = pretraining
    assert output.mask.tolist() == golden["mask"]
    assert output.ids_restore.tolist() == golden["ids_restore"]


def test_the_encoders_tokens_are_the_originals(pretraining):
    golden, model, _ = pretraining
    image, noise = image_and_noise()
    latent = model.mae(image, mask_ratio=0.75, noise=noise).last_hidden_state
    assert latent.shape == (2, 5, 96)
    assert_is(latent[0, :, :4].detach(), golden["latent[0,:,:4]"], last_digit=1e-6)


def test_the_predictions_are_the_originals(pretraining):
    golden, _, output = pretraining
    logits = output.logits.detach()
    assert_is(logits[0, :3, :5], golden["pred[0,:3,:5]"], last_digit=1e-6)
    assert_is(torch.stack([logits.mean(), logits.std()]), golden["pred mean,std"], last_digit=1e-6)


def test_the_gradients_are_the_originals(pretraining):
    golden, model, output = pretraining
    output.loss.backward()
    norms = {original_name(name): float(p.grad.norm()) for name, p in model.named_parameters()}
    assert golden["gradient norms"].keys() <= norms.keys()
    for key, figure in golden["gradient norms"].items():
        assert_is(norms[key], figure, last_digit=1e-7)


def test_the_position_tables_are_the_originals():
    decoder = sincos_table((4, 4), 48)
    (golden,) = [figures for key, figures in GOLDEN["sin-cos"].items() if key.startswith("decoder table, width 48")]
    assert_is(decoder[[0, 1, 2, 5]][:, [0, 1, 12, 13, 24, 25, 36, 47]], golden, last_digit=1e-6)
    encoder = sincos_table((4, 4), 96).double()
    (golden,) = [figures for key, figures in GOLDEN["sin-cos"].items() if key.startswith("encoder table, width 96")]
    assert_is(torch.stack([encoder.sum(), encoder.abs().sum()]), golden, last_digit=1e-4)


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return mae_vit_base()


@pytest.mark.parametrize("key", GOLDEN["initial values, ViT-B (one seed)"])
def test_initial_values_spread_as_the_originals_do(base, key):
    golden = GOLDEN["initial values, ViT-B (one seed)"][key]
    values = {original_name(name): p for name, p in base.named_parameters()}[key].detach()
    # Another seed: the tokens have few values, whose standard deviation is itself a draw.
    assert abs(float(values.std()) / golden["std"] - 1) < (0.1 if "token" in key else 0.03)
    assert float(values.mean().abs()) < 5 * golden["std"] / values.numel() ** 0.5
    if "token" not in key:
        # Uniform, up to Xavier's bound for the two-dimensional weight (the query, key and value fused).
        bound = (6 / (values[0].numel() + values.shape[0])) ** 0.5
        assert 0.999 * bound < float(values.abs().max()) <= bound * (1 + 1e-6)
        assert_is(bound, golden["absmax"], last_digit=1e-4)


def test_initial_biases_are_zero_but_for_the_patch_projections(base):
    biases = {original_name(name): p.detach() for name, p in base.named_parameters() if name.endswith("bias")}
    projection = biases.pop("patch_embed.proj.bias")
    assert all(float(bias.abs().max()) == 0 for bias in biases.values())
    bound = (3 * 16 * 16) ** -0.5
    assert 0.95 * bound < float(projection.abs().max()) <= bound
    # Conv2d's default is uniform: standard deviation bound / sqrt(3).
    assert abs(float(projection.std()) / (bound / 3**0.5) - 1) < 0.1


def test_vit_b_has_the_originals_number_of_values(base):
    tables = sum(module.table.numel() for module in base.modules() if isinstance(module, MAEPositions))
    parameters = sum(p.numel() for p in base.parameters())
    assert parameters + tables == GOLDEN["parameters (all, incl. frozen tables)"]["base"] == 111_907_840
    assert tables == 197 * (768 + 512)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_the_classifiers_logits_are_the_originals(pooling):
    golden = GOLDEN["classifier, mean pooling + fc_norm" if pooling == "mean" else "classifier, class token"]
    model = MAEForImageClassification(MAEConfig(**NUMBERS, pooling=pooling, num_labels=5)).eval()
    fill(model)
    table = model.mae.embeddings.position_embeddings.table
    table.copy_(formula("pos_embed", table))
    image, _ = image_and_noise()
    with torch.no_grad():
        if pooling == "mean":
            features = model.fc_norm(model.mae(image).pooler_output)
            assert_is(features[0, :6], golden["features[0,:6]"], last_digit=1e-6)
        assert_is(model(image).logits, golden["logits"], last_digit=1e-6)

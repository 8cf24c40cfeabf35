"""Weights of other packages become ours and theirs again, the bits and the outputs the same."""

import argparse
import json
import os
import re
import subprocess
import sys

import pytest
import timm
import torch
from hub_server import HubServer
from runs import environment, start
from safetensors.torch import load_file, save_file
from test_golden import GOLDEN, NUMBERS, assert_is, formula, image_and_noise
from tiny import TINY, pixels, tiny
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
    ViTModel,
)
from transformers.utils import logging as transformers_logging

from hf_mae import MAEConfig, MAEForImageClassification, MAEForPreTraining, MAEImageProcessor, MAEModel
from hf_mae.conversion import layouts as keys
from hf_mae.conversion import reference
from hf_mae.layers_mae import sincos_table

# Errors are counted in lines; the command turns its bars off, and the tests save models before it.
transformers_logging.disable_progress_bar()

HEADS = {"num_attention_heads": 4, "decoder_num_attention_heads": 2}


def convert(*words, **flags) -> int:
    options = [word for key, value in flags.items() for word in (f"--{key}", *str(value).split())]
    return start("convert", *words, *options)


def record(folder) -> dict:
    return json.loads((folder / "conversion.json").read_text())


def same_bits(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def original_weights(kind: str, grid=(4, 4)) -> dict[str, torch.Tensor]:
    """Weights by the original's names, of TINY's sizes; written down from its layout, not from our table."""
    D, E, V = 48, 32, 8 * 8 * 3
    shapes = {"cls_token": (1, 1, D), "patch_embed.proj.weight": (D, 3, 8, 8), "patch_embed.proj.bias": (D,)}

    def add(name, *shape):
        shapes.update({f"{name}.weight": shape, f"{name}.bias": shape[:1]})

    def add_blocks(name, depth, width):
        for block in (f"{name}.{index}" for index in range(depth)):
            for norm in ("norm1", "norm2"):
                add(f"{block}.{norm}", width)
            for layer, sizes in (
                ("attn.qkv", (3 * width, width)), ("attn.proj", (width, width)),
                ("mlp.fc1", (2 * width, width)), ("mlp.fc2", (width, 2 * width)),
            ):  # fmt: skip
                add(f"{block}.{layer}", *sizes)

    add_blocks("blocks", 4, D)
    add("fc_norm" if kind == "mean" else "norm", D)
    if kind in ("mean", "cls"):
        add("head", 5, D)
    if kind == "full":
        add("decoder_embed", E, D)
        shapes["mask_token"] = (1, 1, E)
        add_blocks("decoder_blocks", 2, E)
        add("decoder_norm", E)
        add("decoder_pred", V, E)
    weights = {name: 0.1 * torch.randn(shape) + ("norm" in name and "weight" in name) for name, shape in shapes.items()}
    weights["pos_embed"] = sincos_table(grid, D)[None]
    if kind == "full":
        weights["decoder_pos_embed"] = sincos_table(grid, E)[None]
    return weights


def save_pth(path, kind: str, **kwargs) -> dict[str, torch.Tensor]:
    weights = original_weights(kind, **kwargs)
    torch.save({"model": weights}, path)
    return weights


def vit_mae(folder, **overrides) -> ViTMAEForPreTraining:
    """transformers' model with positions, in a folder, with the processor of facebook/vit-mae-base."""
    model = ViTMAEForPreTraining(ViTMAEConfig(**{**TINY, **overrides})).eval()
    weights = keys.to_layout(tiny(MAEForPreTraining).state_dict(), "transformers")
    model.load_state_dict(weights)
    model.save_pretrained(folder)
    old = {
        "do_normalize": True, "do_resize": True, "feature_extractor_type": "ViTFeatureExtractor",
        "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 2, "size": 32,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(old))
    return model


# ------------------------------------------------------------------------------------------ the original's forward


def golden_weights(kind: str) -> dict[str, torch.Tensor]:
    numbers = NUMBERS
    weights = original_weights(kind)
    D, E, V = numbers["hidden_size"], numbers["decoder_hidden_size"], 16 * 16 * 3
    sizes = {48: D, 96: 4 * D, 144: 3 * D, 32: E, 64: 4 * E, 8: 16}
    filled = {}
    for key, value in weights.items():
        decoder = key.startswith("decoder_") or key == "mask_token"
        if key.startswith("blocks.3"):
            continue
        shape = [sizes.get(side, side) for side in value.shape]
        if decoder and "qkv" in key:  # 96 is three times the decoder's width there, twice the encoder's elsewhere
            shape[0] = 3 * E
        elif key == "decoder_embed.weight":
            shape = [E, D]
        elif key.startswith("decoder_pred"):
            shape[0] = V
        filled[key] = formula(key, torch.empty(shape), float("norm" in key and key.endswith("weight")))
    filled["pos_embed"] = sincos_table((4, 4), D)[None]
    if kind == "full":
        filled["decoder_pos_embed"] = sincos_table((4, 4), E)[None]
    else:
        filled["pos_embed"] = formula("pos_embed", filled["pos_embed"])
    return filled


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_the_forward_that_conversions_are_checked_against_is_the_originals(norm_pix_loss):
    golden = GOLDEN["pretraining"][f"norm_pix_loss={norm_pix_loss}"]
    image, _ = image_and_noise()
    logits, loss = reference.pretrain(
        golden_weights("full"), image, torch.tensor(golden["mask"]).float(), 4, 4, norm_pix_loss
    )
    assert_is(loss, golden["loss"], last_digit=1e-7)
    assert_is(logits[0, :3, :5], golden["pred[0,:3,:5]"], last_digit=1e-6)
    assert_is(torch.stack([logits.mean(), logits.std()]), golden["pred mean,std"], last_digit=1e-6)


@pytest.mark.parametrize(
    ("kind", "name"), [("mean", "classifier, mean pooling + fc_norm"), ("cls", "classifier, class token")]
)
def test_the_classifier_that_conversions_are_checked_against_is_the_originals(kind, name):
    image, _ = image_and_noise()
    assert_is(reference.classify(golden_weights(kind), image, 4), GOLDEN[name]["logits"], last_digit=1e-6)


# ------------------------------------------------------------------------------------------ there and back


@pytest.mark.parametrize(
    ("kind", "model_class"),
    [
        ("full", MAEForPreTraining),
        ("encoder", MAEModel),
        ("mean", MAEForImageClassification),
        ("cls", MAEForImageClassification),
    ],
)
def test_the_originals_file_comes_back_bit_by_bit(tmp_path, capsys, kind, model_class):
    weights = save_pth(tmp_path / "x.pth", kind)
    flags = {"norm_pix_loss": "true"} if kind == "full" else {}
    assert convert(tmp_path / "x.pth", tmp_path / "ours", **HEADS, **flags) == 0
    assert "cc-by-nc-4.0" in capsys.readouterr().out
    auto = {MAEModel: AutoModel, MAEForPreTraining: AutoModelForPreTraining}.get(
        model_class, AutoModelForImageClassification
    )
    model = auto.from_pretrained(tmp_path / "ours").eval()
    assert type(model) is model_class
    with torch.no_grad():
        if kind == "full":
            assert model.config.norm_pix_loss
            output = model(pixels())
            logits, loss = reference.pretrain(weights, pixels(), output.mask, 4, 2, True)
            torch.testing.assert_close(output.loss, loss, atol=1e-5, rtol=0)
            torch.testing.assert_close(output.logits, logits, atol=1e-5, rtol=0)
        elif kind == "encoder":
            features = model(pixels()).last_hidden_state
            torch.testing.assert_close(features, reference.features(weights, pixels(), 4), atol=1e-5, rtol=0)
        else:
            assert model.config.pooling == kind
            torch.testing.assert_close(
                model(pixels()).logits, reference.classify(weights, pixels(), 4), atol=1e-5, rtol=0
            )
    # The numbers that a .pth doesn't record are in what is written.
    assert convert(tmp_path / "ours", tmp_path / "theirs", to="original") == 0
    assert same_bits(load_file(tmp_path / "theirs" / "model.safetensors"), weights)
    assert convert(tmp_path / "theirs", tmp_path / "again") == 0
    assert same_bits(load_file(tmp_path / "again" / "model.safetensors"), model.state_dict())
    assert json.loads((tmp_path / "again" / "config.json").read_text())["num_attention_heads"] == 4


@pytest.mark.parametrize("layout", ["4.x", "5.x"])
def test_vit_mae_becomes_ours_and_vit_mae_again(tmp_path, layout):
    peer = vit_mae(tmp_path / "peer", norm_pix_loss=True)
    stored = dict(peer.state_dict())
    if layout == "4.x":
        for new, old in (
            (r"^vit\.layers\.", "vit.encoder.layer."),
            (r"attention\.([qkv])_proj", r"attention.attention.\1_proj"),
            ("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"),
            (r"attention\.o_proj", "attention.output.dense"), (r"mlp\.fc1", "intermediate.dense"),
            (r"mlp\.fc2", "output.dense"),
        ):  # fmt: skip
            stored = {re.sub(new, old, key): value for key, value in stored.items()}
        assert "vit.encoder.layer.0.attention.attention.query.weight" in stored
    save_file(stored, tmp_path / "peer" / "model.safetensors", {"format": "pt"})
    assert convert(tmp_path / "peer", tmp_path / "ours") == 0
    ours = AutoModelForPreTraining.from_pretrained(tmp_path / "ours")
    noise = torch.rand(2, 16)
    torch.testing.assert_close(ours(pixels(), noise=noise).loss, peer(pixels(), noise=noise).loss, atol=1e-5, rtol=0)
    assert type(AutoModel.from_pretrained(tmp_path / "ours")) is MAEModel
    assert convert(tmp_path / "ours", tmp_path / "back", to="vit_mae") == 0
    back = ViTMAEForPreTraining.from_pretrained(tmp_path / "back")
    assert same_bits(back.state_dict(), peer.state_dict())
    assert back.config.norm_pix_loss
    assert back.config.layer_norm_eps == ViTMAEConfig().layer_norm_eps == 1e-12
    # One's own weights are nobody else's.
    assert record(tmp_path / "back")["licence"] is None


def test_the_image_processor_of_vit_mae_becomes_the_evaluation_crop_and_stays_it(tmp_path):
    vit_mae(tmp_path / "peer")
    convert(tmp_path / "peer", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", to="vit_mae")
    convert(tmp_path / "back", tmp_path / "again")
    ours = AutoImageProcessor.from_pretrained(tmp_path / "ours")
    assert type(ours) is MAEImageProcessor
    assert dict(ours.size) == {"shortest_edge": 36}  # 32 / 0.875, rounded down
    assert dict(ours.crop_size) == {"height": 32, "width": 32}
    assert int(ours.resample) == 3
    image = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8)
    expected = ours(image, return_tensors="pt").pixel_values
    back = ViTImageProcessor.from_pretrained(tmp_path / "back")
    assert torch.equal(back(image, return_tensors="pt").pixel_values, expected)
    again = AutoImageProcessor.from_pretrained(tmp_path / "again")
    assert torch.equal(again(image, return_tensors="pt").pixel_values, expected)


@pytest.mark.parametrize("kind", ["encoder", "mean", "cls"])
def test_timms_weights_become_ours_and_timms_again(tmp_path, kind):
    pool = {"num_classes": 0 if kind == "encoder" else 5, "global_pool": "avg" if kind == "mean" else "token"}
    arguments = {
        "img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 4, "mlp_ratio": 2, **pool,
    }  # fmt: skip
    peer = timm.create_model("vit_base_patch16_224.mae", pretrained=False, **arguments).eval()
    peer.load_state_dict(original_weights(kind))
    (tmp_path / "timm").mkdir()
    save_file(peer.state_dict(), tmp_path / "timm" / "model.safetensors")
    # As in timm's own repositories on the Hub.
    pretrained = {
        "license": "cc-by-nc-4.0",
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
    }
    config = {"architecture": "vit_base_patch16_224", **pool, "model_args": arguments, "pretrained_cfg": pretrained}
    (tmp_path / "timm" / "config.json").write_text(json.dumps(config))
    assert convert(tmp_path / "timm", tmp_path / "ours") == 0
    auto = AutoModel if kind == "encoder" else AutoModelForImageClassification
    model = auto.from_pretrained(tmp_path / "ours").eval()
    assert convert(tmp_path / "ours", tmp_path / "back", to="timm") == 0
    back = timm.create_model(f"local-dir:{tmp_path / 'back'}", pretrained=True).eval()
    assert same_bits(back.state_dict(), peer.state_dict())
    with torch.no_grad():
        expected = peer(pixels())
        torch.testing.assert_close(back(pixels()), expected, atol=0, rtol=0)
        got = model(pixels()).pooler_output if kind == "encoder" else model(pixels()).logits
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "ours")
    assert dict(processor.size) == {"shortest_edge": 35}  # 32 / 0.9, rounded down
    written = json.loads((tmp_path / "back" / "config.json").read_text())["pretrained_cfg"]
    assert (written["mean"], written["std"]) == ([0.5] * 3, [0.25] * 3)
    assert int(32 / written["crop_pct"] + 1e-6) == 35
    # timm says so of its own, and what is made of them goes on saying it.
    assert record(tmp_path / "back")["licence"] == "cc-by-nc-4.0"


def test_the_encoder_becomes_transformers_vit_and_comes_back(tmp_path):
    model = tiny(MAEForPreTraining)
    save_ours(model, tmp_path / "ours")
    assert convert(tmp_path / "ours", tmp_path / "vit", to="vit") == 0
    peer = ViTModel.from_pretrained(tmp_path / "vit", add_pooling_layer=False).eval()
    with torch.no_grad():
        expected = model.mae(pixels()).last_hidden_state
        torch.testing.assert_close(peer(pixels()).last_hidden_state, expected, atol=1e-5, rtol=0)
    assert convert(tmp_path / "vit", tmp_path / "back") == 0
    assert same_bits(load_file(tmp_path / "back" / "model.safetensors"), model.mae.state_dict())


def test_where_missing_pixels_are_not_known_the_conversion_says_so(tmp_path, capsys):
    save_ours(tiny(MAEForPreTraining), tmp_path / "ours")
    MAEImageProcessor.from_pretrained(tmp_path / "ours", nodata=-9999).save_pretrained(tmp_path / "ours")
    assert convert(tmp_path / "ours", tmp_path / "vit", to="vit") == 0
    assert "changed  nodata -9999 -> none: vit doesn't handle missing pixels\n" in capsys.readouterr().out
    assert convert(tmp_path / "ours", tmp_path / "mae", to="mae", image_size=64) == 0
    assert MAEImageProcessor.from_pretrained(tmp_path / "mae").nodata == -9999


def test_a_classifier_on_the_class_token_becomes_transformers_vit_and_comes_back(tmp_path):
    names = {0: "cat", 1: "dog", 2: "eel"}
    model = tiny(MAEForImageClassification, pooling="cls", id2label=names)
    save_ours(model, tmp_path / "ours")
    assert convert(tmp_path / "ours", tmp_path / "vit", to="vit") == 0
    peer = ViTForImageClassification.from_pretrained(tmp_path / "vit").eval()
    assert peer.config.id2label == names
    with torch.no_grad():
        torch.testing.assert_close(peer(pixels()).logits, model(pixels()).logits, atol=1e-5, rtol=0)
    assert convert(tmp_path / "vit", tmp_path / "back") == 0
    back = AutoModelForImageClassification.from_pretrained(tmp_path / "back")
    assert same_bits(back.state_dict(), model.state_dict())
    assert (back.config.pooling, back.config.id2label) == ("cls", names)


def test_an_encoder_becomes_a_vit_mae_without_decoder_and_comes_back(tmp_path):
    model = tiny(MAEModel)
    save_ours(model, tmp_path / "ours")
    assert convert(tmp_path / "ours", tmp_path / "peer", to="vit_mae") == 0
    assert same_bits(
        ViTMAEModel.from_pretrained(tmp_path / "peer").state_dict(), keys.to_layout(model.state_dict(), "transformers")
    )
    assert convert(tmp_path / "peer", tmp_path / "back") == 0
    assert same_bits(load_file(tmp_path / "back" / "model.safetensors"), model.state_dict())


def test_oblong_images_and_patches_go_where_they_can(tmp_path, capsys):
    model = tiny(MAEForPreTraining, image_size=(32, 48), patch_size=(8, 16), num_channels=2)
    save_ours(model, tmp_path / "ours", num_channels=2)
    for target in ("vit", "timm", "original"):
        assert convert(tmp_path / "ours", tmp_path / target, to=target) == 0
    assert convert(tmp_path / "ours", tmp_path / "vit_mae", to="vit_mae") == 2
    assert "squares only, not image_size 32x48" in capsys.readouterr().err
    for target in ("vit", "timm"):
        assert convert(tmp_path / target, tmp_path / f"{target}-back") == 0
        back = AutoModel.from_pretrained(tmp_path / f"{target}-back")
        assert same_bits(back.state_dict(), model.mae.state_dict())
        assert back.config.image_height_width == (32, 48)
    # 4 x 3 patches: no square.
    assert convert(tmp_path / "original", tmp_path / "x") == 2
    assert "--image_size" in capsys.readouterr().err
    assert convert(tmp_path / "original", tmp_path / "x", image_size="32 48") == 0
    assert same_bits(load_file(tmp_path / "x" / "model.safetensors"), model.state_dict())


def save_ours(model, folder, **settings) -> None:
    model.save_pretrained(folder)
    MAEImageProcessor(crop_size={"height": 32, "width": 32}, size={"shortest_edge": 36}, **settings).save_pretrained(
        folder
    )


def test_a_crop_of_ones_own_is_kept(tmp_path):
    tiny(MAEModel).save_pretrained(tmp_path / "ours")
    sizes = {"size": {"shortest_edge": 48}, "crop_size": {"height": 32, "width": 32}}
    MAEImageProcessor(**sizes, resample=2, image_mean=[0.1] * 3).save_pretrained(tmp_path / "ours")
    assert convert(tmp_path / "ours", tmp_path / "vit", to="vit") == 0
    assert convert(tmp_path / "vit", tmp_path / "again") == 0
    image = torch.randint(0, 256, (3, 50, 60), dtype=torch.uint8)
    expected, *others = (
        AutoImageProcessor.from_pretrained(tmp_path / name)(image, return_tensors="pt").pixel_values
        for name in ("ours", "vit", "again")
    )
    assert all(torch.equal(other, expected) for other in others)


# ------------------------------------------------------------------------------------------ the Hub


@pytest.mark.slow
def test_facebooks_models_are_converted_by_their_id_and_keep_their_licence(tmp_path):
    peer = vit_mae(tmp_path / "hub" / "models" / "facebook" / "vit-mae-base")
    # As there: weights in a pickle alone.
    (tmp_path / "hub" / "models" / "facebook" / "vit-mae-base" / "model.safetensors").unlink()
    torch.save(peer.state_dict(), tmp_path / "hub" / "models" / "facebook" / "vit-mae-base" / "pytorch_model.bin")
    script = (
        "import sys; from hf_mae.cli import main; "
        "codes = [main(['convert', source, sys.argv[1]]) for source in ('facebook/nothing', 'facebook/vit-mae-base')]; "
        "assert codes == [2, 0], codes"
    )
    with HubServer(tmp_path / "hub") as hub:
        variables = hub.env | {key: environment()[key] for key in ("PYTHONPATH", "OMP_NUM_THREADS")}
        command = [sys.executable, "-c", script, str(tmp_path / "ours")]
        said = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    assert "CC-BY-NC" in said.stdout
    assert "hf-mae: error: facebook/nothing is neither a path nor on the Hub" in said.stderr
    ours = AutoModelForPreTraining.from_pretrained(tmp_path / "ours")
    assert same_bits(keys.to_layout(ours.state_dict(), "transformers"), peer.state_dict())
    # The licence goes along with what is made of it, whatever the format.
    assert convert(tmp_path / "ours", tmp_path / "timm", to="timm") == 0
    told = record(tmp_path / "timm")
    assert told["licence"] == "cc-by-nc-4.0"
    assert "CC-BY-NC" in told["licence_note"]
    assert told["before"]["source"] == "facebook/vit-mae-base"
    assert len(told["before"]["revision"]) == 40
    assert max(told["largest_difference"].values()) < 1e-5
    # transformers' default, which timm doesn't know.
    assert [change.split(",")[0] for change in told["changes"]] == ["layer_norm_eps 1e-12 -> 1e-06"]
    # No place on the disk but the one that was typed.
    for folder in ("ours", "timm"):
        for file in (tmp_path / folder).iterdir():
            assert str(tmp_path) not in file.read_bytes().decode(errors="ignore") or file.name == "conversion.json"
    assert len(told["before"]["sha256"]["pytorch_model.bin"]) == 64


@pytest.mark.parametrize(
    ("folder", "licence"),
    [
        ("vit-mae-base", "cc-by-nc-4.0"),
        ("models--facebook--vit-mae-huge/snapshots/12ab", "cc-by-nc-4.0"),
        ("vit-mae-based-on-mine", None),
    ],
)
def test_copies_of_facebooks_models_are_known_by_their_names(tmp_path, folder, licence):
    vit_mae(tmp_path / folder)
    assert convert(tmp_path / folder, tmp_path / "ours") == 0
    assert record(tmp_path / "ours")["licence"] == licence


@pytest.mark.parametrize(
    ("folder", "stated", "licence"),
    [
        ("vit_base_patch16_224.mae", None, "cc-by-nc-4.0"),
        ("models--timm--vit_huge_patch14_224.mae/snapshots/12ab", None, "cc-by-nc-4.0"),
        ("vit_base_patch16_224.mae", "mit", "mit"),
        ("vit_base_patch16_224.mae_mine", None, None),
        ("mine", None, None),
    ],
)
def test_timms_models_have_the_licence_that_they_state_or_that_of_their_names(tmp_path, folder, stated, licence):
    save_ours(tiny(MAEModel), tmp_path / "model")
    assert convert(tmp_path / "model", tmp_path / folder, to="timm") == 0
    (tmp_path / folder / "conversion.json").unlink()
    file = tmp_path / folder / "config.json"
    config = json.loads(file.read_text())
    config["pretrained_cfg"] |= {"license": stated} if stated else {}
    file.write_text(json.dumps(config))
    assert convert(tmp_path / folder, tmp_path / "ours") == 0
    assert record(tmp_path / "ours")["licence"] == licence


def test_a_model_saved_with_a_mask_ratio_of_zero_is_converted(tmp_path):
    peer = vit_mae(tmp_path / "peer", mask_ratio=0.0)
    assert convert(tmp_path / "peer", tmp_path / "ours") == 0
    model = AutoModelForPreTraining.from_pretrained(tmp_path / "ours")
    assert model.config.mask_ratio == 0
    assert same_bits(keys.to_layout(model.state_dict(), "transformers"), peer.state_dict())


@pytest.mark.parametrize("model_class", [MAEForPreTraining, MAEModel])
def test_from_pretrained_of_a_raw_vit_mae_names_the_command(tmp_path, model_class):
    vit_mae(tmp_path / "peer")
    with pytest.raises(
        ValueError, match=r"peer is a model of type vit_mae, not mae; convert it: hf-mae convert .*peer"
    ):
        model_class.from_pretrained(tmp_path / "peer")


# ------------------------------------------------------------------------------------------ adapting


def test_another_image_size_and_channel_count_are_what_from_pretrained_makes_of_them(tmp_path, capsys):
    vit_mae(tmp_path / "peer")
    assert convert(tmp_path / "peer", tmp_path / "plain") == 0
    assert convert(tmp_path / "peer", tmp_path / "moved", image_size="64 32", num_channels=5) == 0
    said = capsys.readouterr().out
    assert "image_size 32x32 -> 64x32" in said
    assert "num_channels 3 -> 5, filters: mean, scaled to the same sum" in said
    expected = MAEForPreTraining.from_pretrained(tmp_path / "plain", image_size=(64, 32), num_channels=5)
    moved = MAEForPreTraining.from_pretrained(tmp_path / "moved")
    assert same_bits(moved.state_dict(), expected.state_dict())
    processor = AutoImageProcessor.from_pretrained(tmp_path / "moved")
    pixel_values = processor(torch.zeros(5, 90, 90, dtype=torch.uint8), return_tensors="pt").pixel_values
    assert pixel_values.shape == (1, 5, 64, 32)
    assert moved(pixel_values).logits.shape == (1, 32, 8 * 8 * 5)
    mean = (0.485 + 0.456 + 0.406) / 3
    assert processor.image_mean == pytest.approx([mean] * 5)


def test_one_channel_answers_to_grey_as_three_equal_ones_did(tmp_path, capsys):
    vit_mae(tmp_path / "peer")
    for name, flags in (("three", {}), ("one", {"num_channels": 1})):
        assert convert(tmp_path / "peer", tmp_path / name, **flags) == 0
    assert "num_channels 3 -> 1, filters: sum" in capsys.readouterr().out
    grey = pixels(channels=1)
    three, one = (AutoModel.from_pretrained(tmp_path / name).eval() for name in ("three", "one"))
    expected = three(grey.expand(-1, 3, -1, -1)).last_hidden_state
    torch.testing.assert_close(one(grey).last_hidden_state, expected, atol=1e-5, rtol=0)
    assert convert(tmp_path / "one", tmp_path / "peer-of-one", to="vit_mae") == 0


# ------------------------------------------------------------------------------------------ what is refused


def mutate(monkeypatch, layout: str, old: str, new: str) -> None:
    table = tuple((pattern, re.sub(old, new, text)) for pattern, text in keys.LAYOUTS[layout])
    assert table != keys.LAYOUTS[layout]
    monkeypatch.setitem(keys.LAYOUTS, layout, table)


@pytest.mark.parametrize("source", ["vit_mae", "pth", "timm"])
def test_a_wrong_mapping_is_caught_when_it_is_read_and_nothing_is_written(tmp_path, capsys, monkeypatch, source):
    """Norms 1 and 2 of each block swapped: every shape fits."""
    vit_mae(tmp_path / "vit_mae")
    save_pth(tmp_path / "pth", "encoder")
    save_ours(tiny(MAEModel), tmp_path / "ours")
    assert convert(tmp_path / "ours", tmp_path / "timm", to="timm") == 0
    swapped = ((r"\.norm1\.", ".normX."), (r"\.norm2\.", ".norm1."), (r"\.normX\.", ".norm2."))
    layout = "transformers" if source == "vit_mae" else "original"
    monkeypatch.setitem(keys.LAYOUTS, layout, swapped + keys.LAYOUTS[layout])
    before = sorted(tmp_path.iterdir())
    assert convert(tmp_path / source, tmp_path / "dest", **(HEADS if source == "pth" else {})) == 2
    error = capsys.readouterr().err
    assert re.search(r"and hf_mae differ by .* in .* nothing was written", error)
    assert len(error.splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("target", ["vit_mae", "vit", "timm", "original"])
def test_a_wrong_mapping_is_caught_when_it_is_written_and_nothing_is_left(tmp_path, capsys, monkeypatch, target):
    save_ours(tiny(MAEForPreTraining), tmp_path / "ours")
    swapped = ((r"\.norm1\.", ".normX."), (r"\.norm2\.", ".norm1."), (r"\.normX\.", ".norm2."))
    layout = "transformers" if target.startswith("vit") else "original"
    monkeypatch.setitem(keys.LAYOUTS, layout, swapped + keys.LAYOUTS[layout])
    assert convert(tmp_path / "ours", tmp_path / "dest", to=target) == 2
    assert re.search(rf"hf_mae and {target} differ by", capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_query_key_and_value_in_another_order_are_caught(tmp_path, capsys, monkeypatch):
    vit_mae(tmp_path / "peer")
    names = keys.their_names
    monkeypatch.setattr(keys, "their_names", lambda name, layout: sorted(names(name, layout)))
    assert convert(tmp_path / "peer", tmp_path / "dest") == 2
    assert "differ by" in capsys.readouterr().err


def test_what_a_file_does_not_record_has_to_be_given(tmp_path, capsys):
    """Heads leave no trace in the weights, so that no check could find a wrong number."""
    save_pth(tmp_path / "x.pth", "full")
    assert convert(tmp_path / "x.pth", tmp_path / "a", norm_pix_loss="true") == 2
    assert (
        "the number of heads for width 48 is not recorded; give --num_attention_heads NUMBER" in capsys.readouterr().err
    )
    assert convert(tmp_path / "x.pth", tmp_path / "a", norm_pix_loss="true", num_attention_heads=4) == 2
    assert "give --decoder_num_attention_heads NUMBER" in capsys.readouterr().err
    assert convert(tmp_path / "x.pth", tmp_path / "a", **HEADS) == 2
    assert "give --norm_pix_loss true or false" in capsys.readouterr().err
    assert convert(tmp_path / "x.pth", tmp_path / "a", norm_pix_loss="true", **{**HEADS, "num_attention_heads": 5}) == 2
    assert "hidden_size 48 must be a multiple of num_attention_heads 5" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("mae_pretrain_vit_x_full.pth", None, True),
        ("mae_visualize_vit_x.pth", None, False),
        ("checkpoint-799.pth", argparse.Namespace(norm_pix_loss=True), True),
        ("mae_pretrain_vit_x_full.pth", argparse.Namespace(norm_pix_loss=False), False),
    ],
)
def test_published_names_and_recorded_options_say_what_the_decoder_predicts(tmp_path, name, options, expected):
    content = {"model": original_weights("full")} | ({"args": options, "epoch": 799} if options else {})
    torch.save(content, tmp_path / name)
    assert convert(tmp_path / name, tmp_path / "ours", **HEADS) == 0
    assert MAEConfig.from_pretrained(tmp_path / "ours").norm_pix_loss is expected


class Payload:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def test_code_in_a_file_is_not_run_from_wherever_it_comes(tmp_path, capsys):
    vit_mae(tmp_path / "vit_mae")
    for folder, config in (
        ("timm", {"architecture": "vit_base_patch16_224"}),
        ("vit", ViTConfig(**{**TINY}).to_dict()),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(config))
    (tmp_path / "vit_mae" / "model.safetensors").unlink()
    evil = {"cls_token": torch.ones(1), "x": Payload(tmp_path / "canary")}
    for file in ("evil.pth", "vit_mae/pytorch_model.bin", "vit/pytorch_model.bin", "timm/pytorch_model.bin"):
        torch.save(evil, tmp_path / file)
        source = tmp_path / file if file == "evil.pth" else (tmp_path / file).parent
        assert convert(source, tmp_path / "dest") == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("hf-mae: error:")
        assert not (tmp_path / "canary").exists()
        assert not (tmp_path / "dest").exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [("config.json", "[1]"), ("config.json", "[" * 5000), ("config.json", '{"model_type": "mae", "architectures": 5}'),
     ("preprocessor_config.json", "[1]"), ("preprocessor_config.json", "{")],
)  # fmt: skip
def test_a_file_that_is_no_table_is_one_line(tmp_path, capsys, file, content):
    save_ours(tiny(MAEForPreTraining), tmp_path / "ours")
    (tmp_path / "ours" / file).write_text(content)
    capsys.readouterr()
    assert convert(tmp_path / "ours", tmp_path / "dest") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"hf-mae: error: {tmp_path / 'ours'}")
    assert not (tmp_path / "dest").exists()


@pytest.mark.parametrize("target", ["mae", "vit"])
def test_a_cross_attention_decoder_stays_and_its_encoder_goes_elsewhere(tmp_path, target):
    model = tiny(MAEForPreTraining, decoder_attention="cross", decoder_fusion=True, prediction_ratio=0.25)
    save_ours(model, tmp_path / "cross")
    assert convert(tmp_path / "cross", tmp_path / "dest", to=target) == 0
    if target == "mae":
        copied = MAEForPreTraining.from_pretrained(tmp_path / "dest")
        assert torch.equal(copied(pixels()).logits, model(pixels()).logits)
    else:
        copied = ViTModel.from_pretrained(tmp_path / "dest", add_pooling_layer=False).eval()
        expected = model.mae(pixels()).last_hidden_state
        torch.testing.assert_close(copied(pixels()).last_hidden_state, expected, atol=1e-5, rtol=0)


def test_the_same_conversion_writes_the_same_bytes(tmp_path):
    save_ours(tiny(MAEForPreTraining), tmp_path / "ours")
    for number in range(4):  # safetensors shuffles its metadata
        assert convert(tmp_path / "ours", tmp_path / str(number), to="original") == 0
    files = [(tmp_path / str(number) / "model.safetensors").read_bytes() for number in range(4)]
    assert len(set(files)) == 1


@pytest.mark.parametrize("content", ["", "[1]", '{"licence": "cc-b'])
def test_a_broken_record_of_a_conversion_is_an_error_as_the_licence_would_get_lost(tmp_path, capsys, content):
    save_ours(tiny(MAEModel), tmp_path / "ours")
    (tmp_path / "ours" / "conversion.json").write_text(content)
    assert convert(tmp_path / "ours", tmp_path / "dest") == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "conversion.json" in error
    assert error.endswith("if you know the licence of the weights, remove it")


def test_what_can_not_be_expressed_is_refused_in_one_line(tmp_path, capsys):
    save_ours(tiny(MAEForImageClassification, num_labels=5), tmp_path / "mean")
    save_ours(tiny(MAEForPreTraining, mask_cell=2), tmp_path / "cells")
    save_ours(tiny(MAEForPreTraining, hidden_act="relu"), tmp_path / "relu")
    save_ours(tiny(MAEForPreTraining, decoder_attention="cross"), tmp_path / "cross")
    linear_probe = original_weights("encoder") | {"head.1.weight": torch.ones(5, 48), "head.1.bias": torch.ones(5)}
    torch.save({"model": linear_probe}, tmp_path / "probe.pth")
    torch.save({"resnet": torch.ones(3)}, tmp_path / "other.pth")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    for source, target, said in (
        ("mean", "vit", "can't express pooling mean"),
        ("mean", "vit_mae", "has no classifier"),
        ("cells", "vit_mae", "mask_cell 2"),
        ("cross", "vit_mae", "decoder_attention cross; use --to vit or --to timm"),
        ("cross", "original", "decoder_attention cross; use --to vit or --to timm"),
        ("relu", "timm", "hidden_act relu"),
        ("relu", "original", "hidden_act relu"),
        ("probe.pth", "mae", "has head.1.bias"),
        ("other.pth", "mae", "e.g. resnet"),
        ("bert", "mae", "type bert"),
        ("absent.pth", "mae", "there is no file or folder"),
        ("no/such/place", "mae", "there is no file or folder"),
        ("mean", "gguf", "--to 'gguf' is not one of mae, vit_mae, vit, timm, original"),
    ):
        heads = {"num_attention_heads": 4} if source == "probe.pth" else {}
        assert convert(tmp_path / source, tmp_path / "dest", to=target, **heads) == 2
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1, error
        assert said in error[0]
        assert not (tmp_path / "dest").exists()


def test_numbers_that_the_source_records_are_not_taken_from_the_command_line(tmp_path, capsys):
    vit_mae(tmp_path / "peer")
    assert convert(tmp_path / "peer", tmp_path / "dest", num_attention_heads=2) == 2
    assert "records its own num_attention_heads; leave --num_attention_heads out" in capsys.readouterr().err


def test_where_nothing_can_be_written_one_line_says_so(tmp_path, capsys):
    vit_mae(tmp_path / "peer")
    assert convert(tmp_path / "peer", tmp_path / "peer" / "config.json" / "dest") == 2
    error = capsys.readouterr().err
    assert "can't be written" in error
    assert len(error.splitlines()) == 1


def test_weights_that_lack_a_layer_are_refused(tmp_path, capsys):
    vit_mae(tmp_path / "peer")
    weights = load_file(tmp_path / "peer" / "model.safetensors")
    weights.pop(next(key for key in weights if "decoder_pred.bias" in key))
    save_file(weights, tmp_path / "peer" / "model.safetensors", {"format": "pt"})
    assert convert(tmp_path / "peer", tmp_path / "dest") == 2
    assert "missing keys decoder.decoder_pred.bias" in capsys.readouterr().err


def test_a_folder_with_something_in_it_is_left_alone(tmp_path, capsys):
    vit_mae(tmp_path / "peer")
    (tmp_path / "dest").mkdir()
    assert convert(tmp_path / "peer", tmp_path / "dest") == 0  # empty
    before = {file.name: file.read_bytes() for file in (tmp_path / "dest").iterdir()}
    assert convert(tmp_path / "peer", tmp_path / "dest", to="timm") == 2
    assert "not empty" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in (tmp_path / "dest").iterdir()} == before

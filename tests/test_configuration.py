"""Every number of the configuration, and every number that it refuses."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from tiny import TINY, tiny_config

from hf_mae import MAEConfig, mae_vit_huge, mae_vit_large, mae_vit_small, mae_vit_tiny
from hf_mae.configuration_mae import SIZES


def test_the_defaults_are_the_papers_vit_b_with_its_decoder():
    config = MAEConfig()
    encoder = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.intermediate_size)
    decoder = (
        config.decoder_hidden_size,
        config.decoder_num_hidden_layers,
        config.decoder_num_attention_heads,
        config.decoder_intermediate_size,
    )
    assert encoder == (768, 12, 12, 3072)
    assert decoder == (512, 8, 16, 2048)
    assert (config.image_size, config.patch_size, config.num_channels) == (224, 16, 3)
    assert (config.mask_ratio, config.norm_pix_loss, config.layer_norm_eps) == (0.75, False, 1e-6)
    assert (config.mask_strategy, config.mask_cell, config.drop_path_rate) == ("random", 1, 0.0)
    assert {key: getattr(config, key) for key in SIZES["base"]} == SIZES["base"]


@pytest.mark.parametrize(
    ("make", "size", "expected"),
    [
        (mae_vit_tiny, "tiny", (192, 12, 3, 768, 16)),
        (mae_vit_small, "small", (384, 12, 6, 1536, 16)),
        (mae_vit_large, "large", (1024, 24, 16, 4096, 16)),
        (mae_vit_huge, "huge", (1280, 32, 16, 5120, 14)),
    ],
)
def test_the_named_sizes_are_those_of_the_papers_and_take_overrides(make, size, expected):
    config = MAEConfig(**SIZES[size])
    numbers = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.intermediate_size)
    assert (*numbers, config.patch_size) == expected
    model = make(**{**TINY, "num_hidden_layers": 1, "mask_ratio": 0.5})
    assert (model.config.num_hidden_layers, model.config.mask_ratio) == (1, 0.5)
    assert len(model.mae.layers) == 1


def test_the_grid_is_counted_from_top_to_bottom_and_from_left_to_right():
    config = tiny_config(image_size=(48, 32), patch_size=(8, 4))
    assert config.image_height_width == (48, 32)
    assert config.patch_height_width == (8, 4)
    assert config.grid_size == (6, 8)
    assert config.num_patches == 48


def test_what_transformers_scripts_write_to_decoder_type_changes_nothing(tmp_path):
    config = tiny_config()
    config.update({"decoder_type": "simmim"})  # run_mim.py, for every model
    config.save_pretrained(tmp_path)
    assert MAEConfig.from_pretrained(tmp_path).decoder_attention == "self"


def test_a_config_is_the_same_after_saving_and_loading(tmp_path):
    config = tiny_config(image_size=(48, 32), patch_size=(8, 4), out_indices=[1, 3], num_labels=7, mask_cell=2)
    config.save_pretrained(tmp_path)
    loaded = MAEConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.image_size == config.image_size == [48, 32]
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "mae"


def test_from_pretrained_takes_overrides(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    loaded = MAEConfig.from_pretrained(tmp_path, image_size=64, out_features=["stage2"])
    assert (loaded.image_size, loaded.out_features, loaded.out_indices) == (64, ["stage2"], [2])


def test_the_backbones_stages_are_the_stem_and_one_for_each_layer():
    config = tiny_config(out_indices=[0, 2])
    assert config.stage_names == ["stem", "stage1", "stage2", "stage3", "stage4"]
    assert config.out_features == ["stem", "stage2"]
    assert tiny_config().out_features == ["stage4"]
    with pytest.raises(ValueError, match=r"stage4.*stage9"):
        tiny_config(out_features=["stage9"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"image_size": 30}, r"image_size 30x30 .*patch_size 8x8.*nearest that fits is 32x32"),
        ({"image_size": (32, 44), "patch_size": (16, 8)}, r"image_size 32x44 .*patch_size 16x8.*fits is 32x(40|48)"),
        ({"image_size": 3}, r"image_size 3x3 .*patch_size 8x8.*nearest that fits is 8x8"),
        ({"image_size": [32, 32, 32]}, r"image_size \[32, 32, 32\] has 3 numbers; give one, or a height and a width"),
        ({"patch_size": (8,)}, r"patch_size \[8\] has 1 numbers; give one, or a height and a width"),
        ({"image_size": 0}, r"image_size 0 is not positive; give 1 pixel or more"),
        ({"patch_size": -8}, r"patch_size -8 is not positive; give 1 pixel or more"),
        ({"hidden_size": 50}, r"hidden_size 50 must be a multiple of num_attention_heads 4.*change one of the two"),
        (
            {"hidden_size": 30, "num_attention_heads": 3},
            r"hidden_size 30 .*num_attention_heads 3, and of 4 for the sin-cos positions; change one",
        ),
        ({"num_attention_heads": 0}, r"hidden_size 48 .*num_attention_heads 0"),
        ({"hidden_size": 0}, r"hidden_size 0 is not positive; give 1 or more"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers 0 is not positive"),
        ({"decoder_intermediate_size": -4}, r"decoder_intermediate_size -4 is not positive"),
        ({"layer_norm_eps": float("nan")}, r"layer_norm_eps nan lies outside .*give e.g. 1e-06"),
        ({"head_initializer_range": -1.0}, r"head_initializer_range -1.0 lies outside"),
        ({"eval_mask_seed": 2**32}, r"eval_mask_seed 4294967296 lies outside"),
        ({"pyramid_scales": [float("nan")]}, r"pyramid_scales \[nan\] are not all powers of two"),
        (
            {"decoder_hidden_size": 36, "decoder_num_attention_heads": 8},
            r"decoder_hidden_size 36 .*decoder_num_attention_heads 8.*change one of the two",
        ),
        ({"num_channels": 0}, r"num_channels 0 is not positive; give 1 or more"),
        ({"mask_cell": 3}, r"mask_cell 3 doesn't divide the patch grid 4x4; choose a divisor of both"),
        ({"mask_cell": 0}, r"mask_cell 0 doesn't divide the patch grid 4x4"),
        ({"mask_ratio": 1}, r"mask_ratio 1 lies outside \[0, 1\); the paper uses 0.75"),
        ({"mask_ratio": -0.1}, r"mask_ratio -0.1 lies outside \[0, 1\); the paper uses 0.75"),
        ({"mask_ratio": 0.95}, r"mask_ratio 0.95 keeps none of the 16 patches of a 4x4 grid; use 0.937 or less"),
        ({"mask_ratio": 0.8, "mask_cell": 2}, r"mask_ratio 0.8 keeps none of the 4 cells of a 4x4 grid; use 0.75"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate 1.0 lies outside \[0, 1\); give e.g. 0.1"),
        ({"drop_path_rate": -0.1}, r"drop_path_rate -0.1 lies outside \[0, 1\); give e.g. 0.1"),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_numbers_that_do_not_go_together_are_refused_with_both_and_the_remedy(wrong, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"hidden_size": "wide"},
        {"mask_ratio": "0.75"},
        {"mask_strategy": "grid"},
        {"pooling": "max"},
        {"position_resize": "nearest"},
        {"image_size": 32.0},
        {"norm_pix_loss": "yes"},
    ],
    ids=str,
)
def test_values_of_another_kind_are_refused_by_name(wrong):
    (key,) = wrong
    with pytest.raises(StrictDataclassFieldValidationError, match=key):
        tiny_config(**wrong)


def test_kept_patches_are_the_floor_of_the_original_in_whole_cells():
    assert MAEConfig().num_kept_patches(0.75) == 49
    assert MAEConfig().num_kept_patches(0) == 196
    assert tiny_config().num_kept_patches(0.7) == int(16 * 0.3) == 4
    assert tiny_config(mask_cell=2).num_kept_patches(0.7) == 4  # int(4 cells * 0.3) = 1 cell
    assert tiny_config(image_size=64).num_kept_patches(0.75, grid_size=(2, 2)) == 1


def test_the_ratio_that_an_error_proposes_is_accepted():
    # 10 * (1 - 0.9) is 0.9999999999999998 in floating point, so 0.9 keeps none of 10.
    for patches in range(1, 300):
        config = tiny_config(image_size=(8, 8 * patches), mask_ratio=0)
        with pytest.raises(ValueError, match="keeps none") as error:
            config.num_kept_patches(0.9999)
        proposed = float(str(error.value).split("use ")[1].split(" or less")[0])
        assert config.num_kept_patches(proposed) >= 1, patches


def test_a_config_whose_depth_a_script_changed_is_saved_and_loaded(tmp_path):
    config = MAEConfig()
    config.update({"num_hidden_layers": 2})
    config.save_pretrained(tmp_path)
    assert MAEConfig.from_pretrained(tmp_path).out_features == ["stage2"]
    MAEConfig(out_indices=[3, 7]).save_pretrained(tmp_path)
    assert MAEConfig.from_pretrained(tmp_path).out_features == ["stage3", "stage7"]

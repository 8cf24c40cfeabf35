"""The model in the order of the data: patches, masks, positions, encoder, decoder, loss; then what users do with it."""

import inspect
import logging
import math
import pickle
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny import draw_noise, pixels, tiny, tiny_config
from torch import nn
from transformers import AutoModel, Dinov2Config, Dinov2ForImageClassification
from transformers.modeling_utils import AttentionInterface

from hf_mae import MAEBackbone, MAEConfig, MAEForImageClassification, MAEForPreTraining, MAEModel, patchify, unpatchify
from hf_mae.layers_mae import MAEMLP, MAEAttention, MAEDropPath, MAEPositions, sincos_table
from hf_mae.masking_mae import block_noise, choose_patches, gather_tokens, hashed_noise, normalize_patches

ALL_CLASSES = [MAEModel, MAEForPreTraining, MAEForImageClassification, MAEBackbone]
every_class = pytest.mark.parametrize("model_class", ALL_CLASSES)


def main_output(output) -> torch.Tensor:
    """The tensor that a model is run for."""
    if "feature_maps" in output:
        return output.feature_maps[-1]
    return output.logits if "logits" in output else output.last_hidden_state


def tables(model: nn.Module) -> list[MAEPositions]:
    return [module for module in model.modules() if isinstance(module, MAEPositions)]


# ---------------------------------------------------------------------------------------------- patches


def test_patches_run_from_left_to_right_and_their_pixels_by_row_column_channel():
    # Each pixel's value says where it is: 100 * channel + 10 * row + column.
    channel, row, column = torch.meshgrid(torch.arange(2), torch.arange(4), torch.arange(6), indexing="ij")
    image = (100 * channel + 10 * row + column).float()[None]
    patches = patchify(image, (2, 3))
    assert patches.shape == (1, 4, 12)
    assert patches[0, 0].tolist() == [0, 100, 1, 101, 2, 102, 10, 110, 11, 111, 12, 112]
    assert patches[0, 1, 0] == 3  # to the right of the first
    assert patches[0, 2, 0] == 20  # below the first


@pytest.mark.parametrize("channels", [1, 3, 13])
def test_unpatchify_is_the_inverse_of_patchify(channels):
    images = pixels(2, channels, 48, 32)
    patches = patchify(images, (8, 4))
    assert patches.shape == (2, 48, 32 * channels)
    assert torch.equal(unpatchify(patches, (8, 4), (6, 8)), images)
    assert torch.equal(patchify(unpatchify(patches, (8, 4), (6, 8)), (8, 4)), patches)


def test_unpatchify_refuses_a_grid_that_the_patches_do_not_fill():
    with pytest.raises(ValueError, match=r"48 patches don't fill a 4x4 grid of 16; pass the grid_size of these images"):
        unpatchify(torch.zeros(1, 48, 96), (8, 4), (4, 4))


def test_the_patch_projection_is_the_convolution_whose_weight_it_has():
    embed = tiny(MAEModel, image_size=(48, 32), patch_size=(8, 4)).embeddings.patch_embed
    images = pixels(2, 3, 48, 32)
    convolved = F.conv2d(images, embed.weight, embed.bias, stride=(8, 4)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed(patchify(images, (8, 4))), convolved, atol=1e-5, rtol=0)


@every_class
def test_no_module_calls_itself_a_convolution_and_is_none(model_class):
    """Programs that look for convolutions rebuild them from their numbers, or replace the first one's channels."""
    model = tiny(model_class, **({"pyramid_scales": [4, 2, 1, 0.5]} if model_class is MAEBackbone else {}))
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.modules.conv._ConvNd)}
    assert bool(found) == (model_class is MAEBackbone)
    for module in found.values():
        rebuilt = type(module)(module.in_channels, module.out_channels, module.kernel_size, module.stride)
        rebuilt.load_state_dict(module.state_dict())
        maps = torch.randn(2, 48, 4, 4)
        assert torch.equal(rebuilt(maps), module(maps))


# ---------------------------------------------------------------------------------------------- masks


def masked_count(mask: torch.Tensor) -> list[int]:
    return mask.sum(dim=1).int().tolist()


@pytest.mark.parametrize("mask_ratio", [0, 0.25, 0.6, 0.75, 0.9])
def test_the_kept_patches_are_those_with_the_smallest_noise(mask_ratio):
    model, noise = tiny(MAEModel), draw_noise(3)
    output = model(pixels(3), mask_ratio=mask_ratio, noise=noise)
    kept = int(16 * (1 - mask_ratio))
    assert output.last_hidden_state.shape == (3, 1 + kept, 48)
    for row in range(3):
        smallest = sorted(range(16), key=lambda patch: float(noise[row, patch]))[:kept]
        assert output.mask[row].tolist() == [0.0 if patch in smallest else 1.0 for patch in range(16)]


def test_ids_restore_puts_the_tokens_back_where_their_patches_were():
    model, images, noise = tiny(MAEModel), pixels(), draw_noise()
    shuffled = model(images, mask_ratio=0, noise=noise)
    restored = gather_tokens(shuffled.last_hidden_state[:, 1:], shuffled.ids_restore)
    torch.testing.assert_close(restored, model(images).last_hidden_state[:, 1:], atol=1e-5, rtol=0)


def test_equal_noise_keeps_the_first_patches():
    output = tiny(MAEModel)(pixels(), noise=torch.zeros(2, 16))
    assert output.mask[0].tolist() == [0.0] * 4 + [1.0] * 12


@pytest.mark.parametrize("strategy", ["random", "block"])
def test_cells_are_kept_or_removed_whole_and_exactly_as_many_as_asked(strategy):
    model = tiny(MAEModel, image_size=64, mask_cell=2, mask_strategy=strategy)
    output = model(pixels(20, height=64), noise=draw_noise(20, 64))
    assert masked_count(output.mask) == [48] * 20
    cells = output.mask.view(20, 4, 2, 4, 2).permute(0, 1, 3, 2, 4).flatten(3)
    assert torch.equal(cells.amin(3), cells.amax(3))
    assert len(torch.unique(output.mask, dim=0)) > 10


def neighbours_that_differ(mask: torch.Tensor, h: int, w: int) -> float:
    """How many times, per image, one of two neighbouring patches is removed and the other is not."""
    grid = mask.view(-1, h, w)
    boundaries = (grid[:, 1:] != grid[:, :-1]).sum() + (grid[:, :, 1:] != grid[:, :, :-1]).sum()
    return float(boundaries) / len(grid)


@pytest.mark.parametrize("mask_ratio", [0.5, 0.75])
def test_block_masks_hang_together_and_remove_exactly_as_many_patches(mask_ratio):
    boundaries = {}
    for strategy in ("random", "block"):
        config = tiny_config(image_size=112, mask_strategy=strategy)
        mask = choose_patches(config, pixels(64, height=112), (14, 14), mask_ratio, draw_noise(64, 196)).mask
        assert masked_count(mask) == [196 - int(196 * (1 - mask_ratio))] * 64
        boundaries[strategy] = neighbours_that_differ(mask, 14, 14)
    # 364 pairs of neighbours, of which 2 r (1 - r) differ at random.
    assert boundaries["random"] == pytest.approx(364 * 2 * mask_ratio * (1 - mask_ratio), rel=0.05)
    assert boundaries["block"] < 0.4 * boundaries["random"]


def test_block_masks_reach_every_part_of_the_image_and_any_grid():
    noise = draw_noise(2000, 14 * 10)
    removed_first = block_noise(noise, (14, 10)).argsort(dim=1)[:, -70:]
    share = removed_first.flatten().bincount(minlength=140) / 2000
    # Rectangles inside an image cover its middle more often than its corners, in BEiT as here.
    assert 0.01 < float(share.min()) < float(share.max()) < 0.99
    for size, grid in (((8, 16), (1, 2)), ((8, 40), (1, 5)), ((16, 24), (2, 3))):
        model = tiny(MAEModel, image_size=size, mask_strategy="block", mask_ratio=0.5)
        N = math.prod(grid)
        assert masked_count(model(pixels(2, 3, *size), noise=draw_noise(2, N)).mask) == [N - N // 2] * 2


def test_the_noise_of_evaluation_is_uniform_and_a_function_of_seed_and_place():
    noise = hashed_noise(7, 100_000, "cpu")
    assert torch.equal(noise, hashed_noise(7, 100_000, "cpu"))
    assert torch.equal(noise[:500], hashed_noise(7, 500, "cpu"))
    assert noise.dtype == torch.float32
    assert 0 <= float(noise.min()) < float(noise.max()) < 1
    assert float((torch.histc(noise, 100, 0, 1) - 1000).abs().max()) < 5 * 1000**0.5
    for other in (noise.roll(1), noise.roll(196), hashed_noise(8, 100_000, "cpu")):
        assert abs(float(torch.corrcoef(torch.stack([noise, other]))[0, 1])) < 0.02


# ---------------------------------------------------------------------------------------------- positions


def by_hand(h: int, w: int, width: int) -> torch.Tensor:
    """The table in four loops: width before height, sines before cosines, a zero row first."""
    table = torch.zeros(1 + h * w, width, dtype=torch.float64)
    quarter = width // 4
    for row in range(h):
        for column in range(w):
            for half, position in enumerate((column, row)):
                for i in range(quarter):
                    angle = position / 10000 ** (i / quarter)
                    table[1 + row * w + column, 2 * half * quarter + i] = math.sin(angle)
                    table[1 + row * w + column, (2 * half + 1) * quarter + i] = math.cos(angle)
    return table.float()


def assert_tables_are_exact(model: nn.Module, grid: tuple[int, int] = (4, 4)):
    assert tables(model)
    for positions, width in zip(tables(model), (48, 32), strict=False):
        assert positions.table.dtype == torch.float32
        torch.testing.assert_close(positions.table.detach(), by_hand(*grid, width), atol=1e-6, rtol=0)
        # Also to the last bit, where the same code made it.
        assert torch.equal(positions.table, sincos_table(grid, width))


@every_class
def test_the_tables_are_exact_from_the_start(model_class):
    model = model_class(tiny_config())
    assert len(tables(model)) == (2 if model_class is MAEForPreTraining else 1)
    assert_tables_are_exact(model)
    assert_tables_are_exact(model_class(tiny_config(image_size=(48, 32), patch_size=(8, 4))), (6, 8))


@every_class
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tables_are_exact_after_loading_also_in_bfloat16(model_class, dtype, tmp_path):
    tiny(model_class).save_pretrained(tmp_path)
    model = model_class.from_pretrained(tmp_path, dtype=dtype).eval()
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert_tables_are_exact(model)
    assert main_output(model(pixels())).dtype == dtype


@every_class
def test_a_model_made_in_bfloat16_has_exact_tables(model_class):
    assert_tables_are_exact(model_class._from_config(tiny_config(), dtype=torch.bfloat16))


@every_class
def test_the_tables_are_exact_when_built_on_the_meta_device_and_then_loaded(model_class):
    source = tiny(model_class)
    with torch.device("meta"):
        model = model_class(tiny_config())
    assert all(positions.table.is_meta for positions in tables(model))
    model.load_state_dict(source.state_dict(), assign=True)
    assert_tables_are_exact(model)
    assert torch.equal(main_output(model.eval()(pixels())), main_output(source(pixels())))


def test_the_tables_are_exact_when_the_checkpoint_lacks_the_decoder_or_the_keys(tmp_path):
    tiny(MAEModel).save_pretrained(tmp_path / "encoder")
    assert_tables_are_exact(MAEForPreTraining.from_pretrained(tmp_path / "encoder"))

    tiny(MAEForPreTraining).save_pretrained(tmp_path / "whole")
    weights = load_file(tmp_path / "whole" / "model.safetensors")
    without = {key: value for key, value in weights.items() if not key.endswith(".table")}
    assert len(weights) - len(without) == 2
    save_file(without, tmp_path / "whole" / "model.safetensors", metadata={"format": "pt"})
    for dtype in (torch.float32, torch.bfloat16):
        model = MAEForPreTraining.from_pretrained(tmp_path / "whole", dtype=dtype)
        assert_tables_are_exact(model)
        assert torch.equal(model.decoder.mask_token, weights["decoder.mask_token"].to(dtype))


@every_class
def test_the_tables_are_no_parameters_and_do_not_move_in_training(model_class, tmp_path):
    tiny(model_class).save_pretrained(tmp_path)
    model = model_class.from_pretrained(tmp_path).train()
    assert not [name for name, _ in model.named_parameters() if "pos" in name]
    assert not any(positions.table.requires_grad for positions in tables(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5)
    before = model.state_dict()["mae.embeddings.cls_token" if hasattr(model, "mae") else "embeddings.cls_token"].clone()
    main_output(model(pixels())).square().mean().backward()
    optimizer.step()
    after = model.state_dict()["mae.embeddings.cls_token" if hasattr(model, "mae") else "embeddings.cls_token"]
    assert not torch.equal(before, after)
    assert_tables_are_exact(model)


def test_trainable_positions_are_a_parameter_under_the_same_name_and_load_both_ways(tmp_path):
    fixed = tiny(MAEForImageClassification)
    fixed.save_pretrained(tmp_path / "fixed")
    model, report = MAEForImageClassification.from_pretrained(
        tmp_path / "fixed", trainable_positions=True, output_loading_info=True
    )
    assert not any(report.values())
    assert list(model.state_dict()) == list(fixed.state_dict()) or set(model.state_dict()) == set(fixed.state_dict())
    table = dict(model.named_parameters())["mae.embeddings.position_embeddings.table"]
    assert table.requires_grad
    assert torch.equal(table, sincos_table((4, 4), 48))

    model.train()(pixels(), labels=torch.tensor([0, 1])).loss.backward()
    torch.optim.SGD(model.parameters(), lr=100.0).step()
    assert float((table - sincos_table((4, 4), 48)).abs().max()) > 1e-3
    model.save_pretrained(tmp_path / "trained")
    for trainable in (True, False):
        again = MAEForImageClassification.from_pretrained(tmp_path / "trained", trainable_positions=trainable)
        assert torch.equal(again.mae.embeddings.position_embeddings.table, table)
        assert isinstance(again.mae.embeddings.position_embeddings.table, nn.Parameter) == trainable


def test_the_decoders_table_is_never_trained():
    model = MAEForPreTraining(tiny_config(trainable_positions=True))
    assert [name for name, _ in model.named_parameters() if "pos" in name] == [
        "mae.embeddings.position_embeddings.table"
    ]


def permute_patches(images: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return unpatchify(patchify(images, (8, 8))[:, order], (8, 8), (4, 4))


@torch.no_grad()
def test_moving_patches_changes_what_the_encoder_says_and_only_by_their_positions():
    model, images = tiny(MAEModel), pixels()
    moved = permute_patches(images, torch.randperm(16))
    spread = float(model(images).pooler_output.std())
    assert float((model(images).pooler_output - model(moved).pooler_output).abs().max()) > 0.05 * spread
    model.embeddings.position_embeddings.table.zero_()
    torch.testing.assert_close(model(images).pooler_output, model(moved).pooler_output, atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------- encoder


def test_the_encoder_sees_all_patches_unless_asked_and_is_always_the_same():
    for model in (tiny(MAEModel).train(), tiny(MAEModel)):
        first, second = model(pixels()), model(pixels())
        assert first.last_hidden_state.shape == (2, 17, 48)
        assert first.mask is None
        assert first.ids_restore is None
        assert torch.equal(first.last_hidden_state, second.last_hidden_state)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_the_pooled_output_is_the_mean_of_the_patches_or_the_class_token(pooling):
    output = tiny(MAEModel, pooling=pooling)(pixels())
    tokens = output.last_hidden_state
    assert torch.equal(output.pooler_output, tokens[:, 0] if pooling == "cls" else tokens[:, 1:].mean(dim=1))


def own_mask(batch: int = 2, kept: int = 4) -> torch.Tensor:
    return (draw_noise(batch, seed=9).argsort(dim=1).argsort(dim=1) >= kept).float()


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


WAYS_TO_MASK = {
    "noise": lambda: {"noise": draw_noise()},
    "noise and ratio": lambda: {"noise": draw_noise(), "mask_ratio": 0.5},
    "mask": lambda: {"mask": own_mask()},
    "integer mask": lambda: {"mask": own_mask().long()},
    "generator": lambda: {"generator": seeded()},
    "generator and ratio": lambda: {"generator": seeded(), "mask_ratio": 0.5},
    "bool_masked_pos": lambda: {"bool_masked_pos": own_mask().bool()},
}


@pytest.mark.parametrize("model_class", [MAEModel, MAEForPreTraining])
@pytest.mark.parametrize("way", WAYS_TO_MASK)
def test_a_mask_is_repeatable_by_noise_mask_and_generator_also_in_training(model_class, way):
    model = tiny(model_class).train()
    first, second = model(pixels(), **WAYS_TO_MASK[way]()), model(pixels(), **WAYS_TO_MASK[way]())
    assert torch.equal(first.mask, second.mask)
    assert torch.equal(main_output(first), main_output(second))
    assert masked_count(first.mask) == [8 if "ratio" in way else 12] * 2
    if "mask" in way:
        assert torch.equal(first.mask, own_mask())
    if "generator" in way:
        other = model(pixels(), **{**WAYS_TO_MASK[way](), "generator": seeded(4)})
        assert not torch.equal(other.mask, first.mask)


def test_patches_chosen_beforehand_are_those_that_the_encoder_sees():
    model, noise = tiny(MAEModel), draw_noise()
    chosen = choose_patches(model.config, pixels(), (4, 4), 0.5, noise)
    output, expected = model(pixels(), chosen=chosen), model(pixels(), mask_ratio=0.5, noise=noise)
    assert torch.equal(output.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(output.mask, expected.mask)
    assert torch.equal(chosen.ids_shuffle.gather(1, expected.ids_restore), torch.arange(16).expand(2, -1))


def test_a_ratio_alone_draws_a_new_mask_at_each_call():
    model = tiny(MAEModel)
    masks = [model(pixels(), mask_ratio=0.75).mask for _ in range(4)]
    assert all(masked_count(mask) == [12, 12] for mask in masks)
    assert len({str(mask) for mask in masks}) == 4


def test_pretraining_draws_anew_in_training_and_repeats_its_masks_in_evaluation():
    model = tiny(MAEForPreTraining)
    losses = {model.train()(pixels()).loss.item() for _ in range(4)}
    assert len(losses) == 4
    first, second = model.eval()(pixels(4)), model(pixels(4))
    assert torch.equal(first.mask, second.mask)
    assert first.loss == second.loss
    assert len(torch.unique(first.mask, dim=0)) == 4, "each image of a batch has its own mask"
    assert torch.equal(model(pixels(2)).mask, first.mask[:2]), "the place in the batch decides, not its size"
    assert masked_count(model(pixels(), mask_ratio=0.5).mask) == [8, 8]
    model.config.eval_mask_seed = 1
    assert not torch.equal(model(pixels(4)).mask, first.mask)


@torch.no_grad()
def test_the_encoder_never_sees_a_removed_patch():
    model, images = tiny(MAEForPreTraining), pixels()
    output = model(images, noise=draw_noise())
    other = patchify(pixels(seed=99), (8, 8))
    removed = output.mask.unsqueeze(-1).bool()
    patches = patchify(images, (8, 8))
    unseen_changed = unpatchify(torch.where(removed, other, patches), (8, 8), (4, 4))
    seen_changed = unpatchify(torch.where(removed, patches, other), (8, 8), (4, 4))
    assert torch.equal(model(unseen_changed, noise=draw_noise()).logits, output.logits)
    assert model(unseen_changed, noise=draw_noise()).loss != output.loss
    assert not torch.allclose(model(seen_changed, noise=draw_noise()).logits, output.logits, atol=1e-2)
    encoder = model.mae
    assert torch.equal(
        encoder(unseen_changed, noise=draw_noise()).last_hidden_state,
        encoder(images, noise=draw_noise()).last_hidden_state,
    )


def test_hidden_states_and_attentions_come_on_request():
    for model_class in ALL_CLASSES:
        model = tiny(model_class, attn_implementation="eager")
        assert model.config._attn_implementation == "eager"
        assert model(pixels()).get("hidden_states") is None
        output = model(pixels(), output_hidden_states=True, output_attentions=True)
        tokens = 5 if model_class is MAEForPreTraining else 17
        assert [tuple(state.shape) for state in output.hidden_states] == [(2, tokens, 48)] * 5
        assert [tuple(weights.shape) for weights in output.attentions] == [(2, 4, tokens, tokens)] * 4
        for weights in output.attentions:
            torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 4, tokens), atol=1e-5, rtol=0)


def test_the_hidden_states_are_the_layers_inputs_and_the_last_ones_output():
    model = tiny(MAEModel)
    output = model(pixels(), output_hidden_states=True)
    state = model.embeddings(pixels(), (4, 4))
    for index, layer in enumerate(model.layers):
        assert torch.equal(output.hidden_states[index], state)
        state = layer(state)
    assert torch.equal(output.hidden_states[4], state)
    assert torch.equal(output.last_hidden_state, model.norm(state))


@every_class
def test_outputs_become_tuples_on_request_of_the_call_or_of_the_config(model_class):
    model = tiny(model_class)
    as_tuple = model(pixels(), return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert len(as_tuple) == len(model(pixels()).to_tuple())
    model.config.return_dict = False
    assert isinstance(model(pixels()), tuple)
    assert torch.equal(main_output(model(pixels(), return_dict=True)), main_output(model(pixels(), return_dict=True)))


# ---------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_the_loss_is_the_papers_formula_done_slowly(norm_pix_loss):
    model, images = tiny(MAEForPreTraining, norm_pix_loss=norm_pix_loss), pixels(3)
    output = model(images, noise=draw_noise(3))
    total, removed = 0.0, 0
    for image, logits, mask in zip(images, output.logits, output.mask, strict=True):
        for index in range(16):
            row, column = divmod(index, 4)
            patch = image[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].permute(1, 2, 0).flatten().double()
            if norm_pix_loss:
                variance = ((patch - patch.mean()) ** 2).sum() / (patch.numel() - 1)
                patch = (patch - patch.mean()) / (variance + 1e-6) ** 0.5
            total += float(((logits[index].double() - patch) ** 2).mean() * mask[index])
            removed += int(mask[index])
    assert removed == 36
    assert output.loss.item() == pytest.approx(total / removed, rel=1e-5)


def test_the_target_is_what_the_loss_compares_with():
    for norm_pix_loss in (False, True):
        model, images = tiny(MAEForPreTraining, norm_pix_loss=norm_pix_loss), pixels()
        output = model(images, noise=draw_noise())
        per_patch = (output.logits - model.patch_target(images)).square().mean(dim=-1)
        torch.testing.assert_close((per_patch * output.mask).sum() / output.mask.sum(), output.loss)


def test_a_constant_patch_is_normalised_to_zeros():
    assert torch.equal(normalize_patches(torch.full((1, 2, 192), 0.7)), torch.zeros(1, 2, 192))


def test_visible_patches_get_no_gradient():
    model = tiny(MAEForPreTraining)
    output = model(pixels(), noise=draw_noise())
    (gradient,) = torch.autograd.grad(output.loss, output.logits)
    per_patch = gradient.abs().sum(dim=-1)
    assert float(per_patch[output.mask == 0].max()) == 0
    assert float(per_patch[output.mask == 1].min()) > 0


def test_the_loss_is_left_out_on_request():
    output = tiny(MAEForPreTraining)(pixels(), return_loss=False)
    assert output.loss is None
    assert output.logits.shape == (2, 16, 192)


@pytest.mark.parametrize("model_class", [MAEForPreTraining, MAEForImageClassification])
def test_every_parameter_gets_a_gradient(model_class):
    for overrides in ({}, {"pooling": "cls", "trainable_positions": True, "qkv_bias": False}):
        model = tiny(model_class, **overrides).train()
        labels = {} if model_class is MAEForPreTraining else {"labels": torch.tensor([0, 1])}
        model(pixels(), **labels).loss.backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


@pytest.mark.parametrize("channels", [1, 2, 6, 13])
def test_any_channels_oblong_images_and_oblong_patches_train(channels):
    model = MAEForPreTraining(tiny_config(num_channels=channels, image_size=(48, 32), patch_size=(8, 4))).train()
    images, noise = pixels(4, channels, 48, 32), draw_noise(4, 48)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(8):
        output = model(images, noise=noise)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    assert output.logits.shape == (4, 48, 32 * channels)
    assert losses[-1] < 0.9 * losses[0]
    assert all(later < earlier for earlier, later in pairwise(losses))


def test_under_autocast_the_residual_stream_and_the_loss_stay_float32():
    model = tiny(MAEForPreTraining)
    exact = model(pixels(), noise=draw_noise())
    with torch.autocast("cpu", torch.bfloat16):
        tokens = model.mae(pixels(), noise=draw_noise(), output_hidden_states=True)
        output = model(pixels(), noise=draw_noise())
    assert {state.dtype for state in tokens.hidden_states} == {torch.float32}
    assert output.loss.dtype == torch.float32
    assert output.loss.item() == pytest.approx(exact.loss.item(), rel=0.02)
    assert model.to(torch.bfloat16)(pixels(), noise=draw_noise()).loss.item() == pytest.approx(
        output.loss.item(), rel=0.05
    )


# ---------------------------------------------------------------------------------------------- refusals

PRE = MAEForPreTraining
REFUSALS = {
    "three dimensions": (
        (MAEModel, {}, {"pixel_values": torch.zeros(3, 32, 32)}),
        r"shape \(3, 32, 32\); pass \(batch, channels, height, width\)",
    ),
    "channels": (
        (MAEModel, {}, {"pixel_values": torch.zeros(2, 4, 32, 32)}),
        r"4 channels, the model 3; convert the images, or load the model with num_channels=4",
    ),
    "no multiple of the patch": (
        (MAEModel, {}, {"pixel_values": torch.zeros(2, 3, 30, 32), "interpolate_pos_encoding": True}),
        r"30x32 is not a multiple of the patch 8x8; resize or crop it",
    ),
    "noise of another shape": (
        (PRE, {}, {"noise": torch.zeros(2, 15)}),
        r"noise has shape \(2, 15\), but must be \(2, 16\) .*pass one number per patch",
    ),
    "mask of another shape": (
        (PRE, {}, {"mask": torch.zeros(16)}),
        r"mask has shape \(16,\), but must be \(2, 16\) .*pass one number per patch",
    ),
    "mask and noise": (
        (PRE, {}, {"mask": own_mask(), "noise": draw_noise()}),
        r"mask can't be combined with mask_ratio, noise or generator; pass one or the other",
    ),
    "mask and ratio": (
        (MAEModel, {}, {"mask": own_mask(), "mask_ratio": 0.5}),
        r"mask can't be combined with mask_ratio",
    ),
    "mask and generator": (
        (PRE, {}, {"mask": own_mask(), "generator": seeded()}),
        r"mask can't be combined with .*generator",
    ),
    "mask and chosen patches": (
        (MAEModel, {}, {"mask": own_mask(), "chosen": choose_patches(tiny_config(), pixels(), (4, 4), 0.5)}),
        r"chosen can't be combined with mask_ratio, noise, mask, bool_masked_pos or generator",
    ),
    "two masks": (
        (PRE, {}, {"mask": own_mask(), "bool_masked_pos": own_mask()}),
        r"mask and bool_masked_pos are two names for one argument, and both were passed; pass one",
    ),
    "two masks of the encoder": (
        (MAEModel, {}, {"mask": own_mask(), "bool_masked_pos": own_mask()}),
        r"mask and bool_masked_pos are two names for one argument",
    ),
    "mask of different counts": (
        (PRE, {}, {"mask": torch.cat([own_mask(1, 4), own_mask(1, 7)])}),
        r"mask keeps 4 patches in one row and 7 in another; keep the same number in each",
    ),
    "mask of all": ((PRE, {}, {"mask": torch.ones(2, 16)}), r"keeps 0 of 16 patches; set at least one entry to 0"),
    "mask of nothing": ((PRE, {}, {"mask": torch.zeros(2, 16)}), r"removes no patch, .*nothing to predict; use e.g."),
    "ratio 0": ((PRE, {}, {"mask_ratio": 0}), r"mask_ratio 0 removes no patch, .*use e.g. 0.75"),
    "ratio 1": ((MAEModel, {}, {"mask_ratio": 1.0}), r"mask_ratio 1.0 lies outside \[0, 1\); the paper uses 0.75"),
    "ratio that keeps nothing": (
        (PRE, {}, {"mask_ratio": 0.96}),
        r"mask_ratio 0.96 keeps none of the 16 patches of a 4x4 grid; use 0.937 or less, or smaller patches",
    ),
    "cells on another grid": (
        (PRE, {"mask_cell": 2}, {"pixel_values": torch.zeros(2, 3, 40, 32), "interpolate_pos_encoding": True}),
        r"mask_cell 2 doesn't divide the patch grid 5x4; choose a divisor of both",
    ),
    "backbone, no multiple": (
        (MAEBackbone, {}, {"pixel_values": torch.zeros(2, 3, 32, 33)}),
        r"32x33 is not a multiple of the patch 8x8; resize or crop it",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_does_not_fit_is_refused_with_both_values_and_the_remedy(case):
    (model_class, overrides, inputs), message = REFUSALS[case]
    with pytest.raises(ValueError, match=message):
        tiny(model_class, **overrides)(**{"pixel_values": pixels(), **inputs})


@every_class
def test_a_misspelt_argument_is_an_error(model_class):
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'mask_ration'"):
        tiny(model_class)(pixels(), mask_ration=0.5)


@every_class
def test_arguments_of_other_models_pass_if_they_are_none(model_class):
    model = tiny(model_class)
    nothing = dict.fromkeys(("input_ids", "attention_mask", "inputs_embeds", "position_ids", "output_attentions"))
    expected, found = model(pixels(), return_dict=True), model(pixels(), return_dict=True, **nothing)
    assert expected.keys() == found.keys()
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'attention_mask'"):
        model(pixels(), attention_mask=torch.ones(2, 16))


def test_pretraining_ignores_labels_and_what_a_trainer_counts():
    model = tiny(MAEForPreTraining).eval()
    expected = model(pixels()).loss
    assert torch.equal(model(pixels(), labels=torch.tensor([0, 1])).loss, expected)
    assert torch.equal(model(pixels(), num_items_in_batch=torch.tensor(2)).loss, expected)
    assert "labels" not in inspect.signature(MAEForPreTraining.forward).parameters  # Trainer would ask for them


@pytest.mark.parametrize("model_class", [MAEModel, MAEForPreTraining, MAEForImageClassification])
def test_any_size_that_the_patch_divides_runs_with_one_warning(model_class, caplog):
    logging.getLogger("hf_mae.modeling_mae").warning_once.cache_clear()
    model, bigger = tiny(model_class).eval(), pixels(2, 3, 64)
    expected = model(bigger, interpolate_pos_encoding=True)
    assert caplog.messages == []
    for _ in range(2):
        found = model(bigger)
    assert len(caplog.messages) == 1
    assert "images of another size than 32x32" in caplog.messages[0]
    model(pixels(2, 3, 48))
    assert len(caplog.messages) == 1
    first = next(iter(expected))
    assert torch.equal(found[first], expected[first])


@pytest.mark.parametrize("trained", [False, True])
def test_the_positions_of_another_size_are_made_once_and_anew_after_a_change(trained, monkeypatch):
    positions = MAEPositions(tiny_config(), 48)
    if trained:
        positions.table.add_(torch.randn(17, 48))
    calls, real = [], MAEPositions._resized
    monkeypatch.setattr(MAEPositions, "_resized", lambda self, grid: calls.append(grid) or real(self, grid))
    table = positions((6, 5))
    assert positions((6, 5)) is table
    assert calls == [(6, 5)]
    other = torch.randn(17, 48)
    for change in (
        lambda: positions.load_state_dict({"table": other}),
        lambda: positions.load_state_dict({"table": other + 1}, assign=True),
        lambda: positions.table.mul_(2),
        lambda: setattr(positions.table, "data", other - 1),
        lambda: setattr(positions.config, "position_resize", "sincos"),
    ):
        change()
        assert not torch.equal(positions((6, 5)), table)
        table = positions((6, 5))
        assert torch.equal(table, real(positions, (6, 5)))
        assert positions((6, 5)) is table
    for side in range(1, 12):
        positions((side, 2))
    assert len(positions.others) <= 8
    assert pickle.loads(pickle.dumps(positions)).others == {}


def test_a_trained_table_gets_its_gradient_at_any_size():
    positions = MAEPositions(tiny_config(position_resize="interpolate"), 48, trainable=True)
    for _ in range(2):
        positions((6, 5)).sum().backward()
    assert (positions.table.grad != 0).all()


def test_a_size_seen_first_without_gradients_can_be_trained_on():
    model = tiny(MAEForPreTraining)
    with torch.inference_mode():
        model(pixels(2, 3, 64), interpolate_pos_encoding=True)
    kept = [table for module in tables(model) for _, table in module.others.values()]
    assert kept
    assert not any(table.is_inference() for table in kept)
    model.train()(pixels(2, 3, 64), interpolate_pos_encoding=True).loss.backward()
    assert model.mae.embeddings.patch_embed.weight.grad is not None


def test_the_classifier_and_the_backbone_take_no_mask():
    for model_class in (MAEForImageClassification, MAEBackbone):
        with pytest.raises(TypeError, match=f"{model_class.__name__}.* 'mask_ratio'"):
            tiny(model_class)(pixels(), mask_ratio=0.5)


# ---------------------------------------------------------------------------------------------- classifier


def test_integer_labels_get_cross_entropy_and_soft_labels_agree_on_one_hot_rows():
    model = tiny(MAEForImageClassification, num_labels=5, problem_type="single_label_classification")
    labels = torch.tensor([3, 0])
    hard = model(pixels(), labels=labels)
    by_hand = -hard.logits.log_softmax(dim=1)[torch.arange(2), labels].mean()
    torch.testing.assert_close(hard.loss, by_hand)
    torch.testing.assert_close(model(pixels(), labels=labels.unsqueeze(1)).loss, by_hand)
    soft = model(pixels(), labels=F.one_hot(labels, 5).float())
    torch.testing.assert_close(soft.loss, hard.loss)
    mixed = torch.tensor([[0.3, 0, 0, 0.7, 0], [0.5, 0.5, 0, 0, 0]])
    expected = -(mixed * hard.logits.log_softmax(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(model(pixels(), labels=mixed).loss, expected)


@pytest.mark.parametrize(
    ("num_labels", "labels", "problem"),
    [
        (1, torch.tensor([0.5, 2.0]), "regression"),
        (1, torch.tensor([[1], [2]]), "regression"),
        (3, torch.tensor([2, 0]), "single_label_classification"),
        (3, torch.tensor([[2], [0]], dtype=torch.int32), "single_label_classification"),
        (3, torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), "multi_label_classification"),
        (3, torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), "multi_label_classification"),  # though rows sum to 1
        (3, torch.tensor([[True, True, False], [False, False, True]]), "multi_label_classification"),
    ],
)
def test_the_first_labels_decide_the_problem_as_in_transformers(num_labels, labels, problem):
    model = tiny(MAEForImageClassification, num_labels=num_labels)
    loss = model(pixels(), labels=labels).loss
    assert model.config.problem_type == problem
    told = tiny(MAEForImageClassification, num_labels=num_labels, problem_type=problem)
    told.load_state_dict(model.state_dict())
    assert torch.equal(told(pixels(), labels=labels).loss, loss)
    if labels.dtype != torch.bool:
        peer = Dinov2ForImageClassification(
            Dinov2Config(
                hidden_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=32, num_labels=num_labels
            )
        )
        peer(pixels(), labels=labels.flatten().long() if "single" in problem else labels.float())
        assert peer.config.problem_type == problem


def test_the_loss_stays_the_one_of_the_first_batch():
    model = tiny(MAEForImageClassification, num_labels=3)
    model(pixels(), labels=torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
    one_each = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    output = model(pixels(), labels=one_each)
    torch.testing.assert_close(output.loss, F.binary_cross_entropy_with_logits(output.logits, one_each))
    with pytest.raises(ValueError, match=r"shape \(2,\) don't fit \(2, 3\)"):
        model(pixels(), labels=torch.tensor([0, 1]))
    fresh = tiny(MAEForImageClassification, num_labels=3)
    with pytest.raises(ValueError, match="give floats"):
        fresh(pixels(), labels=torch.tensor([[1, 0, 1], [0, 0, 1]]))
    assert fresh.config.problem_type is None


def test_multi_label_and_regression_have_their_losses():
    labels = torch.tensor([[1, 0, 1], [0, 0, 1]])
    model = tiny(MAEForImageClassification, num_labels=3, problem_type="multi_label_classification")
    output = model(pixels(), labels=labels)
    p = output.logits.sigmoid()
    torch.testing.assert_close(output.loss, -(labels * p.log() + (1 - labels) * (1 - p).log()).mean())

    model = tiny(MAEForImageClassification, num_labels=3, problem_type="regression")
    numbers = torch.randn(2, 3)
    output = model(pixels(), labels=numbers)
    torch.testing.assert_close(output.loss, (output.logits - numbers).square().mean())

    model = tiny(MAEForImageClassification, num_labels=1, problem_type="regression")
    output = model(pixels(), labels=numbers[:, 0])
    torch.testing.assert_close(output.loss, (output.logits[:, 0] - numbers[:, 0]).square().mean())
    assert torch.equal(output.loss, model(pixels(), labels=numbers[:, :1]).loss)


@pytest.mark.parametrize(
    ("problem", "labels", "message"),
    [
        (None, torch.tensor([[1, 0, 0], [0, 0, 1]]), r"are not the class indices of 2 images; .*give floats"),
        (None, torch.tensor([0.0, 2.0]), r"shape \(2,\) don't fit \(2, 3\)"),
        ("single_label_classification", torch.full((2, 2), 0.5), r"shape \(2, 2\) don't fit \(2, 3\)"),
        ("single_label_classification", torch.tensor([0, 1, 2]), r"shape \(3,\) are not the class indices of 2 images"),
        (
            "multi_label_classification",
            torch.tensor([0, 1]),
            r"shape \(2,\) don't fit \(2, 3\) .*give 3 values per image",
        ),
        ("regression", torch.zeros(2), r"shape \(2,\) don't fit \(2, 3\) .*change num_labels"),
        ("regression", torch.zeros(3, 2), r"shape \(3, 2\) don't fit \(2, 3\)"),
    ],
)
def test_labels_that_fit_no_loss_are_refused_with_the_remedy(problem, labels, message):
    model = tiny(MAEForImageClassification, num_labels=3, problem_type=problem)
    with pytest.raises(ValueError, match=message):
        model(pixels(), labels=labels)


@pytest.mark.parametrize("std", [2e-5, 0.01])
def test_the_head_starts_as_narrow_as_the_config_says(std):
    model = MAEForImageClassification(tiny_config(num_labels=500, head_initializer_range=std))
    assert float(model.classifier.weight.std()) == pytest.approx(std, rel=0.03)
    assert float(model.classifier.bias.abs().max()) == 0
    # Everything else keeps the original's initial values.
    assert float(model.mae.layers[0].mlp.fc1.weight.abs().max()) == pytest.approx((6 / 144) ** 0.5, rel=0.01)


def test_only_mean_pooling_has_its_norm_after_pooling():
    mean = tiny(MAEForImageClassification, pooling="mean")
    cls = tiny(MAEForImageClassification, pooling="cls")
    tokens = mean.mae(pixels()).last_hidden_state
    expected = mean.classifier(F.layer_norm(tokens[:, 1:].mean(1), (48,), mean.fc_norm.weight, mean.fc_norm.bias, 1e-6))
    torch.testing.assert_close(mean(pixels()).logits, expected)
    assert "fc_norm.weight" not in cls.state_dict()
    assert "mae.norm.weight" not in mean.state_dict()
    torch.testing.assert_close(cls(pixels()).logits, cls.classifier(cls.mae(pixels()).last_hidden_state[:, 0]))


def test_drop_path_drops_whole_samples_in_training_only_and_keeps_the_mean():
    drop = MAEDropPath(0.3)
    branch = torch.ones(20_000, 2, 3)
    dropped = drop.train()(branch)
    assert torch.equal(dropped.amin(dim=(1, 2)), dropped.amax(dim=(1, 2)))
    assert sorted(dropped.unique().tolist()) == pytest.approx([0, 1 / 0.7])
    assert float(dropped.mean()) == pytest.approx(1, abs=0.02)
    assert drop.eval()(branch) is branch


def test_drop_path_rises_with_depth_and_leaves_evaluation_and_the_decoder_alone():
    model = tiny(MAEForPreTraining, drop_path_rate=0.3)
    assert [layer.drop_path.rate for layer in model.mae.layers] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert [layer.drop_path.rate for layer in model.decoder.decoder_layers] == [0, 0]
    losses = {model.train()(pixels(), noise=draw_noise()).loss.item() for _ in range(5)}
    assert len(losses) > 1
    still = tiny(MAEForPreTraining)
    still.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(pixels(), noise=draw_noise()).loss, still(pixels(), noise=draw_noise()).loss)


# ---------------------------------------------------------------------------------------------- backbone


def test_feature_maps_are_the_chosen_layers_tokens_in_image_order():
    model = tiny(MAEBackbone, image_size=(48, 32), patch_size=(8, 4), out_indices=[0, 2, 4])
    output = model(pixels(2, 3, 48, 32), output_hidden_states=True)
    assert [tuple(map_.shape) for map_ in output.feature_maps] == [(2, 48, 6, 8)] * 3
    for map_, index in zip(output.feature_maps, (0, 2, 4), strict=True):
        tokens = output.hidden_states[index]
        for row, column in ((0, 0), (0, 7), (5, 0), (3, 4)):
            assert torch.equal(map_[:, :, row, column], tokens[:, 1 + 8 * row + column])
    model.config.reshape_hidden_states = False
    assert torch.equal(model(pixels(2, 3, 48, 32)).feature_maps[1], output.hidden_states[2])
    assert model.channels == [48, 48, 48]


# ---------------------------------------------------------------------------------------------- kernels, compilers


@every_class
def test_eager_and_sdpa_attention_agree(model_class):
    model = tiny(model_class)
    assert model.config._attn_implementation == "sdpa"
    fast = main_output(model(pixels()))
    model.set_attn_implementation("eager")
    torch.testing.assert_close(main_output(model(pixels())), fast, atol=1e-5, rtol=0)


def test_set_attn_implementation_changes_encoder_and_decoder():
    calls = []

    def counting(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        calls.append(module)
        weights = (query @ key.transpose(-2, -1) * scaling).softmax(dim=-1)
        return (weights @ value).transpose(1, 2).contiguous(), weights

    AttentionInterface.register("counting", counting)
    model = tiny(MAEForPreTraining)
    before = model(pixels(), noise=draw_noise()).loss
    assert calls == []
    model.set_attn_implementation("counting")
    after = model(pixels(), noise=draw_noise()).loss
    assert calls == [module for module in model.modules() if isinstance(module, MAEAttention)]
    assert len(calls) == 6
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)


def test_gradient_checkpointing_recomputes_and_gives_the_same_gradients():
    plain, frugal = tiny(MAEForPreTraining).train(), tiny(MAEForPreTraining).train()
    frugal.load_state_dict(plain.state_dict())
    frugal.gradient_checkpointing_enable()
    runs = []
    for module in frugal.modules():
        if isinstance(module, MAEMLP):
            module.register_forward_pre_hook(lambda *_: runs.append(1))
    for model in (plain, frugal):
        model(pixels(), noise=draw_noise()).loss.backward()
    assert len(runs) == 2 * (4 + 2), "each layer of encoder and decoder twice"
    for (name, one), (_, other) in zip(plain.named_parameters(), frugal.named_parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name


def compiled_equals_eager(model: nn.Module, backend: str, **inputs) -> None:
    """One graph without a break, with the same outputs, and the same gradients in training."""
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    results = []
    for run in (model, compiled):
        torch.manual_seed(5)
        model.zero_grad()
        output = run(pixels(), **inputs)
        main_output(output).square().mean().backward()
        results.append((main_output(output).detach(), [p.grad for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("model_class", "train", "inputs"),
    [
        pytest.param(MAEForPreTraining, True, {"noise": draw_noise()}, id="pretraining with noise"),
        pytest.param(MAEForPreTraining, True, {}, id="pretraining that draws its masks"),
        pytest.param(MAEForPreTraining, False, {}, id="evaluation of pretraining"),
        pytest.param(MAEForImageClassification, True, {"labels": torch.tensor([0, 1])}, id="fine-tuning"),
        pytest.param(MAEBackbone, False, {}, id="backbone"),
    ],
)
def test_models_compile_to_one_graph(model_class, train, inputs):
    model = tiny(model_class, num_hidden_layers=2, decoder_num_hidden_layers=1)
    compiled_equals_eager(model.train(train), "eager", **inputs)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [{}, {"mask_strategy": "block", "mask_cell": 2}, {"drop_path_rate": 0.5}])
def test_pretraining_compiles_to_one_graph_forwards_and_backwards(overrides):
    compiled_equals_eager(tiny(MAEForPreTraining, **overrides).train(), "aot_eager")
    model = tiny(MAEForPreTraining, **overrides).train()
    model.gradient_checkpointing_enable()
    compiled_equals_eager(model, "aot_eager", noise=draw_noise())


def test_the_encoder_exports_with_a_free_batch_size():
    model = tiny(MAEModel)
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(model, (pixels(),), dynamic_shapes=(batch,))
    for size in (1, 5):
        exported, own = program.module()(pixels(size)), model(pixels(size))
        torch.testing.assert_close(exported.last_hidden_state, own.last_hidden_state, atol=1e-6, rtol=0)


# ---------------------------------------------------------------------------------------------- save and load


@every_class
def test_a_saved_model_loads_with_the_same_output(model_class, tmp_path):
    model = tiny(model_class, num_labels=5)
    model.save_pretrained(tmp_path)
    loaded, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(main_output(loaded(pixels())), main_output(model(pixels())))
    assert loaded.state_dict().keys() == model.state_dict().keys()


CLASSIFIER_KEYS = {"fc_norm.weight", "fc_norm.bias", "classifier.weight", "classifier.bias"}
CROSS_LOADING = [
    (MAEForPreTraining, MAEModel, set()),
    (MAEForPreTraining, MAEForImageClassification, CLASSIFIER_KEYS),
    (MAEForPreTraining, MAEBackbone, set()),
    (MAEModel, MAEForImageClassification, CLASSIFIER_KEYS),
    (MAEModel, MAEBackbone, set()),
    (MAEForImageClassification, MAEModel, {"norm.weight", "norm.bias"}),
    (MAEForImageClassification, MAEBackbone, set()),
]


@pytest.mark.parametrize(
    ("saved", "loaded", "missing"),
    CROSS_LOADING,
    ids=[f"{one.__name__}-{two.__name__}" for one, two, _ in CROSS_LOADING],
)
def test_an_encoder_moves_between_the_classes_without_a_report(saved, loaded, missing, tmp_path):
    source = tiny(saved)
    source.save_pretrained(tmp_path)
    model, report = loaded.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == missing
    unexpected = set(report["unexpected_keys"])
    # A classifier's head has no place in an encoder, and its user should hear of it.
    assert unexpected == (CLASSIFIER_KEYS if saved is MAEForImageClassification else set())
    assert not report["mismatched_keys"]
    encoder, origin = getattr(model, "mae", model), getattr(source, "mae", source)
    for (name, one), (_, other) in zip(
        encoder.layers.state_dict().items(), origin.layers.state_dict().items(), strict=True
    ):
        assert torch.equal(one, other), name
    assert torch.equal(encoder.embeddings(pixels(), (4, 4)), origin.embeddings(pixels(), (4, 4)))


def test_the_decoder_starts_afresh_from_an_encoders_checkpoint(tmp_path):
    source = tiny(MAEModel)
    source.save_pretrained(tmp_path)
    model, report = MAEForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert all(key.startswith("decoder.") for key in report["missing_keys"])
    assert float(model.decoder.decoder_pred.weight.abs().max()) == pytest.approx((6 / (32 + 192)) ** 0.5, rel=0.01)
    assert float(model.decoder.mask_token.detach().std()) > 0
    assert torch.equal(model.mae(pixels()).last_hidden_state, source(pixels()).last_hidden_state)


# ---------------------------------------------------------------------------------------------- other sizes, channels

sizing_classes = pytest.mark.parametrize("load", [MAEForPreTraining, MAEModel, AutoModel], ids=lambda cls: cls.__name__)


@sizing_classes
def test_untouched_tables_are_made_anew_for_another_image_size(load, tmp_path):
    source = tiny(MAEForPreTraining)
    source.save_pretrained(tmp_path / "first")
    model = load.from_pretrained(tmp_path / "first", image_size=(48, 64))
    assert model.config.image_size == [48, 64]
    assert_tables_are_exact(model, (6, 8))
    model.save_pretrained(tmp_path / "second")
    again, report = load.from_pretrained(tmp_path / "second", output_loading_info=True)
    assert not any(report.values())
    assert again.config.image_size == [48, 64]
    images = pixels(2, 3, 48, 64)
    assert torch.equal(main_output(again(images)), main_output(model(images)))
    # The same as the model that was built for this size and has the other weights.
    fresh = type(model)(tiny_config(image_size=(48, 64))).eval()
    weights = {k: v for k, v in model.state_dict().items() if not k.endswith("table")}
    assert all(key.endswith("table") for key in fresh.load_state_dict(weights, strict=False).missing_keys)
    assert torch.equal(main_output(fresh(images)), main_output(model(images)))


@sizing_classes
def test_changed_tables_are_interpolated_in_two_dimensions(load, tmp_path):
    source = tiny(MAEForPreTraining)
    for positions in tables(source):
        positions.table.add_(0.1 * torch.randn_like(positions.table))
    source.save_pretrained(tmp_path / "first")
    model = load.from_pretrained(tmp_path / "first", image_size=(48, 64))
    for new, old in zip(tables(model), tables(source), strict=False):
        grid = old.table[1:].view(4, 4, -1).permute(2, 0, 1)[None]
        expected = F.interpolate(grid, size=(6, 8), mode="bicubic", align_corners=False)[0].permute(1, 2, 0)
        torch.testing.assert_close(new.table[1:].view(6, 8, -1), expected, atol=1e-6, rtol=0)
        assert torch.equal(new.table[0], old.table[0])
    model.save_pretrained(tmp_path / "second")
    again = load.from_pretrained(tmp_path / "second")
    for new, old in zip(tables(again), tables(model), strict=True):
        assert torch.equal(new.table, old.table)


@pytest.mark.parametrize("how", ["sincos", "interpolate"])
def test_position_resize_overrules_the_automatic_choice(how, tmp_path):
    source = tiny(MAEModel)
    changed = how == "sincos"
    if changed:
        source.embeddings.position_embeddings.table.add_(1.0)
    source.save_pretrained(tmp_path)
    model = MAEModel.from_pretrained(tmp_path, image_size=64, position_resize=how)
    exact = torch.equal(model.embeddings.position_embeddings.table, sincos_table((8, 8), 48))
    assert exact == (how == "sincos")


def test_tables_that_were_rounded_to_bfloat16_still_count_as_untouched(tmp_path):
    tiny(MAEModel).to(torch.bfloat16).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")["embeddings.position_embeddings.table"]
    assert stored.dtype == torch.bfloat16
    assert_tables_are_exact(MAEModel.from_pretrained(tmp_path, image_size=64, dtype=torch.float32), (8, 8))


@pytest.mark.parametrize("changed", [False, True])
@torch.no_grad()
def test_one_call_at_another_size_equals_the_model_loaded_for_it(changed, tmp_path):
    source = tiny(MAEForPreTraining)
    if changed:
        source.mae.embeddings.position_embeddings.table.add_(torch.randn(17, 48))
    source.save_pretrained(tmp_path)
    images, noise = pixels(2, 3, 64, 48), draw_noise(2, 48)
    moved = MAEForPreTraining.from_pretrained(tmp_path, image_size=(64, 48))(images, noise=noise)
    passing = source(images, noise=noise, interpolate_pos_encoding=True)
    torch.testing.assert_close(passing.logits, moved.logits, atol=1e-6, rtol=0)
    assert torch.equal(passing.mask, moved.mask)
    assert source.mae.embeddings.position_embeddings.table.shape == (17, 48), "the model itself stays"


@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize("load", [MAEForPreTraining, MAEModel, AutoModel], ids=lambda cls: cls.__name__)
@torch.no_grad()
def test_new_channels_follow_the_rule_of_the_mean(load, channels, tmp_path):
    source = tiny(MAEForPreTraining)
    source.save_pretrained(tmp_path / "first")
    model = load.from_pretrained(tmp_path / "first", num_channels=channels)
    assert model.config.num_channels == channels
    embed = getattr(model, "mae", model).embeddings.patch_embed
    old = source.mae.embeddings.patch_embed.weight
    assert embed.weight.shape == (48, channels, 8, 8)
    for channel in range(channels):
        expected = (old[:, 0] + old[:, 1] + old[:, 2]) / 3 * (3 / channels)
        torch.testing.assert_close(embed.weight[:, channel], expected, atol=1e-6, rtol=0)
    # A gray image means the same to both, however many times it is repeated.
    gray, noise = pixels(2, 1), draw_noise()
    one, other = model(gray.expand(-1, channels, -1, -1), noise=noise), source(gray.expand(-1, 3, -1, -1), noise=noise)
    if load is MAEForPreTraining:
        predicted = one.logits.view(2, 16, 64, channels)
        mean = other.logits.view(2, 16, 64, 3).mean(dim=-1, keepdim=True).expand(-1, -1, -1, channels)
        torch.testing.assert_close(predicted, mean, atol=1e-5, rtol=0)
    else:
        tokens = source.mae(gray.expand(-1, 3, -1, -1), noise=noise).last_hidden_state
        torch.testing.assert_close(one.last_hidden_state, tokens, atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path / "second")
    again, report = load.from_pretrained(tmp_path / "second", output_loading_info=True)
    assert not any(report.values())
    assert again.config.num_channels == channels
    assert torch.equal(getattr(again, "mae", again).embeddings.patch_embed.weight, embed.weight)


def test_size_and_channels_change_together_and_the_model_trains(tmp_path):
    tiny(MAEForPreTraining).save_pretrained(tmp_path)
    model = MAEForPreTraining.from_pretrained(tmp_path, image_size=48, num_channels=5, trainable_positions=True).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    output = model(pixels(2, 5, 48))
    output.loss.backward()
    optimizer.step()
    assert output.logits.shape == (2, 36, 320)
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


def test_a_config_given_to_from_pretrained_says_the_size_and_is_not_changed(tmp_path):
    tiny(MAEForPreTraining).save_pretrained(tmp_path)
    config = MAEConfig.from_pretrained(tmp_path, image_size=64, num_channels=1)
    before = config.to_dict()
    model = MAEForPreTraining.from_pretrained(tmp_path, config=config)
    assert config.to_dict() == before
    assert (model.config.image_size, model.config.num_channels) == (64, 1)
    assert_tables_are_exact(model, (8, 8))


def test_an_impossible_size_at_loading_is_refused_with_the_nearest(tmp_path):
    model = tiny(MAEForPreTraining)
    model.save_pretrained(tmp_path)
    message = r"image_size 60x60 is not a multiple of patch_size 8x8; the nearest that fits is 64x64"
    for load in (MAEForPreTraining, MAEModel, AutoModel):
        with pytest.raises(ValueError, match=message):
            load.from_pretrained(tmp_path, image_size=60)
    with pytest.raises(ValueError, match=message):
        model.resize_input(image_size=60)
    assert model.config.image_size == 32


@pytest.mark.parametrize("attention", ["self", "cross"])
def test_patches_without_data_are_left_out_of_the_loss(attention):
    model = tiny(MAEForPreTraining, decoder_attention=attention).eval()
    pixel_values = torch.randn(2, 3, *model.config.image_height_width)
    noise = torch.rand(2, model.config.num_patches)
    no_data = torch.rand(2, model.config.num_patches) < 0.4
    output = model(pixel_values, noise=noise, no_data=no_data)
    errors = (output.logits - model.patch_target(pixel_values)).square().mean(dim=-1)
    counts = output.mask.bool() & ~no_data
    torch.testing.assert_close(output.loss, errors[counts].mean())
    assert model(pixel_values, noise=noise, no_data=torch.ones_like(no_data)).loss == 0
    nothing_missing = model(pixel_values, noise=noise, no_data=torch.zeros_like(no_data)).loss
    torch.testing.assert_close(nothing_missing, model(pixel_values, noise=noise).loss)

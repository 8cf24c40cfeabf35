"""Parameter groups: what decays, which layer learns how fast, and which learns at all."""

import itertools
import re

import pytest
import torch
from golden import GOLDEN
from tiny import draw_noise, pixels, tiny
from torch import nn

from hf_mae import MAEConfig, MAEForImageClassification, MAEForPreTraining
from hf_mae.configuration_mae import SIZES
from hf_mae.layers_mae import MAEPatchEmbed
from hf_mae.optim.groups import adamw, layer_decay_groups, parameter_groups, train_last_blocks


def test_all_but_one_dimensional_parameters_are_decayed_tokens_among_them():
    model = MAEForPreTraining(tiny(MAEForPreTraining).config)
    groups = parameter_groups(model, 0.05)
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, spared = ([name_of[id(parameter)] for parameter in group["params"]] for group in groups)
    assert sorted(decayed + spared) == sorted(name_of.values())
    # By name, the other way round: weights of linear layers and of the patch projection, and the two tokens.
    linear = {
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, (nn.Linear, MAEPatchEmbed))
    }
    assert set(decayed) == linear | {"mae.embeddings.cls_token", "decoder.mask_token"}
    assert all(name.endswith(".bias") or "norm" in name for name in spared)
    assert any("norm" in name and name.endswith(".weight") for name in spared)


def test_frozen_parameters_are_left_out_and_so_is_an_empty_group():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1, bias=False))
    model[0].weight.requires_grad_(False)
    groups = parameter_groups(model, 0.1)
    assert [[p.shape for p in group["params"]] for group in groups] == [[(1, 3)], [(3,)]]
    model[0].bias.requires_grad_(False)
    (group,) = parameter_groups(model, 0.1)
    assert group["weight_decay"] == 0.1


def test_trainable_positions_are_decayed_and_fixed_ones_are_not_trained():
    for trainable in (False, True):
        model = tiny(MAEForPreTraining, trainable_positions=trainable)
        tables = [p for name, p in model.named_parameters() if "position" in name and p.requires_grad]
        decayed = {id(p) for p in parameter_groups(model, 0.05)[0]["params"]}
        assert len(tables) == trainable
        assert all(id(table) in decayed for table in tables)


def test_steps_of_the_optimizer_are_adamws_formula():
    model = tiny(MAEForPreTraining)
    optimizer = adamw(model, (0.9, 0.95), 0.05)
    assert all(group["betas"] == (0.9, 0.95) for group in optimizer.param_groups)
    by_hand = {name: p.detach().double() for name, p in model.named_parameters() if p.requires_grad}
    before = {name: value.clone() for name, value in by_hand.items()}
    first = {name: torch.zeros_like(value) for name, value in by_hand.items()}
    second = {name: torch.zeros_like(value) for name, value in by_hand.items()}
    for step, lr in enumerate((1e-2, 3e-2, 2e-2), start=1):
        for group in optimizer.param_groups:
            group["lr"] = lr
        model(pixels(seed=step), noise=draw_noise()).loss.backward()
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            gradient = parameter.grad.double()
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.95 * second[name] + 0.05 * gradient**2
            update = first[name] / (1 - 0.9**step) / ((second[name] / (1 - 0.95**step)).sqrt() + 1e-8)
            decay = 0.05 if parameter.ndim > 1 else 0.0
            by_hand[name] = by_hand[name] * (1 - lr * decay) - lr * update
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(parameter.double(), by_hand[name], atol=2e-6, rtol=1e-5), name
            assert (by_hand[name] - before[name]).abs().max() > 1e-2, name


def test_a_learning_rate_that_nobody_set_changes_nothing():
    model = tiny(MAEForPreTraining)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = adamw(model, (0.9, 0.95), 0.05)
    model(pixels(), noise=draw_noise()).loss.backward()
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# ------------------------------------------------------------------------------------------ layer-wise learning rates


OURS = {
    "cls_token": "mae.embeddings.cls_token",
    "pos_embed": "mae.embeddings.position_embeddings.table",
    "patch_embed.proj.": "mae.embeddings.patch_embed.",
    "blocks.": "mae.layers.",
    ".attn.": ".attention.",
    "head.": "classifier.",
}


def our_name(name: str) -> str:
    for theirs, ours in OURS.items():
        name = name.replace(theirs, ours)
    return name


def classifier_on_meta(size: str) -> MAEForImageClassification:
    with torch.device("meta"):
        return MAEForImageClassification(MAEConfig(**SIZES[size], trainable_positions=True, num_labels=1000))


def scales(model, layer_decay: float) -> dict[str, tuple[float, float]]:
    """Name -> learning rate relative to the head's, and weight decay; every parameter exactly once."""
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [
        (name_of[id(parameter)], (group["lr"] / 2e-3, group["weight_decay"]))
        for group in layer_decay_groups(model, 2e-3, layer_decay, 0.05)
        for parameter in group["params"]
    ]
    assert sorted(name for name, _ in found) == sorted(name_of.values())
    return dict(found)


@pytest.mark.parametrize(("size", "layer_decay"), [("base", 0.65), ("large", 0.75)])
def test_rates_and_decay_of_parameters_are_the_originals(size, layer_decay):
    (key,) = (key for key in GOLDEN if key.startswith(f"layer decay {size} {layer_decay}"))
    found = scales(classifier_on_meta(size), layer_decay)
    assert len(GOLDEN[key]) == 10
    for name, expected in GOLDEN[key].items():
        # The figures are printed to eight places.
        assert found[our_name(name)] == pytest.approx(expected, abs=5.1e-9, rel=0), name


@pytest.mark.parametrize(
    ("size", "depth", "layer_decay"), [("base", 12, 0.65), ("large", 24, 0.75), ("huge", 32, 0.75)]
)
def test_every_parameter_has_the_rate_of_its_layer(size, depth, layer_decay):
    model = classifier_on_meta(size)
    rates = [layer_decay**power for power in range(depth + 1, -1, -1)]  # of the embedding, the blocks, the head
    expected = {"classifier.weight": rates[-1], "classifier.bias": rates[-1]}
    expected |= {"fc_norm.weight": rates[-1], "fc_norm.bias": rates[-1]}
    embedding = ("cls_token", "patch_embed.weight", "patch_embed.bias", "position_embeddings.table")
    expected |= {f"mae.embeddings.{name}": rates[0] for name in embedding}
    parts = [f"{part}.{kind}" for part in ("norm1", "norm2", "attention.qkv", "attention.proj", "mlp.fc1", "mlp.fc2")
             for kind in ("weight", "bias")]  # fmt: skip
    expected |= {f"mae.layers.{i}.{part}": rates[i + 1] for i in range(depth) for part in parts}
    found = scales(model, layer_decay)
    assert {name: pytest.approx(rate) for name, (rate, _) in found.items()} == expected
    decayed = {name for name, (_, decay) in found.items() if decay == 0.05}
    assert decayed == {name for name in expected if re.search(r"(attention|mlp|classifier|patch_embed).*weight$", name)}
    assert {decay for _, decay in found.values()} == {0.0, 0.05}


def test_the_first_group_is_the_heads_and_a_decay_of_one_is_one_rate():
    model = tiny(MAEForImageClassification, num_labels=3)
    groups = layer_decay_groups(model, 1e-3, 0.5, 0.05)
    assert groups[0]["lr"] == 1e-3
    assert any(parameter is model.classifier.bias for parameter in groups[0]["params"])
    # 4 blocks, an embedding and a head, each with and without decay.
    assert [group["lr"] for group in groups] == [1e-3 * 0.5**power for power in range(6) for _ in range(2)]
    assert {group["lr"] for group in layer_decay_groups(model, 1e-3, 1.0, 0.05)} == {1e-3}


# ------------------------------------------------------------------------------------------ partial fine-tuning


HEAD = {"classifier.weight", "classifier.bias", "fc_norm.weight", "fc_norm.bias"}


HALF = {f"mae.layers.3.{name}" for name in (
    "norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"
)}  # fmt: skip


def block(number: int) -> set[str]:
    other = ("norm1.weight", "norm1.bias", "attention.qkv.weight", "attention.qkv.bias", "attention.proj.weight",
             "attention.proj.bias")  # fmt: skip
    return {name.replace("layers.3", f"layers.{number}") for name in HALF} | {f"mae.layers.{number}.{o}" for o in other}


EMBEDDING = {
    "mae.embeddings.cls_token",
    "mae.embeddings.patch_embed.weight",
    "mae.embeddings.patch_embed.bias",
    "mae.embeddings.position_embeddings.table",
}


TRAINED = {
    "0": HEAD,
    "0.5": HEAD | HALF,
    "1": HEAD | block(3),
    "2": HEAD | block(3) | block(2),
    "4": HEAD | block(3) | block(2) | block(1) | block(0),
    "all": HEAD | block(3) | block(2) | block(1) | block(0) | EMBEDDING,
}


@pytest.mark.parametrize("blocks", TRAINED)
def test_partial_fine_tuning_changes_the_named_parameters_and_no_bit_of_the_others(blocks):
    model = tiny(MAEForImageClassification, num_labels=3, trainable_positions=True).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train_last_blocks(model, blocks)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == TRAINED[blocks]
    optimizer = torch.optim.AdamW(layer_decay_groups(model, 1e-2, 0.75, 0.05))
    for step in range(2):
        model(pixels(4, seed=step), labels=torch.tensor([0, 1, 2, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = model.state_dict()
    assert {name for name in after if not torch.equal(after[name], before[name])} == TRAINED[blocks]


def test_with_the_class_token_the_last_norm_trains_with_the_head():
    model = tiny(MAEForImageClassification, num_labels=3, pooling="cls")
    train_last_blocks(model, "0")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"mae.norm.weight", "mae.norm.bias", "classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("blocks", ["5", "-1", "1.5", "none", "0.50", ""])
def test_an_unknown_number_of_blocks_names_those_that_there_are(blocks):
    with pytest.raises(ValueError, match=rf"trainable_blocks {blocks} is not possible; choose 0, 0.5, 1 to 4, or all"):
        train_last_blocks(tiny(MAEForImageClassification, num_labels=3), blocks)


def test_more_trained_blocks_are_a_superset():
    for fewer, more in itertools.pairwise(TRAINED.values()):
        assert fewer < more

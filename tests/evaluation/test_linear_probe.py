"""The paper's linear probe: its numbers, its step by hand, and that it leaves the encoder alone."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from measure_in_processes import bright_rows, classes_of, measure
from memory_source import MemorySource
from runs import REPOSITORY, environment, mistake, recipe_names, start
from tiny import save_model
from torch import nn

from hf_mae.cli import read_keys
from hf_mae.data.augment import sample_rng, training_view
from hf_mae.data.decode import decode_image
from hf_mae.data.order import Rows
from hf_mae.errors import UserError
from hf_mae.evaluation.encoder import FrozenEncoder
from hf_mae.evaluation.linear_probe import ProbeRun, describe_settings, make_head
from hf_mae.keys.evaluation_keys import LinearProbeRecipe
from hf_mae.optim.lars import LARS
from hf_mae.run_folder import read_results

# Typed from the published recipe (linear probing, ViT-Base; 50 epochs are enough for Large and Huge).
TABLE = {
    "total_batch_size": 16384,
    "blr": 0.1,
    "lr": 6.4,
    "epochs": 90,
    "warmup_epochs": 10,
    "min_lr": 0.0,
    "weight_decay": 0.0,
    "momentum": 0.9,
    "trust_coefficient": 1e-3,
    "crop_scale": (0.08, 1.0),
    "flip": True,
    "bn_eps": 1e-6,
    "init_std": 0.01,
}


@pytest.mark.parametrize(("size", "epochs"), [("base", 90), ("large", 50), ("huge", 50)])
def test_a_recipe_has_the_published_numbers(size, epochs):
    words = ["--recipe", f"linear_probe_vit_{size}_in1k", "--model", "m"]
    recipe = read_keys("evaluate linear-probe", words)
    settings = describe_settings(recipe, "cls")
    assert {key: settings[key] for key in TABLE} == {**TABLE, "epochs": epochs}
    assert settings["differs_from_source"] == ({} if epochs == 90 else {"epochs": epochs})
    assert (recipe.protocol, recipe.pooling) == ("paper", "cls")
    assert (recipe.dataset, recipe.split, recipe.eval_split) == ("ILSVRC/imagenet-1k", "train", "validation")
    assert recipe.per_device_batch_size == 16384 // 32  # on 32 GPUs


def test_the_defaults_have_the_published_numbers():
    settings = describe_settings(LinearProbeRecipe(model="m", dataset="d"), "cls")
    assert {key: settings[key] for key in TABLE} == TABLE
    assert settings["differs_from_source"] == {}


def test_recipes_of_probes_are_not_offered_for_pretraining():
    assert not any(name.startswith("linear_probe") for name in recipe_names())
    assert len(recipe_names("evaluate linear-probe")) == 3
    words = ["--recipe", "linear_probe_vit_bse_in1k", "--model", "m"]
    with pytest.raises(UserError, match="did you mean 'linear_probe_vit_base_in1k'"):
        read_keys("evaluate linear-probe", words)


def test_the_head_and_its_optimizer_are_the_published_ones(folder):
    norm, linear = make_head(768, 1000)
    assert isinstance(norm, nn.BatchNorm1d)
    assert (norm.affine, norm.eps, norm.momentum) == (False, 1e-6, 0.1)
    assert (linear.in_features, linear.out_features) == (768, 1000)
    assert linear.weight.std().item() == pytest.approx(0.01, rel=0.01)
    assert linear.weight.mean().abs().item() < 1e-4
    assert (linear.bias == 0).all()
    run = probe_run(folder)
    optimizer = run.optimizer
    assert isinstance(optimizer, LARS)
    (group,) = optimizer.param_groups
    assert {key: group[key] for key in ("momentum", "weight_decay", "trust_coefficient")} == {
        "momentum": 0.9, "weight_decay": 0.0, "trust_coefficient": 1e-3,
    }  # fmt: skip
    assert set(group["params"]) == set(run.head[1].parameters())


# ------------------------------------------------------------------------------------------ a run


def probe_run(folder, per_device=16, workers=0, images=96, **settings) -> ProbeRun:
    recipe = probe_recipe(folder, num_workers=workers, **settings)
    encoder, rows = FrozenEncoder(folder, "cls"), bright_rows(images)
    return ProbeRun(encoder, rows, classes_of(rows), recipe, per_device, 0, Accelerator(cpu=True))


def probe_recipe(folder, **settings) -> LinearProbeRecipe:
    few = {"total_batch_size": 32, "epochs": 3, "warmup_epochs": 0, "blr": 20, "num_workers": 0}
    return LinearProbeRecipe(model=folder, dataset="", **few | settings)


@pytest.fixture
def folder(tmp_path):
    return save_model(tmp_path / "model")


def test_steps_of_the_probe_are_those_of_a_loop_by_hand(folder):
    run = probe_run(folder)
    weight, bias = (parameter.detach().double().clone() for parameter in run.head.parameters())
    buffers = [torch.zeros_like(weight), torch.zeros_like(bias)]
    assert (run.total_steps, run.grad_accum_steps) == (9, 2)
    batches = [list(part) for part in zip(*[iter(run._batches())] * 2, strict=True)]
    for step in range(9):
        lr = 20 * 32 / 256 * 0.5 * (1 + math.cos(math.pi * step / 9))
        gradients = [torch.zeros_like(weight), torch.zeros_like(bias)]
        for images, labels in batches[step]:
            pixel_values = (images.double() / 255 - 0.3) / 0.4
            features = run.encoder.encoder(pixel_values.float()).last_hidden_state[:, 0].double()
            centred = features - features.mean(dim=0)
            normal = centred / torch.sqrt((centred**2).mean(dim=0) + 1e-6)
            # d cross-entropy / d logits = softmax - one-hot
            wrong = torch.softmax(normal @ weight.T + bias, dim=1) - torch.eye(3, dtype=torch.double)[labels]
            gradients[0] += wrong.T @ normal / len(labels) / 2
            gradients[1] += wrong.mean(dim=0) / 2
        gradients[0] *= 0.001 * weight.norm() / gradients[0].norm()
        for parameter, buffer, gradient in zip((weight, bias), buffers, gradients, strict=True):
            buffer.mul_(0.9).add_(gradient)
            parameter -= lr * buffer
        before = run.head[1].weight.detach().clone()
        run.head.train()
        loss, used = run.step(step, iter(batches[step]))
        assert used == pytest.approx(lr)
        assert math.isfinite(loss)
        assert not torch.equal(before, run.head[1].weight)
        for found, expected in zip(run.head.parameters(), (weight, bias), strict=True):
            torch.testing.assert_close(found.detach().double(), expected, atol=1e-6, rtol=0)
    assert run.recipe.lr == 2.5


def test_crops_are_drawn_once_between_8_and_100_percent_and_flipped(folder):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (10, 70, 1), np.uint8) for _ in range(64)]
    rows = Rows(MemorySource([images], labels=range(64)))
    encoder, recipe = FrozenEncoder(folder, "cls"), probe_recipe(folder, epochs=1)
    run = ProbeRun(encoder, rows, classes_of(rows), recipe, 16, 3, Accelerator(cpu=True))
    seen = 0
    for batch, labels in run._batches():
        for found, number in zip(batch.numpy(), labels.tolist(), strict=True):
            image = decode_image(images[number], 1)
            crop, usual = (
                training_view(image, sample_rng(3, 0, 0, number), (8, 8), (0.08, 1.0), True, one_draw)
                for one_draw in (True, False)
            )
            assert np.array_equal(found, crop)
            seen += not np.array_equal(usual, crop)
    assert seen > 10  # crops for which torchvision would have drawn again


def test_the_learning_rate_warms_up_and_falls_as_published(folder):
    run = probe_run(folder, epochs=90, warmup_epochs=10)
    steps_per_epoch = 96 / 32
    assert run.total_steps == 90 * steps_per_epoch
    batch = next(run._batches())
    rates = {epoch: run.step(round(epoch * steps_per_epoch), iter([batch] * 2))[1] for epoch in (0, 5, 10, 50, 90)}
    assert rates == pytest.approx({0: 0, 5: 1.25, 10: 2.5, 50: 1.25, 90: 0}, abs=1e-9)


def test_the_probe_learns_and_leaves_every_bit_of_the_encoder(folder):
    run = probe_run(folder, epochs=20)
    before = {name: tensor.clone() for name, tensor in run.encoder.state_dict().items()}
    untrained, images = run.accuracy(bright_rows(96))
    run.train()
    trained, _ = run.accuracy(bright_rows(96))
    assert images == 96
    assert untrained["linear_top1"] < 80 < trained["linear_top1"]
    assert trained.keys() == {"linear_top1"}  # of two classes, all are among the first five
    after = run.encoder.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_run_is_a_function_of_its_seed_whatever_the_workers(folder):
    heads = []
    for workers in (0, 2):
        run = probe_run(folder, workers=workers, images=400, epochs=1)
        run.train()
        heads.append(run.head.state_dict())
    assert all(torch.equal(tensor, heads[1][name]) for name, tensor in heads[0].items())


def test_evaluation_uses_running_statistics_of_the_features(folder):
    run = probe_run(folder)
    run.train()
    norm = run.head[0]
    assert norm.num_batches_tracked == 9 * 2
    few = Rows(bright_rows(96).source, max_samples=1)
    figures, images = run.accuracy(few)  # one image would have no statistics of its own
    assert (images, figures["linear_top1"] in (0, 100)) == (1, True)


# ------------------------------------------------------------------------------------------ the command


def paper(folder, *words):
    small = ["--total_batch_size", 64, "--epochs", 2, "--warmup_epochs", 1, "--blr", 10, "--num_workers", 0]
    data = ["--dataset", "digits", "--max_samples", 200, "--max_eval_samples", 50]
    return ["evaluate", "linear-probe", "--protocol", "paper", "--model", folder, *data, *small, *words]


def test_the_result_states_the_protocol_and_what_is_not_as_published(folder, tmp_path, capsys):
    assert start(*paper(folder)) == 0
    (result,) = read_results(tmp_path / "model" / "results.json")
    protocol = result["protocol"]
    assert protocol["name"] == "linear_probe_paper"
    assert protocol["differs_from_source"] == {"total_batch_size": 64, "epochs": 2, "warmup_epochs": 1, "blr": 10}
    assert {key: protocol[key] for key in ("momentum", "trust_coefficient", "bn_eps", "pooling", "lr")} == {
        "momentum": 0.9, "trust_coefficient": 0.001, "bn_eps": 1e-6, "pooling": "cls", "lr": 2.5,
    }  # fmt: skip
    assert result["figures"].keys() == {"linear_top1", "linear_top5"}
    assert "differs from arXiv:2111.06377, Table 10, for ViT-Base: total_batch_size 64" in capsys.readouterr().out


def test_another_pooling_than_the_papers_is_named():
    settings = describe_settings(LinearProbeRecipe(model="m", dataset="d"), "mean")
    assert settings["differs_from_source"] == {"pooling": "mean"}


MISTAKES = {
    "a share of a table": (["--fraction", 0.5], "fraction draws from a table of features"),
    "sizes that don't fit": (["--per_device_batch_size", 48], "sizes that fit: 1, 2, 4, 8, 16, 32, 64"),
    "nothing to normalise": (["--per_device_batch_size", 1], "per_device_batch_size 1 leaves BatchNorm nothing"),
    "no epochs": (["--epochs", 0], "epochs 0.0 is out of range"),
    "an unknown recipe": (["--recipe", "quickstart"], "unknown recipe 'quickstart'"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_what_can_not_be_probed_gets_one_line(case, folder, capfd):
    words, expected = MISTAKES[case]
    assert expected in mistake(capfd, *paper(folder, *words))


@pytest.mark.slow
def test_two_processes_probe_and_measure_as_one_does(folder, tmp_path):
    out = tmp_path / "two.json"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = REPOSITORY / "tests" / "measure_in_processes.py"
    subprocess.run(
        [sys.executable, *launch, script, folder, out],
        env=environment(ACCELERATE_USE_CPU="true"),
        check=True,
        timeout=200,
    )
    two = json.loads(out.read_text())
    # The same micro-batches: two after each other, or one on each process.
    one = measure(folder, Accelerator(cpu=True), 16)
    assert two["processes"] == 2
    np.testing.assert_allclose(two["weights"], one["weights"], atol=1e-6)
    assert (two["images"], two["keys"], two["labels"]) == (101, one["keys"], one["labels"])
    np.testing.assert_allclose(two["features"], one["features"], atol=1e-6)
    assert one["quality"].keys() == {"knn_top1", "linear_top1", "rankme"}
    for how in ("quality", "sharded_before", "sharded"):
        assert two[how] == pytest.approx(one["quality"], rel=1e-4), how

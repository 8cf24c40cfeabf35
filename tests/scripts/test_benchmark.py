"""What the benchmarks measure: that both sides do the same work, not how fast."""

import argparse
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from runs import run_script


@pytest.fixture
def bench_step(scripts):
    import bench_step

    return bench_step


def cell(model: str, **keys) -> dict:
    defaults = {"size": "tiny", "precision": "fp32", "compile": False, "checkpointing": False}
    return {"model": model, "batch": 2, "steps": 1, "warmup": 1, **defaults, **keys}


@pytest.mark.slow
def test_both_sides_have_the_same_loss(bench_step):
    found = {name: bench_step.measure(cell(name)) for name in ("hf_mae", bench_step.PEER)}
    losses = [measured["first_loss"] for measured in found.values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert all(measured["seconds"] > 0 and measured["peak_mb"] > 100 for measured in found.values())


def test_both_sides_train_the_same_numbers(bench_step):
    ours, theirs = (bench_step.MODELS[name]("tiny")[0] for name in ("hf_mae", bench_step.PEER))
    trained = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (ours, theirs)]
    assert trained[0] == trained[1]
    assert sum(p.abs().sum() for n, p in theirs.named_parameters() if "pos" in n) > 0  # with positions


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param({"checkpointing": True}, marks=pytest.mark.slow),
        pytest.param({"precision": "bf16"}, marks=pytest.mark.slow),  # on a CPU without bfloat16 instructions
        {"model": "hf_mae, cross decoder"},
    ],
)
def test_the_other_cells_can_be_measured(bench_step, keys):
    measured = bench_step.measure(cell(**{"model": "hf_mae", **keys}))
    assert 0 < measured["first_loss"] < 10


@pytest.mark.slow
def test_cost_counts_what_the_paper_says(scripts, capsys):
    from bench_cost import cost

    rows = {(row["size"], row["kind"]): row for row in cost(argparse.Namespace())}
    whole, cross = rows["base", "standard"], rows["base", "cross decoder, 25 %"]
    # By hand, multiplications of ViT-B's encoder on 50 tokens and of the decoder on 197, twice, forward and backward.
    encoder = 50 * 12 * 12 * 768**2 + 12 * 2 * 50**2 * 768 + 49 * 768**2
    decoder = 197 * 8 * 12 * 512**2 + 8 * 2 * 197**2 * 512 + 50 * 768 * 512 + 197 * 512 * 768
    assert whole["flops_per_image"] == pytest.approx(2 * 3 * (encoder + decoder), rel=0.01)
    assert cross["flops_per_image"] < 0.6 * whole["flops_per_image"]
    assert "huge" in capsys.readouterr().out


def test_the_loader_benchmark_measures_both_sides(scripts, tmp_path, capsys):
    import bench_loader

    pixels = np.random.default_rng(0).integers(0, 256, (64, 48, 64, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{i}.jpg")
    threads = torch.get_num_threads()
    found = bench_loader.loader(argparse.Namespace(dataset=str(tmp_path), workers=0, batches=1, repeats=1))
    torch.set_num_threads(threads)
    assert found[0]["cell"] == bench_loader.RUN_MAE
    assert len(found) >= 3
    assert all(row["median"] > 1 for row in found)
    assert "prepared 64 images" in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_writes_a_table_and_json(tmp_path):
    words = ["step", "--sizes", "tiny", "--precisions", "fp32", "--ways", "eager", "--batch", "2", "--steps", "1"]
    output = tmp_path / "found.json"
    said = run_script(sys.executable, "scripts/benchmarks/benchmark.py", *words, "--repeats", "1", "--output", output)
    found = json.loads(output.read_text())
    assert found["header"]["threads"] == 1
    assert {"hf_mae", "transformers ViTMAE"} <= {row["model"] for row in found["results"]}
    assert "x 1.00" in said
    assert found["header"]["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]

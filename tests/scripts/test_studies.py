"""The study scripts: cells that are done stay done, and the table says what was measured."""

import argparse
import json
import sys

import pytest
import torch
from runs import run_script
from tiny import tiny_config


def test_the_table_has_a_column_for_each_figure_found(scripts, tmp_path):
    import study_common as studies

    rows = [{"cell": "25%", "kNN, k = 20": 30.0}, {"cell": "75%", "kNN, k = 20": 41.239, "fine-tuned": 50.0}]
    studies.write_table(rows, tmp_path, "beside it")
    assert (tmp_path / "table.md").read_text() == (
        "| cell | kNN, k = 20 | fine-tuned |\n|---|---|---|\n| 25% | 30.00 |  |\n| 75% | 41.24 | 50.00 |\n\nbeside it\n"
    )
    studies.plot(rows, "mask ratio", tmp_path)
    assert (tmp_path / "figure.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_study_goes_on_where_it_stopped(scripts, tmp_path):
    command = [
        sys.executable, "scripts/studies/study_mask_ratio.py", "--dataset", "digits", "--recipe", "quickstart",
        "--finetune_recipe", "finetune_quickstart", "--total_steps", "4", "--finetune_epochs", "0.1",
        "--max_samples", "100", "--output_dir", tmp_path, "--ratios", "0.5",
    ]  # fmt: skip
    for ratios in ([], ["0.75"]):
        run_script(*command, *ratios)
        if not ratios:
            weights = (tmp_path / "ratio-0.5" / "pretrain" / "model.safetensors").stat().st_mtime_ns
    table = (tmp_path / "table.md").read_text().splitlines()
    assert table[0] == "| cell | images seen | evaluation loss | kNN, k = 20 | linear probe (fast) | fine-tuned |"
    assert [line.split("|")[1].strip() for line in table[2:4]] == ["50%", "75%"]
    assert all(line.split("|")[2].strip() == "512" for line in table[2:4])  # 4 steps of 128
    assert all(0 < float(number) <= 100 for line in table[2:4] for number in line.split("|")[3:7])
    assert (tmp_path / "ratio-0.5" / "pretrain" / "model.safetensors").stat().st_mtime_ns == weights


@pytest.mark.slow
def test_equal_time_gives_a_lower_ratio_fewer_steps(scripts, tmp_path):
    run_script(
        sys.executable, "scripts/studies/study_mask_ratio.py", "--dataset", "digits", "--recipe", "quickstart",
        "--finetune_recipe", "none", "--max_samples", "100", "--minutes", "0.1", "--output_dir", tmp_path,
        "--ratios", "0.1", "0.9",
    )  # fmt: skip
    steps = [json.loads((tmp_path / f"ratio-{ratio}" / "steps.json").read_text()) for ratio in ("0.1", "0.9")]
    assert 12 <= steps[0] < steps[1]
    seen = [line.split("|")[2].strip() for line in (tmp_path / "table.md").read_text().splitlines()[2:4]]
    assert seen == [f"{128 * count:,}" for count in steps]


def test_the_comparison_with_transformers_counts_every_seed(scripts, tmp_path):
    import compare_vit_mae

    runs = {
        name: [[{"step": 0, "knn": 10.0, "linear": 20.0}, {"step": 5, "knn": 30.0 + seed, "linear": 40.0 + seed}]
               for seed in range(3)]
        for name in compare_vit_mae.MODELS
    }  # fmt: skip
    compare_vit_mae.write_table(runs, tmp_path)
    assert "| hf_mae | 31.0 (30.0 to 32.0) | 41.0 (40.0 to 42.0) |" in (tmp_path / "table.md").read_text()
    compare_vit_mae.plot(runs, tmp_path)
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_the_comparison_fills_the_tables_of_transformers_model(scripts):
    import compare_vit_mae

    built, filled, ours = (make() for make in compare_vit_mae.MODELS.values())
    assert not built.vit.embeddings.position_embeddings.any()
    assert torch.equal(filled.vit.embeddings.position_embeddings[0], ours.mae.embeddings.position_embeddings.table)
    assert torch.equal(filled.decoder.decoder_pos_embed[0], ours.decoder.decoder_pos_embed.table)
    counts = [sum(weight.numel() for weight in model.parameters() if weight.requires_grad) for model in (filled, ours)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("method", ["SimCLR", "MoCoV3"])
def test_the_contrastive_methods_learn_from_two_views(scripts, method):
    pytest.importorskip("lightly", reason="lightly is in the extra [studies], which the tests don't install")
    import compare_contrastive

    torch.manual_seed(0)
    model = getattr(compare_contrastive, method)(tiny_config()).train()
    config = model.encoder.config
    images = torch.randn(8, config.num_channels, *config.image_height_width)
    views = images, images + torch.randn_like(images)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for step in range(20):
        loss = model(*views, step / 20)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert all("key_" in name or "patch_embed" in name for name in frozen)
    assert bool(frozen) == (method == "MoCoV3")


def test_the_bars_of_the_comparison_are_drawn(scripts, tmp_path):
    import compare_contrastive

    rows = [
        {"cell": f"{method}, batch 64", "kNN, k = 20": 40.0, "images/s": 100.0, "peak memory, MB": 1000.0}
        for method in compare_contrastive.METHODS
    ]
    compare_contrastive.plot(rows, tmp_path)
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_both_sides_start_from_the_same_encoder(scripts, tmp_path):
    import compare_contrastive

    compare_contrastive.write_settings(argparse.Namespace(recipe="cifar10_vit_tiny", output_dir=tmp_path))
    settings = (tmp_path / "settings.json").read_text()
    assert '"hidden_size": 192' in settings
    assert '"num_hidden_layers": 6' in settings

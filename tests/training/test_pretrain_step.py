"""How a step of `hf-mae pretrain` is computed."""

import pytest
import torch
import yaml
from runs import evaluations, events, losses, run, weights_difference
from safetensors.torch import load_file
from transformers import AutoModel

from hf_mae import MAEModel

pytestmark = pytest.mark.usefixtures("own_caches", "no_process_is_left")


@pytest.mark.parametrize("micro_batch", [16, 8])
def test_micro_batches_make_the_same_steps_as_whole_batches(finished, tmp_path, micro_batch):
    output_dir = run(tmp_path / "run", save_steps=12, eval_steps=5, per_device_batch_size=micro_batch)
    derived = yaml.safe_load((output_dir / "run_config.yaml").read_text())["derived"]
    assert derived["grad_accum_steps"] == 32 // micro_batch
    assert losses(output_dir) == pytest.approx(losses(finished), rel=1e-6)
    # The last evaluation batch is smaller than the others: 92 images in batches of 32, 16 or 8.
    assert evaluations(output_dir) == pytest.approx(evaluations(finished), rel=1e-6)
    norms, other = ([e["grad_norm"] for e in events(folder) if "loss" in e] for folder in (output_dir, finished))
    assert norms == pytest.approx(other, rel=1e-5)
    assert weights_difference(output_dir, finished) < 1e-6


def test_gradients_longer_than_clip_grad_are_cut_to_it(finished, tmp_path, monkeypatch):
    lengths = []
    step = torch.optim.AdamW.step

    def measured(optimizer, *args, **kwargs):
        gradients = [p.grad.norm() for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        lengths.append(torch.stack(gradients).norm().item())
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", measured)
    output_dir = run(tmp_path / "run", clip_grad=20.0, total_steps=6, per_device_batch_size=16)
    logged = [event["grad_norm"] for event in events(output_dir) if "loss" in event]
    assert max(logged) > 25  # what is logged is the length before
    assert min(logged) < 20
    assert lengths == pytest.approx([min(length, 20.0) for length in logged], rel=1e-4)


def test_a_clip_that_is_never_reached_changes_nothing(finished, tmp_path):
    output_dir = run(tmp_path / "run", save_steps=12, eval_steps=5, clip_grad=1e6)
    assert losses(output_dir) == losses(finished)


def test_gradient_checkpointing_changes_memory_and_nothing_else(finished, tmp_path, monkeypatch):
    recomputed = []
    checkpoint = torch.utils.checkpoint.checkpoint

    def counted(*args, **kwargs):
        recomputed.append(1)
        return checkpoint(*args, **kwargs)

    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", counted)
    monkeypatch.setattr("transformers.modeling_utils.checkpoint", counted, raising=False)
    output_dir = run(tmp_path / "run", save_steps=12, eval_steps=5, gradient_checkpointing=True)
    assert len(recomputed) == 12 * 3  # steps and layers
    assert losses(output_dir) == pytest.approx(losses(finished), rel=1e-6)


def test_bf16_trains_nearly_as_float32_does_and_saves_float32(finished, tmp_path):
    output_dir = run(tmp_path / "run", save_steps=12, eval_steps=5, mixed_precision="bf16")
    assert yaml.safe_load((output_dir / "run_config.yaml").read_text())["derived"]["mixed_precision"] == "bf16"
    assert losses(output_dir) == pytest.approx(losses(finished), rel=0.05)
    assert losses(output_dir) != losses(finished)
    assert {tensor.dtype for tensor in load_file(output_dir / "model.safetensors").values()} == {torch.float32}


@pytest.mark.slow
def test_a_compiled_model_trains_as_the_other_does(tmp_path):
    # One layer and one batch size: each graph costs half a minute of compiling.
    options = {"num_hidden_layers": 1, "total_steps": 4, "max_eval_samples": 32}
    usual = run(tmp_path / "usual", **options)
    counters = torch._dynamo.utils.counters["stats"]
    counters.clear()
    compiled = run(tmp_path / "compiled", compile=True, **options)
    assert counters["unique_graphs"] >= 2  # training and evaluation
    assert losses(compiled) == pytest.approx(losses(usual), rel=1e-5)
    assert evaluations(compiled) == pytest.approx(evaluations(usual), rel=1e-5)
    assert weights_difference(compiled, usual) < 1e-5
    assert type(AutoModel.from_pretrained(compiled)) is MAEModel

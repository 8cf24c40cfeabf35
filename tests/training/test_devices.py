"""What training sets up on a CPU: faster, and nothing less exact."""

import platform
import resource

import pytest
import torch
import torch.nn.functional as F
from runs import run
from tiny import pixels, tiny

from hf_mae import MAEForPreTraining
from hf_mae.training import devices
from hf_mae.training.devices import float32_attention, tune_for_device

CPU = torch.device("cpu")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only the GNU C library has the switch")
def test_freed_memory_is_kept_for_the_next_step():
    tune_for_device(tiny(MAEForPreTraining), CPU, "no")
    faults = []
    for _ in range(20):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)  # 64 MiB, 16,384 pages
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert max(faults[-5:]) < 1000, faults  # the first few may find no place that is large enough


def test_attention_under_bf16_is_that_of_float32_rounded_once():
    model = tiny(MAEForPreTraining)
    query, key, value = torch.randn(3, 2, 4, 17, 12).bfloat16().unbind()
    with torch.autocast("cpu", torch.bfloat16):
        attended, weights = float32_attention(model.mae.layers[0].attention, query, key, value, None, scaling=0.25)
    exact = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), scale=0.25)
    assert weights is None
    assert attended.dtype == torch.bfloat16
    assert torch.equal(attended, exact.transpose(1, 2).bfloat16())


def test_under_bf16_gradients_are_at_least_as_near_to_those_of_float32_as_without_it():
    images, noise = pixels(4), torch.rand(4, 16)
    found = {}
    for name, precision in (("float32", "no"), ("tuned", "bf16"), ("plain", "bf16")):
        torch.manual_seed(0)
        model = tiny(MAEForPreTraining).train()
        if name == "tuned":
            tune_for_device(model, CPU, precision)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(images, noise=noise).loss
        loss.backward()
        found[name] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    distance = {name: (found[name] - found["float32"]).norm() / found["float32"].norm() for name in found}
    assert 0 < distance["tuned"] < 1.1 * distance["plain"] < 0.05, distance


@pytest.mark.parametrize(
    ("precision", "asked", "used"),
    [("bf16", "sdpa", "sdpa_float32"), ("bf16", "eager", "eager"), ("no", "sdpa", "sdpa")],
)
def test_attention_is_changed_only_where_that_gains(precision, asked, used):
    model = tiny(MAEForPreTraining, attn_implementation=asked)
    tune_for_device(model, CPU, precision)
    assert model.config._attn_implementation == used


def test_a_bf16_run_on_a_cpu_uses_it_and_its_files_say_nothing_of_it(tmp_path, monkeypatch):
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return float32_attention(*args, **kwargs)

    monkeypatch.setitem(devices.ALL_ATTENTION_FUNCTIONS, "sdpa_float32", counted)
    output_dir = run(tmp_path / "run", mixed_precision="bf16", total_steps=2, eval_steps=2)
    assert len(calls) >= 2 * 3  # steps and layers
    assert "sdpa" not in (output_dir / "config.json").read_text()

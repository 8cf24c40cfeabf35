"""torch.compile, torch.export, torch.jit.trace and ONNX: the same numbers as without."""

import io

import numpy as np
import pytest
import torch
from peers import CLASSIFIERS, ENCODERS, PRETRAINERS, batch_of, classifier, encoder, masked_rows, need, pretrainer
from tiny import draw_noise, pixels
from torch import nn

BY_NAME = pytest.mark.parametrize("name", CLASSIFIERS)


class Logits(nn.Module):
    """A model whose output is a tensor, as tracers want it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values).logits


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("make_model", "name", "batch"),
    [
        *((classifier, name, {"pixel_values": pixels(2), "labels": torch.tensor([0, 2])}) for name in CLASSIFIERS),
        *((pretrainer, name, batch_of(masked_rows(2))) for name in PRETRAINERS),
    ],
    ids=lambda value: getattr(value, "__name__", value if isinstance(value, str) else "batch"),
)
def test_a_compiled_training_step_has_the_same_loss_and_gradients(make_model, name, batch, backend):
    model = make_model(name).train()
    loss = model(**batch).loss
    expected = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    compiled = torch.compile(model, backend=backend, fullgraph=name == "ours")(**batch).loss
    gradients = torch.autograd.grad(compiled, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    torch.testing.assert_close(compiled, loss, atol=1e-6, rtol=1e-5)
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@BY_NAME
def test_an_exported_program_takes_any_batch(name):
    model = classifier(name)
    program = torch.export.export(
        Logits(model), (pixels(2),), dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch", min=1, max=64)}}
    )
    with torch.no_grad():
        torch.testing.assert_close(program.module()(pixels(5)), model(pixels(5)).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@BY_NAME
def test_a_traced_model_gives_the_same_logits_after_saving(name):
    model = classifier(name)
    traced = torch.jit.trace(Logits(model), pixels(2))
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.load(buffer)(pixels(2, seed=3)), model(pixels(2, seed=3)).logits)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ENCODERS)
def test_torchscript_without_a_wrapper_returns_tuples(name):
    model = encoder(name, return_dict=False)
    traced = torch.jit.trace(model, pixels(2))
    with torch.no_grad():
        torch.testing.assert_close(traced(pixels(2, seed=3))[0], model(pixels(2, seed=3))[0])


@pytest.mark.slow
@BY_NAME
def test_torchs_own_onnx_exporter_keeps_the_logits_at_any_batch(name, tmp_path):
    onnxruntime = need("onnxruntime")
    need("onnxscript")
    model, file = classifier(name), str(tmp_path / "model.onnx")
    torch.onnx.export(
        Logits(model), (pixels(2),), file, input_names=["pixel_values"], output_names=["logits"], dynamo=True,
        dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch", min=1, max=64)}}, verbose=False,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"pixel_values": pixels(5).numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(logits, model(pixels(5)).logits.numpy(), atol=1e-4)


@BY_NAME
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_functional_calls_vmap_and_grad_work(name, attention):
    """torch.func: one gradient for each sample."""
    model = classifier(name)
    model.set_attn_implementation(attention)
    head = {key: value for key, value in model.named_parameters() if key.startswith("classifier.")}

    def loss_of(head, image, label):
        logits = torch.func.functional_call(model, head, (image[None],)).logits
        return nn.functional.cross_entropy(logits, label[None])

    images, labels = pixels(3), torch.tensor([0, 1, 2])
    per_sample = torch.func.vmap(torch.func.grad(loss_of), in_dims=(None, 0, 0))(head, images, labels)
    whole = torch.func.grad(lambda weights: nn.functional.cross_entropy(
        torch.func.functional_call(model, weights, (images,)).logits, labels))(head)  # fmt: skip
    for key, value in per_sample.items():
        torch.testing.assert_close(value.mean(0), whole[key], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", PRETRAINERS)
def test_a_compiled_forward_pass_follows_new_noise(name):
    model = pretrainer(name)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        for seed in (2, 3):
            noise = draw_noise(2, seed=seed)
            expected = model(pixels(2), noise=noise)
            output = compiled(pixels(2), noise=noise)
            assert torch.equal(output.mask, expected.mask)
            torch.testing.assert_close(output.logits, expected.logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", PRETRAINERS)
def test_a_pickled_model_is_the_same_model(name):
    model, buffer = pretrainer(name), io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    with torch.no_grad():
        noise = draw_noise()
        assert torch.equal(loaded(pixels(), noise=noise).logits, model(pixels(), noise=noise).logits)


@pytest.mark.slow
@BY_NAME
def test_flex_attention_gives_the_logits_of_sdpa_and_no_gradients_on_a_cpu(name):
    model = classifier(name)
    with torch.no_grad():
        expected = model(pixels(2)).logits
        model.set_attn_implementation("flex_attention")
        torch.testing.assert_close(model(pixels(2)).logits, expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(NotImplementedError, match="backward"):
        model(pixels(2)).logits.sum().backward()

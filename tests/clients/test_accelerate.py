"""accelerate: big-model loading, offloading and a prepared training loop."""

import pytest
import torch
from accelerate import (
    Accelerator,
    cpu_offload,
    disk_offload,
    dispatch_model,
    infer_auto_device_map,
    init_empty_weights,
    load_checkpoint_and_dispatch,
)
from accelerate.state import AcceleratorState
from accelerate.utils import compute_module_sizes
from peers import CLASSIFIERS, PRETRAINERS, batch_of, classifier, labelled_rows, masked_rows, pretrainer
from tiny import pixels

BY_NAME = pytest.mark.parametrize("name", CLASSIFIERS)


@torch.no_grad()
def logits(model):
    return model(pixels(3)).logits


@pytest.fixture(autouse=True)
def fresh_state():
    """accelerate allows one precision per process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@BY_NAME
@pytest.mark.parametrize("include_buffers", [False, True])
def test_an_empty_model_takes_a_checkpoint(name, include_buffers, tmp_path):
    model = classifier(name)
    expected = logits(model)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    with init_empty_weights(include_buffers=include_buffers):
        empty = type(model)(model.config)
    assert all(parameter.is_meta for parameter in empty.parameters())
    loaded = load_checkpoint_and_dispatch(empty, str(tmp_path / "weights.pt"), device_map={"": "cpu"}).eval()
    torch.testing.assert_close(logits(loaded), expected)


@BY_NAME
@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"], ids=str)
def test_from_pretrained_takes_a_device_map(name, device_map, tmp_path):
    model = classifier(name)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, device_map=device_map).eval()
    torch.testing.assert_close(logits(loaded), logits(model))


@BY_NAME
def test_a_sharded_checkpoint_loads_with_a_device_map(name, tmp_path):
    model = classifier(name)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    torch.testing.assert_close(logits(type(model).from_pretrained(tmp_path, device_map="cpu").eval()), logits(model))


@BY_NAME
def test_weights_on_the_disk_are_fetched_layer_by_layer(name, tmp_path):
    model = classifier(name)
    expected = logits(model)
    torch.testing.assert_close(logits(disk_offload(model, str(tmp_path), torch.device("cpu"))), expected)
    assert all(parameter.is_meta for parameter in model.parameters())


@BY_NAME
def test_weights_in_memory_are_fetched_layer_by_layer(name):
    model = classifier(name)
    expected = logits(model)
    torch.testing.assert_close(logits(cpu_offload(model, torch.device("cpu"))), expected)


@BY_NAME
def test_from_pretrained_offloads_what_does_not_fit(name, tmp_path):
    model = classifier(name)
    model.save_pretrained(tmp_path / "model")
    room = int(compute_module_sizes(model)[""] * 0.9)
    device_map = infer_auto_device_map(model, {"cpu": room}, no_split_module_classes=model._no_split_modules)
    assert set(device_map.values()) == {"cpu", "disk"}
    loaded = type(model).from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=str(tmp_path / "offload")
    )
    torch.testing.assert_close(logits(loaded.eval()), logits(model))
    dispatched = dispatch_model(model, device_map, main_device="cpu", offload_dir=str(tmp_path / "again"))
    torch.testing.assert_close(logits(dispatched), logits(loaded))


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize(
    ("make_model", "name", "rows"),
    [
        *((classifier, name, labelled_rows) for name in CLASSIFIERS),
        *((pretrainer, name, masked_rows) for name in PRETRAINERS),
    ],
)
def test_a_prepared_loop_trains_as_one_without_accelerate(make_model, name, rows, precision):
    def trained(accelerator):
        torch.manual_seed(0)
        model = make_model(name).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        if accelerator:
            model, optimizer = accelerator.prepare(model, optimizer)
        for _ in range(3):
            loss = model(**batch_of(rows(4))).loss
            accelerator.backward(loss) if accelerator else loss.backward()
            if accelerator:
                accelerator.clip_grad_norm_(model.parameters(), 1e9)
            optimizer.step()
            optimizer.zero_grad()
        return loss

    loss = trained(Accelerator(cpu=True, mixed_precision=precision))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, trained(None), rtol=1e-5 if precision == "no" else 0.05, atol=0)

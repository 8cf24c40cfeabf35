"""What programs do with any torch module: average, prune, save in other ways, run in threads and without memory."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import datasets
import pytest
import torch
import torch.distributed.checkpoint as dcp
from datasets.fingerprint import Hasher
from peers import CLASSIFIERS, PRETRAINERS, batch_of, classifier, labelled_rows, masked_rows, pretrainer
from tiny import pixels
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import BitImageProcessor

from hf_mae import MAEImageProcessor, MAEImageProcessorPil

BY_NAME = pytest.mark.parametrize("name", CLASSIFIERS)


@torch.no_grad()
def logits(model, images=None):
    return model(pixels(3) if images is None else images).logits


@BY_NAME
def test_averaged_weights_are_the_mean_of_two_models(name):
    one, other = classifier(name), classifier(name)
    average = AveragedModel(one, use_buffers=True)
    average.update_parameters(one)
    average.update_parameters(other)
    mean = (one.classifier.weight + other.classifier.weight) / 2
    torch.testing.assert_close(average.module.classifier.weight, mean)
    assert logits(average).isfinite().all()


@BY_NAME
def test_a_pruned_model_is_saved_and_loaded(name, tmp_path):
    model = classifier(name)
    parts = [(module, "weight") for module in model.modules() if isinstance(module, nn.Linear)]
    prune.global_unstructured(parts, pruning_method=prune.L1Unstructured, amount=0.3)
    for part in parts:
        prune.remove(*part)
    zeros = sum(int((module.weight == 0).sum()) for module, _ in parts)
    assert zeros == round(0.3 * sum(module.weight.numel() for module, _ in parts))
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(type(model).from_pretrained(tmp_path).eval()), logits(model))


@BY_NAME
def test_a_distributed_checkpoint_in_one_process_restores_the_weights(name, tmp_path):
    model, other = classifier(name), classifier(name)
    dcp.save(model.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    weights = other.state_dict()
    dcp.load(weights, checkpoint_id=tmp_path, no_dist=True)
    other.load_state_dict(weights, strict=True)
    assert torch.equal(logits(other), logits(model))


@BY_NAME
@pytest.mark.parametrize("assign", [False, True])
def test_weights_move_between_models_also_by_assignment(name, assign):
    model, other = classifier(name), classifier(name)
    other.load_state_dict(model.state_dict(), assign=assign)
    assert torch.equal(logits(other), logits(model))


@BY_NAME
def test_threads_may_share_a_model_and_use_several_sizes(name):
    model = classifier(name)
    sizes = [32, 48, 32, 64] * 4
    expected = {size: logits(model, pixels(1, height=size)) for size in set(sizes)}
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda size: logits(model, pixels(1, height=size)), sizes))
    for size, result in zip(sizes, results, strict=True):
        torch.testing.assert_close(result, expected[size])


@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize("make_model", [classifier, pretrainer])
def test_a_model_trains_after_inference_mode(make_model, size):
    """No tensor of inference mode, such as a table for another size, may stay in the model."""
    model, images = make_model("ours"), pixels(2, height=size)
    labels = {"labels": torch.tensor([0, 1])}
    with torch.inference_mode():
        model(images)
    model.train()
    model(images, **labels).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("make_model", "name", "rows"),
    [
        *((classifier, name, labelled_rows) for name in CLASSIFIERS),
        *((pretrainer, name, masked_rows) for name in PRETRAINERS),
    ],
)
def test_autocast_keeps_the_loss_in_float32_and_close(make_model, name, rows):
    model, batch = make_model(name), batch_of(rows(4))
    expected = model(**batch).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**batch)
    assert output.loss.dtype == torch.float32
    assert output.logits.dtype == torch.bfloat16
    torch.testing.assert_close(output.loss, expected, rtol=0.05, atol=0)


@BY_NAME
def test_a_model_without_memory_gives_shapes(name):
    model_class, config_class = CLASSIFIERS[name]
    with torch.device("meta"):
        model = model_class(config_class(num_labels=3))
    assert model(torch.empty(2, 3, 224, 224, device="meta")).logits.shape == (2, 3)


@BY_NAME
def test_torch_counts_the_operations(name):
    def count(batch):
        with FlopCounterMode(display=False) as counter:
            logits(classifier(name), pixels(batch))
        return counter.get_total_flops()

    assert count(4) == 2 * count(2) > 0


@pytest.mark.parametrize("processor_class", [MAEImageProcessor, MAEImageProcessorPil, BitImageProcessor])
def test_a_processor_goes_into_other_processes_and_keeps_its_fingerprint(processor_class):
    size = {"height": 32, "width": 32}
    processor = processor_class(size={"shortest_edge": 32}, crop_size=size)
    rows = datasets.Dataset.from_dict({"image": [[[[i, 0, 0]] * 40] * 40 for i in range(4)]})
    before = Hasher.hash(processor)
    copy = pickle.loads(pickle.dumps(processor))
    images = [pixels(1)[0].mul(20).clamp(0, 255).byte()] * 2
    expected = processor(images, return_tensors="pt")["pixel_values"]
    assert torch.equal(copy(images, return_tensors="pt")["pixel_values"], expected)
    assert Hasher.hash(processor) == before
    assert rows.with_format("numpy").map(
        lambda batch: processor(list(batch["image"].astype("uint8"))), batched=True, remove_columns=["image"]
    )[0]["pixel_values"].shape == (3, 32, 32)  # fmt: skip

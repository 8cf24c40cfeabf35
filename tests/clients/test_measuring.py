"""Programs that look into a model or measure it: captum, pytorch-grad-cam, torchmetrics, scikit-learn, tensorboard."""

import numpy as np
import pytest
import torch
from peers import CLASSIFIERS, ENCODERS, NAMES, arguments, batch_of, classifier, encoder, labelled_rows, need
from tiny import pixels
from torch import nn
from transformers import Trainer

BY_NAME = pytest.mark.parametrize("name", CLASSIFIERS)


class Logits(nn.Module):
    """A classifier whose output is a tensor."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return self.model(pixel_values).logits


def layers_of(model) -> nn.ModuleList:
    """The encoder's blocks, whatever the model calls them."""
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == 2)


@BY_NAME
def test_captums_integrated_gradients_add_up_to_the_difference_of_the_logits(name):
    need("captum")
    from captum.attr import IntegratedGradients

    model, images, target = Logits(classifier(name)), pixels(2), torch.tensor([0, 2])
    attributions = IntegratedGradients(model).attribute(images, target=target, n_steps=100, internal_batch_size=50)
    with torch.no_grad():
        difference = (model(images) - model(torch.zeros_like(images))).gather(1, target[:, None])[:, 0]
    assert attributions.shape == images.shape
    torch.testing.assert_close(attributions.sum((1, 2, 3)).float(), difference, atol=0.02, rtol=0.05)


@BY_NAME
def test_captum_reads_layers_occludes_and_takes_saliency(name):
    need("captum")
    from captum.attr import LayerIntegratedGradients, Occlusion, Saliency

    model, images = Logits(classifier(name)), pixels(1)
    saliency = Saliency(model).attribute(images, target=1)
    wanted = images.clone().requires_grad_()
    expected = torch.autograd.grad(model(wanted)[0, 1], wanted)[0].abs()
    torch.testing.assert_close(saliency, expected)
    occluded = Occlusion(model).attribute(images, sliding_window_shapes=(3, 8, 8), strides=(3, 8, 8), target=1)
    without = images.clone()
    without[..., :8, :8] = 0
    with torch.no_grad():
        expected = (model(images) - model(without))[0, 1]
    torch.testing.assert_close(occluded[0, 0, 0, 0].float(), expected, atol=1e-5, rtol=1e-4)
    layer = layers_of(model)[1].norm1
    assert LayerIntegratedGradients(model, layer).attribute(images, target=1, n_steps=5).shape == (1, 17, 24)


def to_map(tokens: torch.Tensor) -> torch.Tensor:
    """(B, 1 + N, D) tokens -> (B, D, h, w), as pytorch-grad-cam's documentation does for a ViT."""
    return tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4))


@pytest.mark.parametrize("method", ["GradCAM", "EigenCAM", "ScoreCAM"])
@BY_NAME
def test_grad_cam_draws_a_map_from_the_last_blocks_first_norm(name, method):
    cams = need("pytorch_grad_cam", "grad-cam")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, images = Logits(classifier(name)), pixels(2)
    with getattr(cams, method)(model=model, target_layers=[layers_of(model)[1].norm1], reshape_transform=to_map) as cam:
        maps = cam(input_tensor=images, targets=[ClassifierOutputTarget(0), ClassifierOutputTarget(1)])
    assert maps.shape == (2, 32, 32)
    assert np.isfinite(maps).all()
    assert maps.max() > 0


@BY_NAME
def test_torchmetrics_counts_the_logits(name):
    need("torchmetrics")
    from torchmetrics import MetricCollection
    from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

    model, batch = classifier(name), batch_of(labelled_rows())
    scores = MetricCollection([MulticlassAccuracy(3, average="micro"), MulticlassCalibrationError(3)])
    with torch.no_grad():
        for part in (slice(0, 5), slice(5, 8)):
            scores.update(model(batch["pixel_values"][part]).logits, batch["labels"][part])
        expected = (model(**batch).logits.argmax(1) == batch["labels"]).float().mean()
    torch.testing.assert_close(scores.compute()["MulticlassAccuracy"], expected)


@pytest.mark.parametrize("name", ENCODERS)
def test_scikit_learn_fits_the_embeddings(name):
    linear = need("sklearn.linear_model", "scikit-learn")
    from sklearn.neighbors import NearestNeighbors
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = encoder(name)
    with torch.no_grad():
        features = model(pixels(12)).pooler_output.numpy()
    labels = np.arange(12) % 3
    fitted = make_pipeline(StandardScaler(), linear.LogisticRegression(C=1e6, max_iter=2000)).fit(features, labels)
    assert fitted.score(features, labels) == 1
    nearest = NearestNeighbors(n_neighbors=1).fit(features).kneighbors(features)[1][:, 0]
    assert nearest.tolist() == list(range(12))


@BY_NAME
def test_tensorboard_reads_the_losses_that_trainer_logged(name, tmp_path):
    need("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = arguments(tmp_path, report_to=["tensorboard"], logging_steps=1)
    trainer = Trainer(classifier(name), options, train_dataset=labelled_rows())
    trainer.train()
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(logged)
    assert NAMES[0] in events.Tensors("model_config/text_summary")[0].tensor_proto.string_val[0].decode()

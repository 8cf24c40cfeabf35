"""What users reach without naming a class of ours: Auto classes, pipelines, transformers' own Trainer."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import AUTO_MODELS, PROCESSORS, draw_noise, pixels, tiny, tiny_config
from torch.utils.data import Dataset
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    AutoModelForPreTraining,
    Trainer,
    TrainingArguments,
    pipeline,
)

import hf_mae
from hf_mae import MAEConfig, MAEForImageClassification, MAEForPreTraining, MAEImageProcessor, MAEModel

LABELS = {0: "cat", 1: "dog", 2: "owl"}
PROCESSOR_SETTINGS = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A folder as pretraining leaves it: model, config and image processor."""
    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(0)
    tiny(MAEForPreTraining).save_pretrained(folder)
    MAEImageProcessor(**PROCESSOR_SETTINGS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetuned")
    torch.manual_seed(0)
    label2id = {name: number for number, name in LABELS.items()}
    tiny(MAEForImageClassification, id2label=LABELS, label2id=label2id).save_pretrained(folder)
    MAEImageProcessor(**PROCESSOR_SETTINGS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def image():
    values = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_auto_config_makes_our_config(pretrained):
    config = AutoConfig.from_pretrained(pretrained)
    assert type(config) is MAEConfig
    own = MAEConfig.from_pretrained(pretrained)
    assert {**config.to_dict(), "_name_or_path": ""} == {**own.to_dict(), "_name_or_path": ""}
    assert type(AutoConfig.for_model("mae", hidden_size=96)) is MAEConfig


@pytest.mark.parametrize(
    "auto_class",
    [AutoModel, AutoModelForPreTraining, AutoModelForMaskedImageModeling, AutoModelForImageClassification],
    ids=lambda cls: cls.__name__,
)
def test_auto_models_load_our_classes_with_equal_weights(auto_class, pretrained):
    model_class = AUTO_MODELS[auto_class.__name__]
    model, own = auto_class.from_pretrained(pretrained), model_class.from_pretrained(pretrained)
    assert type(model) is model_class
    encoder, own_encoder = getattr(model, "mae", model), getattr(own, "mae", own)
    assert torch.equal(encoder(pixels()).last_hidden_state, own_encoder(pixels()).last_hidden_state)
    assert type(auto_class.from_config(tiny_config())) is model_class


def test_auto_backbone_makes_our_backbone_from_a_config():
    model = AutoBackbone.from_config(tiny_config(out_indices=[1, 4]))
    assert type(model) is AUTO_MODELS["AutoBackbone"]
    assert [tuple(map_.shape) for map_ in model(pixels()).feature_maps] == [(2, 48, 4, 4)] * 2


def test_the_saved_backbone_gives_the_encoders_maps(pretrained):
    backbone = AUTO_MODELS["AutoBackbone"].from_pretrained(pretrained, out_indices=[2])
    expected = MAEModel.from_pretrained(pretrained)(pixels(), output_hidden_states=True).hidden_states[2]
    (feature_map,) = backbone(pixels()).feature_maps
    assert torch.equal(feature_map, expected[:, 1:].transpose(1, 2).unflatten(2, (4, 4)))


def test_auto_image_processor_makes_either_backend_with_the_saved_settings(pretrained, image):
    for backend, processor_class in PROCESSORS.items():
        processor = AutoImageProcessor.from_pretrained(pretrained, backend=backend)
        assert type(processor) is processor_class
        assert processor.size["shortest_edge"] == 36
        values = processor(image, return_tensors="pt")["pixel_values"]
        assert values.shape == (1, 3, 32, 32)
        assert torch.equal(values, processor_class(**PROCESSOR_SETTINGS)(image, return_tensors="pt")["pixel_values"])
    assert type(AutoImageProcessor.from_pretrained(pretrained)) is MAEImageProcessor


def test_registering_again_changes_nothing(pretrained):
    hf_mae.register()
    hf_mae.register()
    assert type(AutoModel.from_pretrained(pretrained)) is MAEModel


def test_the_models_load_whole_under_the_auto_classes_in_bfloat16(pretrained):
    model = AutoModelForPreTraining.from_pretrained(pretrained, dtype=torch.bfloat16)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    assert model.mae.embeddings.position_embeddings.table.dtype == torch.float32
    expected = MAEForPreTraining.from_pretrained(pretrained)(pixels(), noise=draw_noise())
    output = model(pixels(), noise=draw_noise())
    assert torch.equal(output.mask, expected.mask)
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=0.02)


# ---------------------------------------------------------------------------------------------- pipelines


@torch.no_grad()
def test_the_feature_pipeline_gives_the_encoders_tokens_and_the_pooled_vector(pretrained, image):
    inputs = MAEImageProcessor.from_pretrained(pretrained)(image, return_tensors="pt")
    expected = MAEModel.from_pretrained(pretrained)(**inputs)
    extract = pipeline("image-feature-extraction", model=str(pretrained), device="cpu")
    assert type(extract.model) is MAEModel
    torch.testing.assert_close(torch.tensor(extract(image)), expected.last_hidden_state)
    torch.testing.assert_close(torch.tensor(extract(image, pool=True)), expected.pooler_output)
    assert extract(image) == extract(image), "nothing is masked at random"
    batch = extract([image, image.rotate(90)], pool=True, batch_size=2)
    torch.testing.assert_close(torch.tensor(batch[0]), expected.pooler_output)


@torch.no_grad()
def test_the_classification_pipeline_gives_the_names_and_the_classifiers_scores(finetuned, image):
    inputs = MAEImageProcessor.from_pretrained(finetuned)(image, return_tensors="pt")
    scores = MAEForImageClassification.from_pretrained(finetuned)(**inputs).logits.softmax(dim=1)[0]
    classify = pipeline("image-classification", model=str(finetuned), device="cpu")
    answers = classify(image)
    assert [answer["label"] for answer in answers] == [LABELS[int(i)] for i in scores.argsort(descending=True)]
    assert [answer["score"] for answer in answers] == pytest.approx(scores.sort(descending=True).values.tolist())


# ---------------------------------------------------------------------------------------------- Trainer


class TinyImages(Dataset):
    """`count` images; with `classes`, float rows that sum to 1 as mixup makes them."""

    def __init__(self, count: int, classes: int = 0):
        self.images = pixels(count)
        self.rows = torch.rand(count, classes).softmax(dim=1) if classes else None

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        row = {} if self.rows is None else {"labels": self.rows[index].tolist()}
        return {"pixel_values": self.images[index], **row}


def arguments(folder, **overrides) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", **overrides
    )


def test_a_stock_trainer_pretrains_and_evaluates_to_the_same_loss_twice(tmp_path):
    model = tiny(MAEForPreTraining)
    before = model.decoder.decoder_pred.weight.detach().clone()
    trainer = Trainer(
        model,
        arguments(tmp_path, max_steps=2, per_device_train_batch_size=4, per_device_eval_batch_size=4),
        train_dataset=TinyImages(8),
        eval_dataset=TinyImages(6),
    )
    first = trainer.evaluate()["eval_loss"]
    assert first == trainer.evaluate()["eval_loss"]
    images = pixels(6)
    with torch.no_grad():
        by_hand = (4 * model.eval()(images[:4]).loss + 2 * model(images[4:]).loss) / 6
    assert first == pytest.approx(by_hand.item(), rel=1e-5)
    assert trainer.train().global_step == 2
    assert not torch.equal(before, model.decoder.decoder_pred.weight)
    assert trainer.evaluate()["eval_loss"] != first


def one_step(tmp_path, per_device: int, accumulate: int) -> tuple[torch.Tensor, float, float]:
    torch.manual_seed(0)
    model = tiny(MAEForImageClassification, num_labels=3)
    trainer = Trainer(
        model,
        arguments(
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=accumulate,
            optim="sgd",
            max_grad_norm=1e9,
            logging_steps=1,
        ),
        train_dataset=TinyImages(8, classes=3),
    )
    trainer.train()
    log = trainer.state.log_history[0]
    return model.classifier.weight.detach(), log["grad_norm"], log["loss"]


def test_accumulated_steps_weigh_as_one_large_batch_also_with_soft_labels(tmp_path):
    assert MAEForPreTraining.accepts_loss_kwargs is False
    assert MAEForImageClassification.accepts_loss_kwargs is False
    weight, norm, loss = one_step(tmp_path, per_device=8, accumulate=1)
    same_weight, same_norm, same_loss = one_step(tmp_path, per_device=2, accumulate=4)
    assert norm > 0
    assert same_norm == pytest.approx(norm, rel=1e-4)
    assert same_loss == pytest.approx(loss, rel=1e-4)
    torch.testing.assert_close(same_weight, weight, atol=1e-7, rtol=1e-5)

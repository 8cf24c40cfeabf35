"""What transformers' example scripts do with a config, a processor and a model, in the order in which they do it."""

import copy
from functools import partial

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from peers import NAMES, SHAPE, arguments
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import (
    CenterCrop,
    Compose,
    Normalize,
    RandomHorizontalFlip,
    RandomResizedCrop,
    Resize,
    ToTensor,
)
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    AutoModelForObjectDetection,
    AutoModelForPreTraining,
    AutoModelForSemanticSegmentation,
    BitImageProcessor,
    DetrConfig,
    DetrImageProcessor,
    Dinov2Config,
    Dinov2Model,
    Trainer,
    UperNetConfig,
    ViTConfig,
    ViTForMaskedImageModeling,
    ViTImageProcessor,
    ViTMAEForPreTraining,
    default_data_collator,
    get_scheduler,
)
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_IMAGE_MODELING_MAPPING

from hf_mae import MAEConfig, MAEForPreTraining, MAEImageProcessor, register

register()


def overrides(config):
    """The text of the scripts' --config_overrides."""
    return ",".join(f"{key}={value}" for key, value in SHAPE.items() if hasattr(config, key))


PROCESSORS = {
    "mae": MAEImageProcessor,
    "vit": ViTImageProcessor,
    "vit_mae": ViTImageProcessor,
    "dinov2": BitImageProcessor,
}


@pytest.fixture(scope="module")
def rows():
    """Eight photos with names of classes, as `load_dataset` returns them."""
    random = np.random.default_rng(0)
    photos = [Image.fromarray(random.integers(0, 256, (40, 50, 3), dtype=np.uint8)) for _ in range(8)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES.values()))})
    return datasets.Dataset.from_dict({"image": photos, "label": [i % 3 for i in range(8)]}, features)


def crop_size(processor):
    """The size as the scripts read it: one number or (height, width)."""
    size = processor.size
    return size["shortest_edge"] if "shortest_edge" in size else (size["height"], size["width"])


def with_transform(rows, *transforms):
    transform = Compose(transforms)

    def apply(batch):
        batch["pixel_values"] = [transform(image.convert("RGB")) for image in batch["image"]]
        return batch

    return rows.with_transform(apply)


def stack(examples, labels=None):
    batch = {"pixel_values": torch.stack([example["pixel_values"] for example in examples])}
    return batch | ({"labels": torch.tensor([example[labels] for example in examples])} if labels else {})


def assert_trains(trainer, folder):
    """The script's last lines: train, save, resume from the last checkpoint, evaluate, write the card."""
    before = [value.detach().clone() for value in trainer.model.parameters()]
    result = trainer.train()
    assert np.isfinite(result.training_loss)
    moved = [not torch.equal(old, new) for old, new in zip(before, trainer.model.parameters(), strict=True)]
    assert np.mean(moved) > 0.9
    trainer.save_model()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    trainer.create_model_card(tags=["vision"], finetuned_from="elsewhere")
    names = {file.name for file in folder.iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"} <= names


# --------------------------------------------------------------------------------------------- pretraining


@pytest.mark.parametrize("kind", ["mae", "vit_mae"])
def test_run_mae(kind, rows, tmp_path):
    config = CONFIG_MAPPING[kind]()
    config.update_from_string(overrides(config))
    config.update({"mask_ratio": 0.5, "norm_pix_loss": True})
    model_class = {"mae": MAEForPreTraining, "vit_mae": ViTMAEForPreTraining}[kind]
    model = model_class(config)
    assert model.config.mask_ratio == 0.5
    processor = PROCESSORS[kind](size={"height": 32, "width": 32})
    rows = with_transform(
        rows, RandomResizedCrop(crop_size(processor), scale=(0.2, 1.0)), RandomHorizontalFlip(), ToTensor(),
        Normalize(mean=processor.image_mean, std=processor.image_std),
    )  # fmt: skip
    # The script keeps all columns: its transform reads the image.
    options = arguments(tmp_path, remove_unused_columns=False, label_names=["pixel_values"])
    trainer = Trainer(
        model=model,
        args=options,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=processor,
        data_collator=stack,
    )
    assert_trains(trainer, tmp_path)
    assert np.isfinite(trainer.evaluate()["eval_loss"])
    assert AutoModelForPreTraining.from_pretrained(tmp_path).config.norm_pix_loss is True


class SimMIMMasks:
    """Which patches are removed: whole cells of 2 x 2 patches, as the script's generator draws them."""

    def __init__(self, image_size, cell, patch_size, ratio):
        self.side, self.repeat = image_size // cell, cell // patch_size
        self.removed = int(np.ceil(self.side**2 * ratio))

    def __call__(self):
        mask = np.zeros(self.side**2, dtype=int)
        mask[np.random.permutation(self.side**2)[: self.removed]] = 1
        mask = mask.reshape(self.side, self.side)
        return torch.tensor(mask.repeat(self.repeat, axis=0).repeat(self.repeat, axis=1).flatten())


def mim_model(kind, start):
    """Config and model as run_mim.py makes them, from scratch or from the folder `start`."""
    if start is None:
        config = CONFIG_MAPPING[kind]()
        config.update_from_string(overrides(config) + ",encoder_stride=8")
    else:
        config = AutoConfig.from_pretrained(start, cache_dir=None, revision="main", token=None)
    if hasattr(config, "decoder_type"):  # BEiT's
        config.decoder_type = "simmim"
    typed = {"image_size": 32, "patch_size": None, "encoder_stride": None}
    config.update({key: getattr(config, key) if value is None else value for key, value in typed.items()})
    if start is None:
        return AutoModelForMaskedImageModeling.from_config(config, trust_remote_code=False)
    return AutoModelForMaskedImageModeling.from_pretrained(start, config=config, cache_dir=None, revision="main")


@pytest.mark.parametrize("from_scratch", [True, False], ids=["from_scratch", "from_a_folder"])
@pytest.mark.parametrize("kind", ["mae", "vit"])
def test_run_mim(kind, from_scratch, rows, tmp_path):
    assert kind in [config.model_type for config in MODEL_FOR_MASKED_IMAGE_MODELING_MAPPING]
    if not from_scratch:
        saved = {"mae": MAEForPreTraining, "vit": ViTForMaskedImageModeling}[kind]
        saved(CONFIG_MAPPING[kind](**SHAPE, encoder_stride=8)).save_pretrained(tmp_path / "start")
    model = mim_model(kind, None if from_scratch else tmp_path / "start")
    processors = {config.model_type: found for config, found in IMAGE_PROCESSOR_MAPPING.items()}
    processor = next(iter(processors[kind].values()))()
    masks = SimMIMMasks(model.config.image_size, 16, model.config.patch_size, 0.6)
    normalize = Normalize(mean=processor.image_mean, std=processor.image_std)
    transformed = with_transform(rows, RandomResizedCrop(32, scale=(0.67, 1.0)), ToTensor(), normalize)

    def collate(examples):
        return stack(examples) | {"bool_masked_pos": torch.stack([masks() for _ in examples])}

    trainer = Trainer(
        model=model, args=arguments(tmp_path / "run", remove_unused_columns=False), data_collator=collate,
        train_dataset=transformed, processing_class=processor,
    )  # fmt: skip
    assert_trains(trainer, tmp_path / "run")


# ------------------------------------------------------------------------------------------- classification


@pytest.fixture(params=["mae", "dinov2"])
def pretrained(request, tmp_path):
    """A folder with a pretrained encoder for 224 pixels and its class's own default processor."""
    shape = SHAPE | {"image_size": 224, "patch_size": 16}
    kind = request.param
    model = MAEForPreTraining(MAEConfig(**shape)) if kind == "mae" else Dinov2Model(Dinov2Config(**shape))
    model.save_pretrained(tmp_path / "pretrained")
    PROCESSORS[kind]().save_pretrained(tmp_path / "pretrained")
    return tmp_path / "pretrained"


def make_classifier(folder, rows):
    """Config, model and processor as run_image_classification.py makes them: the label maps have texts as numbers."""
    names = rows.features["label"].names
    config = AutoConfig.from_pretrained(
        folder, num_labels=len(names), label2id={name: str(i) for i, name in enumerate(names)},
        id2label={str(i): name for i, name in enumerate(names)}, finetuning_task="image-classification",
        cache_dir=None, revision="main", token=None, trust_remote_code=False,
    )  # fmt: skip
    model = AutoModelForImageClassification.from_pretrained(
        folder, config=config, cache_dir=None, revision="main", token=None, ignore_mismatched_sizes=False
    )
    processor = AutoImageProcessor.from_pretrained(folder, cache_dir=None, revision="main", token=None)
    return model, processor


def training_rows(processor, rows):
    normalize = Normalize(mean=processor.image_mean, std=processor.image_std)
    return with_transform(rows, RandomResizedCrop(crop_size(processor)), RandomHorizontalFlip(), ToTensor(), normalize)


def evaluation_rows(processor, rows):
    normalize, size = Normalize(mean=processor.image_mean, std=processor.image_std), crop_size(processor)
    return with_transform(rows, Resize(size), CenterCrop(size), ToTensor(), normalize)


def test_run_image_classification_also_at_the_processors_256_pixels(pretrained, rows, tmp_path):
    model, processor = make_classifier(pretrained, rows)
    assert crop_size(processor) in (256, 224)

    def accuracy(prediction):
        return {"accuracy": float((np.argmax(prediction.predictions, axis=1) == prediction.label_ids).mean())}

    trainer = Trainer(
        model=model, args=arguments(tmp_path, remove_unused_columns=False), compute_metrics=accuracy,
        train_dataset=training_rows(processor, rows), eval_dataset=evaluation_rows(processor, rows),
        processing_class=processor, data_collator=partial(stack, labels="label"),
    )  # fmt: skip
    assert_trains(trainer, tmp_path)
    assert {"eval_loss", "eval_accuracy"} <= trainer.evaluate().keys()
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert [loaded.config.id2label[i] for i in range(3)] == rows.features["label"].names
    assert {int(value) for value in loaded.config.label2id.values()} == {0, 1, 2}


def test_fixed_batches_at_256_pixels_are_learnt_by_heart(pretrained, rows, tmp_path):
    model, processor = make_classifier(pretrained, rows)
    batch = next(iter(DataLoader(evaluation_rows(processor, rows), 8, collate_fn=partial(stack, labels="label"))))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_loss_at_224_pixels_is_that_of_a_loop_by_hand(pretrained, rows, tmp_path):
    model, processor = make_classifier(pretrained, rows)
    by_hand = copy.deepcopy(model).train()
    normalize = Normalize(mean=processor.image_mean, std=processor.image_std)
    fixed = with_transform(rows, Resize(224), CenterCrop(224), ToTensor(), normalize)
    steps, lr = 8, 1e-3
    trainer = Trainer(
        model=model, train_dataset=fixed, processing_class=processor, data_collator=partial(stack, labels="label"),
        args=arguments(
            tmp_path, max_steps=steps, per_device_train_batch_size=len(rows), learning_rate=lr, logging_steps=1,
            lr_scheduler_type="linear", remove_unused_columns=False,
        ),
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    batch = stack(list(fixed), labels="label")
    optimizer, expected = torch.optim.AdamW(by_hand.parameters(), lr=lr, weight_decay=0), []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        loss = F.cross_entropy(by_hand(pixel_values=batch["pixel_values"]).logits, batch["labels"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, rel=1e-5)
    assert losses[-1] < losses[0]


def decay_groups(model):
    """The script's two groups: it looks for names of a language model."""
    no_decay, groups = ["bias", "LayerNorm.weight"], ([], [])
    for name, parameter in model.named_parameters():
        groups[any(part in name for part in no_decay)].append(parameter)
    return [{"params": group, "weight_decay": decay} for group, decay in zip(groups, (0.05, 0.0), strict=True)]


def test_run_image_classification_no_trainer(pretrained, rows, tmp_path):
    model, processor = make_classifier(pretrained, rows)
    loader = DataLoader(training_rows(processor, rows), 4, shuffle=True, collate_fn=partial(stack, labels="label"))
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.AdamW(decay_groups(model), lr=1e-3)
    schedule = get_scheduler(name="cosine", optimizer=optimizer, num_warmup_steps=0, num_training_steps=4)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    before = model.classifier.weight.detach().clone()
    for _ in range(2):
        model.train()
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
    accelerator.save_state(tmp_path / "state")
    after = model.classifier.weight.detach().clone()
    assert not torch.equal(before, after)
    with torch.no_grad():
        model.classifier.weight.zero_()
    accelerator.load_state(tmp_path / "state")
    assert torch.equal(model.classifier.weight, after)
    model.eval()
    with torch.no_grad():
        logits = model(**batch).logits
    predictions, references = accelerator.gather_for_metrics((logits.argmax(dim=-1), batch["labels"]))
    assert predictions.shape == references.shape == (4,)
    unwrapped = accelerator.unwrap_model(model)
    unwrapped.save_pretrained(
        tmp_path / "out", is_main_process=accelerator.is_main_process, save_function=accelerator.save
    )
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(batch["pixel_values"]).logits, logits)


# ---------------------------------------------------------------------------------------------- dense tasks


@pytest.mark.parametrize("kind", [MAEConfig, Dinov2Config], ids=["mae", "dinov2"])
def test_run_semantic_segmentation_with_upernet_on_the_backbone(kind, tmp_path):
    backbone = kind(**SHAPE, out_indices=[1, 2], reshape_hidden_states=True)
    config = UperNetConfig(
        backbone_config=backbone, hidden_size=8, pool_scales=[1, 2], auxiliary_channels=8, use_auxiliary_head=False,
        id2label=NAMES, label2id={name: str(number) for number, name in NAMES.items()},
    )  # fmt: skip
    model = AutoModelForSemanticSegmentation.from_config(config)
    random = np.random.default_rng(0)
    rows = [
        {
            "pixel_values": torch.tensor(random.normal(size=(3, 32, 32)), dtype=torch.float),
            "labels": torch.tensor(random.integers(0, 3, (32, 32))),
        }
        for _ in range(4)
    ]
    scores = []

    def mean_accuracy(prediction):
        logits, labels = map(torch.as_tensor, prediction)
        logits = torch.nn.functional.interpolate(logits, size=labels.shape[-2:], mode="bilinear").argmax(dim=1)
        scores.append((logits == labels).float().mean().item())
        return {"accuracy": scores[-1]}

    trainer = Trainer(
        model=model, args=arguments(tmp_path, remove_unused_columns=False), train_dataset=rows, eval_dataset=rows,
        compute_metrics=mean_accuracy, processing_class=PROCESSORS[backbone.model_type](),
        data_collator=default_data_collator,
    )  # fmt: skip
    assert_trains(trainer, tmp_path)
    assert trainer.evaluate()["eval_accuracy"] == scores[-1]


def detection_batch(photos, processor):
    """Photos and boxes through the detector's own processor, as the script's transform and collator do it."""
    boxes = [[5.0, 6.0, 20.0, 12.0], [10.0, 2.0, 8.0, 30.0]]
    annotations = [
        {
            "image_id": number,
            "annotations": [
                {"image_id": number, "category_id": i, "iscrowd": 0, "area": box[2] * box[3], "bbox": box}
                for i, box in enumerate(boxes)
            ],
        }
        for number in range(len(photos))
    ]
    encoded = processor(images=photos, annotations=annotations, return_tensors="pt")
    return {key: encoded[key] for key in ("pixel_values", "pixel_mask", "labels")}


@pytest.mark.parametrize("kind", [MAEConfig, Dinov2Config], ids=["mae", "dinov2"])
def test_run_object_detection_with_detr_on_the_backbone(kind, rows, tmp_path):
    sizes = {
        "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "num_queries": 5,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
    }  # fmt: skip
    DetrConfig(backbone_config=kind(**SHAPE, out_indices=[2]), use_timm_backbone=False, **sizes).save_pretrained(
        tmp_path
    )
    DetrImageProcessor().save_pretrained(tmp_path)
    label2id = {name: number for number, name in NAMES.items()}
    config = AutoConfig.from_pretrained(tmp_path, label2id=label2id, id2label=NAMES)
    model = AutoModelForObjectDetection.from_config(config)
    square = {"height": 64, "width": 64}
    processor = AutoImageProcessor.from_pretrained(
        tmp_path, do_resize=True, size={"max_height": 64, "max_width": 64}, do_pad=True, pad_size=square
    )
    options = arguments(tmp_path, remove_unused_columns=False, eval_do_concat_batches=False)
    trainer = Trainer(
        model=model, args=options, train_dataset=rows, eval_dataset=rows, processing_class=processor,
        data_collator=lambda examples: detection_batch([example["image"] for example in examples], processor),
    )  # fmt: skip
    assert_trains(trainer, tmp_path)
    assert np.isfinite(trainer.evaluate(metric_key_prefix="test")["test_loss"])
    with torch.no_grad():
        outputs = model(**detection_batch(rows[:2]["image"], processor))
    found = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[(40, 50)] * 2)
    assert [len(one["boxes"]) for one in found] == [5, 5]


def test_our_processor_refuses_the_sizes_of_detection_with_the_remedy(rows):
    with pytest.raises(ValueError, match=r"size is .'max_height': 64, 'max_width': 64.; pass"):
        MAEImageProcessor(size={"max_height": 64, "max_width": 64})(rows[0]["image"])


@pytest.mark.parametrize("auto", ["SemanticSegmentation", "ObjectDetection"])
@pytest.mark.parametrize("kind", ["mae", "dinov2"])
def test_a_task_without_a_head_is_refused_in_transformers_words(kind, auto, tmp_path):
    CONFIG_MAPPING[kind](**SHAPE).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, label2id={"a": 0}, id2label={0: "a"})
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        getattr(transformers, f"AutoModelFor{auto}").from_config(config)


@pytest.mark.parametrize("kind", ["mae", "dinov2", "vit"])
def test_processors_have_what_the_scripts_read(kind, tmp_path):
    PROCESSORS[kind]().save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path, do_reduce_labels=False)
    assert isinstance(crop_size(processor), int | tuple)
    assert len(processor.image_mean) == len(processor.image_std) == 3
    assert int(processor.resample) in range(6)
    assert processor.rescale_factor == pytest.approx(1 / 255)
    assert AutoImageProcessor.from_pretrained(tmp_path, size={"height": 48, "width": 40}).size["width"] == 40


@pytest.mark.parametrize("config", [MAEConfig(), ViTConfig()], ids=["mae", "vit"])
def test_configs_have_what_the_scripts_read_and_set(config):
    for key in ("image_size", "patch_size", "num_channels", "encoder_stride", "hidden_size"):
        assert getattr(config, key) > 0
    config.update({"image_size": 384, "patch_size": 16, "encoder_stride": 16})
    assert config.image_size == 384
    assert type(config).from_dict(config.to_dict()).to_dict() == config.to_dict()

"""The documentation's Python about fine-tuning, run as it stands there, by a user with a folder of images."""

import ast
import json
import shlex

import pytest
import torch
from pages import block
from PIL import Image
from runs import run, spawn, start
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, AutoModelForPreTraining, pipeline

FINETUNING = "docs/finetuning.md"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with images of two classes, light and dark, and a pretrained model, named as in the documentation."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(tmp_path)
    for name, base in (("dark", 40), ("light", 160)):
        folder = tmp_path / "path" / "to" / "images" / name
        folder.mkdir(parents=True)
        for i in range(40):
            Image.effect_noise((10, 9), 30).point(lambda v, b=base + i: max(0, min(255, v - 128 + b))).save(
                folder / f"{i}.png"
            )
    run("outputs/quickstart", total_steps=2)
    return tmp_path


def execute(word: str, page: str = FINETUNING) -> dict:
    names: dict = {}
    exec(compile(block(word, page), f"{page}, the block with {word}", "exec"), names)
    return names


def test_the_stock_trainer_trains_scores_saves_and_the_pipeline_runs(home):
    statements = ast.parse(block("layer_decay_groups", FINETUNING)).body
    assert len([one for one in statements if not isinstance(one, ast.Import | ast.ImportFrom)]) == 10
    names = execute("layer_decay_groups")
    trainer = names["trainer"]
    scores = [log["eval_top1"] for log in trainer.state.log_history if "eval_top1" in log]
    assert len(scores) == 20
    assert scores[-1] > 0.9
    rates = sorted({group["initial_lr"] for group in trainer.optimizer.param_groups}, reverse=True)
    assert rates == pytest.approx([1e-3 * 0.75**power for power in range(4)])

    folder = home / "outputs" / "classifier"
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert model.config.id2label == {0: "dark", 1: "light"}
    assert torch.equal(model.classifier.weight, trainer.model.classifier.weight.cpu())
    classify = pipeline("image-classification", str(folder))
    assert classify(Image.new("L", (9, 12), 200))[0]["label"] == "light"
    assert classify(Image.new("L", (9, 12), 30))[0]["label"] == "dark"


def test_a_recipe_becomes_a_stock_trainer(home):
    trainer = execute("trainer_parts(recipe)")["trainer"]
    assert trainer.state.global_step == 3  # 10 epochs of 76 images in batches of 256
    assert trainer.args.learning_rate == 1e-3
    saved = json.loads((home / "outputs" / "mixed" / "config.json").read_text())
    assert saved["id2label"] == {"0": "dark", "1": "light"}
    assert AutoModelForImageClassification.from_pretrained(home / "outputs" / "mixed").num_labels == 2


def test_a_spreadsheet_of_findings_trains_and_evaluates_a_model_by_two_commands(home):
    lines = ["image,age,findings"]
    for name in ("dark", "light"):
        for i in range(40):
            findings = [name, *(["late"] if i >= 20 else [])] if i else []  # none for the first
            lines.append(f"{name}/{i}.png,{20 + i},{'; '.join(findings)}")
    (home / "findings.csv").write_text("\n".join(lines))
    commands = block("findings.csv", FINETUNING, "bash").replace("\\\n", "").splitlines()
    assert [command.split()[1] for command in commands] == ["finetune", "evaluate"]
    for command in commands:
        assert start(*shlex.split(command)[1:], "--num_workers", 0) == 0
    model = AutoModelForImageClassification.from_pretrained("outputs/findings")
    assert model.config.id2label == {0: "dark", 1: "late", 2: "light"}
    assert model.config.problem_type == "multi_label_classification"
    tuned, scored = json.loads((home / "outputs" / "findings" / "results.json").read_text())
    assert scored["protocol"]["name"] == "classification"
    assert (
        scored["data"]["eval_images"] == tuned["data"]["eval_images"] == 5
    )  # of the 39 dark and the 39 light ones 2 each, 1 of the 2 without findings
    assert scored["figures"] == pytest.approx({name: tuned["figures"][name] for name in ("map", "auroc")})
    classify = pipeline("image-classification", "outputs/findings", function_to_apply="sigmoid")
    for grey, expected in ((30, "dark"), (220, "light")):
        scores = {found["label"]: found["score"] for found in classify(Image.new("L", (9, 12), grey))}
        assert scores[expected] > 0.5 > scores["dark" if expected == "light" else "light"]


def test_continued_pretraining_is_evaluated_on_fixed_masks(home, capsys):
    before = load_file("outputs/quickstart/model.safetensors")
    names = execute("AutoModelForPreTraining")
    trainer = names["trainer"]
    printed = float(capsys.readouterr().out.strip().splitlines()[-1])
    # Masks don't depend on the random numbers that were drawn since, nor the loss on the number of evaluations.
    torch.manual_seed(123)
    assert trainer.evaluate()["eval_loss"] == printed
    trainer.model.config.eval_mask_seed = 1
    assert trainer.evaluate()["eval_loss"] != printed
    assert torch.isfinite(torch.tensor(printed))
    logged = [log["train_loss"] for log in trainer.state.log_history if "train_loss" in log]
    assert len(logged) == 1
    model = AutoModelForPreTraining.from_pretrained(home / "outputs" / "continued")
    assert not torch.equal(model.state_dict()["decoder.decoder_pred.weight"], before["decoder.decoder_pred.weight"])
    assert (home / "outputs" / "continued" / "preprocessor_config.json").exists()


def test_lora_trains_on_the_documented_layers_alone(home):
    pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    model = execute("LoraConfig")["model"]
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    adapted = {name.split(".lora_")[0].rsplit(".", 1)[1] for name in trained if ".lora_" in name}
    assert adapted == {"qkv", "proj", "fc1", "fc2"}
    assert all("layers." in name for name in trained if ".lora_" in name)
    assert {name.split(".")[2] for name in trained if ".lora_" not in name} == {"classifier", "fc_norm"}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(pixel_values=torch.randn(4, 1, 8, 8), labels=torch.tensor([0, 1, 2, 3])).loss.backward()
    optimizer.step()
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    assert frozen


def test_a_dense_model_gets_the_pretrained_encoder_and_a_pyramid(home):
    model = execute("UperNetForSemanticSegmentation", "docs/dense_prediction.md")["model"].eval()
    own, stored = model.backbone.state_dict(), load_file("outputs/quickstart/model.safetensors")
    layers = [name for name in own if name.startswith("layers.")]
    assert len(layers) == 24
    assert all(torch.equal(own[name], stored[f"mae.{name}"]) for name in layers)
    assert [map_.shape[-1] for map_ in model.backbone(torch.randn(1, 1, 32, 32)).feature_maps] == [64, 32, 16, 8]
    with torch.no_grad():
        assert model(pixel_values=torch.randn(1, 1, 8, 12)).logits.shape == (1, 150, 8, 12)


@pytest.mark.slow
def test_a_script_of_the_page_runs_in_a_process_of_its_own(home):
    script = home / "script.py"
    script.write_text(block("layer_decay_groups", FINETUNING))
    log = home / "log.txt"
    status = spawn([script], log, HF_HOME=str(home / "hf"), HF_HUB_OFFLINE="1", ACCELERATE_USE_CPU="true").wait(300)
    assert status == 0, log.read_text()
    assert (home / "outputs" / "classifier" / "model.safetensors").exists()

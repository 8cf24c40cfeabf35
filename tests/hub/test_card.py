"""A card says what a model's folder records, and nothing else."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
import yaml
from hub_server import HubServer
from huggingface_hub import ModelCard, repocard
from PIL import Image
from runs import REPOSITORY, load_finetune_recipe, load_pretrain_recipe, mistake, run, start, tree, weights_hash
from tiny import tiny

from hf_mae import MAEForImageClassification, MAEForPreTraining, MAEImageProcessor
from hf_mae.hub.card import Card, licence_of
from hf_mae.run_folder import RunFolder

RECIPE = {
    "recipe": "quickstart", "dataset": "/home/me/pictures", "dataset_revision": None, "split": "train", "model": None,
    "total_batch_size": 64, "total_steps": 30, "blr": 1e-3, "crop_scale": [0.7, 1.0], "output_dir": "/home/me/out",
    "resume": "auto", "log_with": None, "dry_run": False, "hidden_size": 48, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8, "seed": 7,
}  # fmt: skip
DERIVED = {
    "version": "0.1.0", "processes": 2, "strategy": "DDP", "mixed_precision": "bf16", "lr": 2.5e-4, "total_steps": 30,
    "training_images": 12345, "evaluation_images": 92, "evaluated_on": "split test of /home/me/pictures",
    "parameters": 54321, "hardware": "2 x NVIDIA H100 80GB HBM3", "torch": "2.14.1",
}  # fmt: skip
EVENTS = [
    {"step": 0, "eval_loss": 1.25}, {"step": 10, "loss": 0.9, "images_per_second": 100.0},
    {"step": 20, "loss": 0.8, "images_per_second": 900.0}, {"step": 30, "loss": 0.7, "images_per_second": 300.0},
    {"step": 30, "eval_loss": 0.625},
]  # fmt: skip


def entry(sha256, name="knn", **figures):
    return {
        "protocol": {"name": name, "k": [10, 20], "temperature": 0.07, "source": None},
        "data": {"dataset": "user/data", "config": None, "revision": "abc", "split": "train", "train_images": 1705,
                 "evaluated_on": "split test", "eval_images": 920, "classes": 10},
        "checkpoint": {"path": "/home/me/out", "sha256": sha256},
        "figures": figures or {"knn_top1_k10": 51.0869},
        "versions": {},
    }  # fmt: skip


def make_folder(folder, model_class=MAEForPreTraining, **config):
    tiny(model_class, **config).save_pretrained(folder)
    MAEImageProcessor().save_pretrained(folder)
    return folder


@pytest.fixture
def bare(tmp_path):
    """A model's folder that records nothing more."""
    return make_folder(tmp_path / "bare")


@pytest.fixture
def full(tmp_path):
    folder = make_folder(tmp_path / "full")
    (folder / "run_config.yaml").write_text(yaml.safe_dump({"recipe": RECIPE, "derived": DERIVED}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in EVENTS))
    sha256 = weights_hash(folder)
    other = {**entry("0" * 64, knn_top1_k10=99.0), "ranges": {}}
    probe = {**entry(sha256, "linear_probe_fast", linear_top1=93.478, linear_penalty=1e-4)}
    knn = {**entry(sha256), "intervals": {"knn_top1_k10": [48.0, 54.25]}}
    probe["ranges"] = {"linear_top1": [92.0, 94.5], "linear_penalty": [1e-4, 1e-4]}
    (folder / "results.json").write_text(json.dumps([knn, other, probe]))
    for step in (5, 30):
        (folder / "reconstructions").mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / "reconstructions" / f"step-{step}.png")
    return folder


@pytest.fixture
def server(tmp_path, monkeypatch):
    with HubServer(tmp_path) as found:
        # Not by the endpoint: huggingface_hub 1.x validates a card at the Hub's own address, whatever the endpoint is.
        session = repocard.get_session()
        here = SimpleNamespace(post=lambda url, **given: session.post(found.url + urlsplit(url).path, **given))
        monkeypatch.setattr(repocard, "get_session", lambda: here)
        yield found


def section(text, title):
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def test_a_card_has_the_figures_of_the_run_with_their_protocol(full):
    text = Card(full, "user/name").text()
    training, results = section(text, "Training"), section(text, "Results")
    for row in (
        "| training images | 12,345 |", "| images per step | 64 |", "| steps | 30 |",
        "| peak learning rate | 0.00025 |",
        "| processes | 2 (DDP) |", "| precision | bf16 |", "| throughput | 300 images per second (median) |",
        "| data | pictures (local), split train |", "| started from | random weights |",
    ):  # fmt: skip
        assert row in training
    assert "54,321 parameters" in text
    assert "| knn_top1_k10 | 51.09 % | 48.00 to 54.25 | 920 |" in results
    assert "| linear_top1 | 93.48 % | 92.00 to 94.50 | 920 |" in results
    assert "| linear_penalty | 0.0001 | 0.0001 to 0.0001 | 920 |" in results
    assert "Protocol: k 10 20, temperature 0.07." in results
    assert "using 1,705 labelled images, evaluated on 920 images (split test), 10 classes" in results
    assert "0.6250 after step 30 (1.2500 before step 1)" in results
    assert "step-30.png)" in section(text, "Reconstructions")


def test_figures_of_other_weights_are_left_out(full):
    assert "99.0" not in Card(full).text()


def test_a_card_says_what_the_run_says_that_it_was_trained_on(full):
    training = section(Card(full).text(), "Training")
    assert "| hardware | 2 x NVIDIA H100 80GB HBM3 |" in training
    assert "| torch | 2.14.1 |" in training


def test_the_command_writes_the_card_and_its_picture_and_nothing_else(full, tmp_path, capsys):
    before = tree(full)
    assert start("card", full, tmp_path / "cards" / "digits_tiny.md") == 0
    said = capsys.readouterr().out
    assert said == f"card     {tmp_path}/cards/digits_tiny.md\npicture  {tmp_path}/cards/digits_tiny.png\n"
    text = (tmp_path / "cards" / "digits_tiny.md").read_text()
    expected = Card(full)
    (shown,) = re.findall(r"!\[.*\]\((.*)\)", text)
    assert shown == "digits_tiny.png"
    assert (tmp_path / "cards" / shown).read_bytes() == Path(expected.picture).read_bytes()
    expected.name, expected.picture = "digits_tiny", "digits_tiny.png"
    assert text == expected.text()
    assert str(tmp_path) not in text
    assert sorted(path.name for path in (tmp_path / "cards").iterdir()) == ["digits_tiny.md", "digits_tiny.png"]
    assert tree(full) == before


def test_a_folder_that_is_no_model_has_no_card(tmp_path, capsys):
    assert start("card", tmp_path, tmp_path / "x.md") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"hf-mae: error: {tmp_path} is not a complete model folder (")
    assert start("card", tmp_path, "x.md", "--outptu", "y.md") == 2
    assert "unknown argument '--outptu'; did you mean '--output'?" in capsys.readouterr().err


def test_the_cards_of_this_repository_name_no_path_and_show_pictures_that_are_there():
    cards = sorted((REPOSITORY / "model_cards").glob("*.md"))
    assert cards
    for card in cards:
        text = card.read_text()
        assert re.findall(r"(?<![\w:/.])/(?:work|tmp|home|root|mnt|data)\b", text) == []
        for picture in re.findall(r"!\[.*\]\((.*)\)", text):
            assert (card.parent / picture).is_file()


def test_what_was_not_measured_is_absent(bare):
    text = Card(bare).text()
    for title in ("Training", "Results", "Reconstructions"):
        assert f"## {title}" not in text
    for word in ("None", "throughput", "hardware", "parameters", "accuracy", "%)", "hf-mae pretrain", "torch |"):
        assert word not in text
    assert "No evaluation of these weights is recorded" in section(text, "Limits")
    assert "licence of these weights is not recorded" in section(text, "Licence")
    assert "license" not in ModelCard(text).data.to_dict()


def test_the_reproduction_command_is_the_recorded_run(full, tmp_path):
    text = Card(full, "user/name").text()
    recipe = re.search(r"```yaml\n(.*?)```", section(text, "Training"), re.DOTALL)
    command = re.search(r"hf-mae pretrain (.*)\n", section(text, "Training"))
    assert command[1] == "--recipe recipe.yaml --output_dir outputs/name"
    (tmp_path / "recipe.yaml").write_text(recipe[1])
    run = load_pretrain_recipe(["--recipe", str(tmp_path / "recipe.yaml")]).to_dict()
    changed = {"recipe": str(tmp_path / "recipe.yaml"), "output_dir": "outputs/recipe", "dataset": "path/to/pictures"}
    for key, value in {**RECIPE, "resume": "none", **changed}.items():
        assert run[key] == value, key


@pytest.mark.parametrize(
    ("dataset", "recorded", "shown", "repeated", "metadata"),
    [
        ("my/images", True, "images (local)", "path/to/images", None),
        ("my/images", False, "my/images", "my/images", ["my/images"]),
        ("./images", False, "images (local)", "path/to/images", None),
        ("a/b/images", False, "images (local)", "path/to/images", None),
        ("shards-{000..003}.tar", False, "shards-{000..003}.tar (local)", "path/to/shards-{000..003}.tar", None),
        ("hf://datasets/my/images", False, "hf://datasets/my/images", "hf://datasets/my/images", None),
        ("digits", True, "digits", "digits", None),
    ],
)
def test_a_local_folder_is_not_taken_for_a_data_set_on_the_hub(full, dataset, recorded, shown, repeated, metadata):
    derived = {**DERIVED, "evaluated_on": f"split test of {dataset}", "local_keys": ["dataset"] if recorded else []}
    settings = {"recipe": {**RECIPE, "dataset": dataset}, "derived": derived}
    (full / "run_config.yaml").write_text(yaml.safe_dump(settings))
    result = entry(weights_hash(full))
    result["data"] |= {"dataset": dataset, "evaluated_on": f"split test of {dataset}"}
    (full / "results.json").write_text(json.dumps([result]))
    card = Card(full)
    text, head = card.text(), ModelCard(card.text()).data
    assert f"| data | {shown}, split train |" in text
    assert f"| evaluated on | split test of {shown} |" in text
    assert f"**knn** on {shown}: " in text
    assert yaml.safe_load(card.recipe_yaml())["dataset"] == repeated
    assert ("replace each `path/to`" in text) == (shown != dataset)
    assert head.datasets == metadata
    (figure,) = head.eval_results
    assert figure.dataset_name == f"{shown}, split test of {shown}"
    assert figure.dataset_type == (dataset if metadata else figure.dataset_type)
    assert ("/" in figure.dataset_type) == bool(metadata)


def test_a_run_records_which_of_its_keys_are_paths(tmp_path):
    folder = RunFolder(run(tmp_path / "first"))
    assert "local_keys" not in folder.config()[1]
    again = RunFolder(run(tmp_path / "second", model=folder.path))
    assert again.config()[1]["local_keys"] == ["model"]
    assert "| started from | first (local) |" in Card(again.path).text()


def test_figures_on_few_images_are_in_the_text_alone(full):
    few = entry(weights_hash(full), knn_top1_k10=100.0)
    few["data"] |= {"eval_images": 99}
    (full / "results.json").write_text(json.dumps([few]))
    text = Card(full).text()
    assert "| knn_top1_k10 | 100.00 % |  | 99 |" in text
    assert ModelCard(text).data.eval_results is None
    few["data"] |= {"eval_images": 100}
    (full / "results.json").write_text(json.dumps([few]))
    assert [result.metric_value for result in ModelCard(Card(full).text()).data.eval_results] == [100.0]


def test_a_checkpoints_card_is_the_runs_up_to_its_step(full):
    checkpoint = shutil.copytree(full, full / "checkpoint-10", ignore=lambda *_: ["reconstructions", "results.json"])
    for name in ("run_config.yaml", "metrics.jsonl"):
        (checkpoint / name).unlink()
    text = Card(checkpoint, "user/name").text()
    assert "| these weights | after step 10, before the end of the run |" in text
    assert "| throughput | 100 images per second (median) |" in text
    assert "1.2500 after step 0" in text
    assert "0.6250" not in text
    assert "Reconstructions" not in text  # there is none of step 10
    assert licence_of(checkpoint) == "apache-2.0"
    last = checkpoint.rename(full / "checkpoint-30")
    assert "| these weights" not in Card(last).text()


def test_no_path_of_the_machine_is_in_a_card(full):
    card = Card(full, "user/name")
    card.picture = "reconstruction.png"
    assert "/home" not in card.text()
    assert str(full) not in card.text()


def test_the_card_of_a_classifier_is_about_classes_and_its_own_command(tmp_path):
    folder = make_folder(tmp_path / "model", MAEForImageClassification, num_labels=3)
    recipe = {"model": "user/base", "dataset": "user/data", "layer_decay": 0.75, "epochs": 10.0}
    (folder / "run_config.yaml").write_text(yaml.safe_dump({"recipe": recipe, "derived": {}}))
    (folder / "results.json").write_text(json.dumps([entry(weights_hash(folder), "fine-tuning", top1=90.0)]))
    card = Card(folder)
    text, head = card.text(), ModelCard(card.text()).data
    assert head.pipeline_tag == "image-classification"
    assert (head.base_model, head.datasets) == ("user/base", ["user/data"])
    assert "AutoModelForImageClassification" in text
    assert "| top1 | 90.00 % |" in section(text, "Results")
    assert "hf-mae finetune --recipe recipe.yaml" in text
    (tmp_path / "recipe.yaml").write_text(card.recipe_yaml())
    assert load_finetune_recipe(["--recipe", str(tmp_path / "recipe.yaml")]).layer_decay == 0.75


def test_a_pinned_revision_is_in_every_line_that_loads(full):
    card = Card(full, "user/name")
    assert "revision=" not in card.text()
    card.revision = "0123abc"
    loading = section(card.text(), "How to load it")
    lines = [line for line in loading.splitlines() if ".from_pretrained(" in line]
    assert len(lines) == 4
    assert all('"user/name", revision="0123abc"' in line for line in lines)
    assert [line.endswith("trust_remote_code=True)") for line in lines] == [False, False, True, True]
    for code in re.findall(r"```python\n(.*?)```", loading, re.DOTALL):
        compile(code, "card", "exec")


# ------------------------------------------------------------------------------------------ licences


def test_models_that_were_trained_from_each_other_have_no_licence(full, bare, caplog):
    for folder, start_from in ((full, bare), (bare, full), (full, full)):
        (folder / "run_config.yaml").write_text(yaml.safe_dump({"recipe": {**RECIPE, "model": str(start_from)}}))
        assert licence_of(folder) is None
        assert "licence of these weights is not recorded" in section(Card(folder).text(), "Licence")
    assert caplog.messages == []


def test_a_configuration_that_is_no_model_of_ours_is_one_line(full, tmp_path, capsys):
    (full / "config.json").write_text("{}")
    assert "is not a complete model folder" in mistake(capsys, "card", full, tmp_path / "card.md")


def test_weights_keep_the_licence_of_what_they_come_from(full, bare, tmp_path):
    assert licence_of(full) == "apache-2.0"
    assert licence_of(bare) is None
    converted = shutil.copytree(bare, tmp_path / "converted")
    for said, licence in (
        ("CC-BY-NC 4.0", "cc-by-nc-4.0"), ("cc-by-nc-4.0", "cc-by-nc-4.0"), ("Apache-2.0", "apache-2.0"), (None, None),
    ):  # fmt: skip
        (converted / "conversion.json").write_text(json.dumps({"licence": said, "source": "/home/me/mae.pth"}))
        assert licence_of(converted) == licence
    tuned = shutil.copytree(full, tmp_path / "tuned")
    for base, licence in ((full, "apache-2.0"), (converted, None), ("user/base", None), (bare, None)):
        recipe = {**RECIPE, "model": str(base)}
        (tuned / "run_config.yaml").write_text(yaml.safe_dump({"recipe": recipe, "derived": DERIVED}))
        assert licence_of(tuned) == licence, base
    (converted / "conversion.json").write_text(json.dumps({"licence": "cc-by-nc-4.0", "licence_note": "No trade."}))
    (tuned / "run_config.yaml").write_text(yaml.safe_dump({"recipe": {**RECIPE, "model": str(converted)}}))
    assert licence_of(tuned) == "cc-by-nc-4.0"
    for folder in (converted, tuned):
        text = Card(folder).text()
        assert ModelCard(text).data.license == "cc-by-nc-4.0"
        assert "CC BY-NC 4.0" in section(text, "Licence")
    assert "No trade." in section(Card(converted).text(), "Licence")
    assert "from mae.pth" not in Card(converted).text()


@pytest.mark.parametrize("content", ["", "[1]", '{"licence": "cc-b'])
def test_weights_whose_record_of_conversion_is_broken_get_no_other_licence(full, content):
    (full / "conversion.json").write_text(content)
    assert licence_of(full) is None
    assert "licence of these weights is not recorded" in section(Card(full).text(), "Licence")


# ------------------------------------------------------------------------------------------ the Hub's rules


def test_the_metadata_passes_the_hubs_validation_and_comes_back_from_it(full, bare, server):
    for folder in (full, bare):
        ModelCard(Card(folder, "user/name").text()).validate()
    assert [request.path for request in server.requests] == ["/api/validate-yaml"] * 2
    head = ModelCard(Card(full, "user/name").text()).data
    assert head.library_name == "transformers"
    assert head.license == "apache-2.0"
    assert head.pipeline_tag == "image-feature-extraction"
    assert "arxiv:2111.06377" in head.tags
    assert [(result.metric_value, result.dataset_type, result.dataset_revision) for result in head.eval_results] == [
        (51.09, "user/data", "abc"),
        (93.48, "user/data", "abc"),
    ]


def test_an_unusual_licence_passes_the_validation_too(bare, server):
    (bare / "conversion.json").write_text(json.dumps({"licence": "My Own Licence v2"}))
    text = Card(bare).text()
    ModelCard(text).validate()
    assert ModelCard(text).data.license == "other"


def test_the_hub_of_these_tests_refuses_what_the_hub_refuses(server):
    for head in ("license: nothing-known", "tags: [1]", "license: other", "datasets: [/home/me/data]"):
        with pytest.raises(ValueError, match=r"license|tags|datasets"):
            ModelCard(f"---\n{head}\n---\n\ntext\n").validate()

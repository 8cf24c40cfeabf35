"""Publishing over HTTP to a Hub of our own, and what someone without the package loads from there."""

import ast
import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from hub_server import HubServer
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from runs import REPOSITORY, run, start, tree
from safetensors.torch import load_file
from stranger import outputs
from tiny import AUTO_MODELS, PROCESSORS, pixels, tiny, tiny_config

import hf_mae
from hf_mae import MAEConfig, MAEForImageClassification, MAEForPreTraining, MAEImageProcessor, MAEModel
from hf_mae.conversion.compare import compare
from hf_mae.hub import check
from hf_mae.hub import push as hub

TOKEN = "hf_canaryCANARYcanaryCANARYcanaryCANAR"
MODEL_CODE = {
    "auto_models_mae.py", "backbone_mae.py", "classifier_mae.py", "configuration_mae.py", "hub_code_mae.py",
    "layers_mae.py", "masking_mae.py", "modeling_mae.py",
}  # fmt: skip
PROCESSOR_CODE = {
    "auto_image_processors_mae.py", "hub_code_mae.py", "image_processing_base_mae.py", "image_processing_mae.py",
    "image_processing_pil_mae.py",
}  # fmt: skip
CODE = MODEL_CODE | PROCESSOR_CODE
FILES = CODE | {
    "README.md", "config.json", "model.safetensors", "preprocessor_config.json", "recipe.yaml", "reconstruction.png",
}  # fmt: skip
AUTO_MAP = {
    "AutoConfig": "auto_models_mae.MAEConfig",
    "AutoModel": "auto_models_mae.MAEModel",
    "AutoModelForPreTraining": "auto_models_mae.MAEForPreTraining",
    "AutoModelForMaskedImageModeling": "auto_models_mae.MAEForPreTraining",
    "AutoModelForImageClassification": "auto_models_mae.MAEForImageClassification",
    "AutoBackbone": "auto_models_mae.MAEBackbone",
}
PROCESSOR_MAP = {
    "AutoImageProcessor": {
        "torchvision": "auto_image_processors_mae.MAEImageProcessor",
        "pil": "auto_image_processors_mae.MAEImageProcessorPil",
    }
}


def auto_map(folder, name="config.json"):
    return json.loads((folder / name).read_text()).get("auto_map")


# ------------------------------------------------------------------------------------------ saving with code


@pytest.mark.parametrize("model_class", list(dict.fromkeys(AUTO_MODELS.values())))
def test_a_model_saved_with_code_names_a_class_for_every_auto_class(tmp_path, model_class):
    model = tiny(model_class)
    model.save_pretrained(tmp_path / "with", with_code=True)
    assert auto_map(tmp_path / "with") == AUTO_MAP
    assert {path.name for path in (tmp_path / "with").glob("*.py")} == MODEL_CODE
    for path in (tmp_path / "with").glob("*.py"):
        assert path.read_bytes() == (REPOSITORY / "hf_mae" / path.name).read_bytes()
    model.save_pretrained(tmp_path / "without")
    assert auto_map(tmp_path / "without") is None
    assert not list((tmp_path / "without").glob("*.py"))


def test_a_folder_saved_without_code_names_none_even_if_the_model_came_with_code(tmp_path):
    tiny(MAEModel).save_pretrained(tmp_path / "with", with_code=True)
    model = MAEModel.from_pretrained(tmp_path / "with")
    model.save_pretrained(tmp_path / "without")
    assert auto_map(tmp_path / "without") is None


@pytest.mark.parametrize("processor_class", list(PROCESSORS.values()))
def test_an_image_processor_saved_with_code_names_both_backends(tmp_path, processor_class):
    processor = processor_class(num_channels=1)
    processor.save_pretrained(tmp_path / "with", with_code=True)
    assert auto_map(tmp_path / "with", "preprocessor_config.json") == PROCESSOR_MAP
    assert {path.name for path in (tmp_path / "with").glob("*.py")} == PROCESSOR_CODE
    processor.save_pretrained(tmp_path / "without")
    again = processor_class.from_pretrained(tmp_path / "with")
    again.save_pretrained(tmp_path / "again")
    settings = (tmp_path / "without" / "preprocessor_config.json").read_text()
    assert "auto" not in settings
    assert (tmp_path / "again" / "preprocessor_config.json").read_text() == settings
    assert not list(tmp_path.glob("*out/*.py"))


def test_a_configuration_saved_alone_brings_the_code_of_all_models_or_speaks_of_none(tmp_path):
    config = tiny_config()
    config.save_pretrained(tmp_path / "with", with_code=True)
    assert auto_map(tmp_path / "with") == AUTO_MAP
    assert {path.name for path in (tmp_path / "with").glob("*.py")} == MODEL_CODE
    MAEConfig.from_pretrained(tmp_path / "with").save_pretrained(tmp_path / "without")
    assert auto_map(tmp_path / "without") is None
    assert not list((tmp_path / "without").glob("*.py"))


def test_a_class_derived_from_ours_is_named_beside_the_others(tmp_path, monkeypatch):
    (tmp_path / "derived.py").write_text(
        "from hf_mae import MAEForPreTraining\nclass Mine(MAEForPreTraining):\n    pass\n"
        "Mine.register_for_auto_class('AutoModelForPreTraining')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    from derived import Mine

    tiny(Mine).save_pretrained(tmp_path / "saved")
    assert auto_map(tmp_path / "saved") == AUTO_MAP | {"AutoModelForPreTraining": "derived.Mine"}
    assert {path.name for path in (tmp_path / "saved").glob("*.py")} == MODEL_CODE | {"derived.py"}


def test_classes_registered_by_hand_are_saved_with_all_of_their_code(tmp_path, monkeypatch):
    for cls in (MAEForImageClassification, MAEImageProcessor):
        monkeypatch.setattr(cls, "_auto_class", None)  # to be put back
    # Under another class's name, which transformers takes by default.
    MAEForImageClassification.register_for_auto_class()
    MAEImageProcessor.register_for_auto_class()
    model, processor = tiny(MAEForImageClassification), MAEImageProcessor()
    for _ in range(2):
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
    assert auto_map(tmp_path) == AUTO_MAP
    assert auto_map(tmp_path, "preprocessor_config.json") == PROCESSOR_MAP
    assert {path.name for path in tmp_path.glob("*.py")} == CODE
    assert {path.name for path in (REPOSITORY / "hf_mae").glob("*_mae.py")} == CODE


def test_the_code_files_import_each_other_and_only_common_packages():
    packages = {"huggingface_hub", "numpy", "PIL", "torch", "torchvision", "transformers", *sys.stdlib_module_names}
    for name in CODE:
        for node in ast.walk(ast.parse((REPOSITORY / "hf_mae" / name).read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1, f"{name} imports from a package above it"
                assert f"{node.module}.py" in CODE, f"{name} imports .{node.module}"
            elif isinstance(node, ast.ImportFrom):
                assert str(node.module).split(".")[0] in packages, f"{name} imports {node.module}"
            elif isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= packages, name


# ------------------------------------------------------------------------------------------ pushing


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run, with a README of its owner's."""
    folder = run(tmp_path_factory.mktemp("finished") / "run", total_steps=2, save_steps=2, eval_steps=1)
    (folder / "README.md").write_text("notes of mine\n")
    return folder


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A Hub that this process and those that it starts use, with a token that may write."""
    (tmp_path / "hub").mkdir()
    with HubServer(tmp_path / "hub") as found:
        found.token = TOKEN
        for name, value in {**found.env, "HF_TOKEN": TOKEN}.items():
            monkeypatch.setenv(name, value)
        # What the environment would have told this process, had it just been started.
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", found.url)
        files = f"{found.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        # Clients that were made for the server of an earlier test.
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", found.url)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
        yield found


@pytest.fixture
def trusting(monkeypatch):
    """Without the process that loads what was pushed."""
    monkeypatch.setattr(hub, "_pull_back", lambda *_: 0.0)


def repository(server, name="user/x"):
    folder = server.root / "models" / name
    return {path.name for path in folder.iterdir()} if folder.is_dir() else None


def test_a_push_uploads_everything_in_one_commit_and_leaves_the_folder_as_it_is(server, trusting, finished, capsys):
    before = tree(finished)
    assert start("push", finished, "--repo_id", "user/x", "--private", "true") == 0
    assert "published" in capsys.readouterr().out
    assert repository(server) == FILES
    assert server.private == {"user/x"}
    assert tree(finished) == before
    commits = [request for request in server.requests if "/commit/" in request.path]
    assert len(commits) == 2  # the second is the card alone, with the first one's name
    states = sorted((server.root / "models" / "user" / "x.rev").iterdir(), key=lambda path: len(list(path.iterdir())))
    assert [len(list(path.iterdir())) for path in states] == [0, len(FILES)]
    card = (server.root / "models" / "user" / "x" / "README.md").read_text()
    assert f'revision="{states[1].name}"' in card
    assert "notes of mine" not in card
    for path in server.root.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes()


@pytest.mark.parametrize("processor_class", list(PROCESSORS.values()))
def test_saving_with_push_to_hub_uploads_the_code_too(server, tmp_path, processor_class):
    tiny(MAEForImageClassification).save_pretrained(str(tmp_path / "model"), push_to_hub=True, repo_id="user/x")
    assert repository(server) == MODEL_CODE | {"config.json", "model.safetensors", "README.md"}
    processor_class().save_pretrained(str(tmp_path / "processor"), push_to_hub=True, repo_id="user/y")
    assert repository(server, "user/y") == PROCESSOR_CODE | {"preprocessor_config.json"}


def test_a_push_to_a_branch_leaves_main_alone(server, trusting, finished):
    assert start("push", finished, "--repo_id", "user/x", "--revision", "v2") == 0
    assert repository(server) == set()
    assert repository(server, "user/x.rev/v2") == FILES


def test_a_second_push_replaces_the_first_and_removes_what_the_model_no_longer_has(
    server, trusting, finished, tmp_path
):
    server.lfs = (".safetensors",)
    assert start("push", finished, "--repo_id", "user/x") == 0
    folder = server.root / "models" / "user" / "x"
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"of an earlier model")
    shutil.copytree(finished, tmp_path / "other", ignore=shutil.ignore_patterns("reconstructions"))
    assert start("push", tmp_path / "other", "--repo_id", "user/x") == 0
    assert repository(server) == FILES - {"reconstruction.png"}
    assert len([request for request in server.requests if request.method == "PUT"]) == 1


def refused(capfd, *words) -> str:
    """The one line that a command ends with when it is refused."""
    assert start("push", *words) == 2
    said = capfd.readouterr()
    assert "published" not in said.out
    assert TOKEN not in said.out + said.err
    lines = [line for line in said.err.splitlines() if line.startswith("hf-mae: error: ")]
    assert len(lines) == 1
    assert "Traceback" not in said.err
    return lines[0]


def test_a_wrong_token_a_strangers_name_and_a_bad_name_are_one_line_each(server, finished, capfd, monkeypatch):
    assert "the Hub answered 403" in refused(capfd, finished, "--repo_id", "somebody/x")
    assert "write USER/NAME" in refused(capfd, finished, "--repo_id", "a/b/c")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "no valid token" in refused(capfd, finished, "--repo_id", "user/x")
    assert repository(server) is None


def test_a_name_that_something_else_has_is_refused(server, finished, capfd):
    other = server.root / "models" / "user" / "x"
    other.mkdir(parents=True)
    (other / "config.json").write_text('{"model_type": "bert"}')
    assert "already holds something else (config.json)" in refused(capfd, finished, "--repo_id", "user/x")
    assert repository(server) == {"config.json"}


def test_private_is_not_given_up_for_a_repository_that_is_public_already(server, trusting, finished, capfd):
    assert start("push", finished, "--repo_id", "user/x") == 0
    capfd.readouterr()
    assert "already exists and is public" in refused(capfd, finished, "--repo_id", "user/x", "--private", "true")


def test_a_repository_deleted_meanwhile_is_one_line(server, finished, capfd, monkeypatch):
    opened = hub._open_repository

    def open_and_delete(*args):
        opened(*args)
        shutil.rmtree(server.root / "models" / "user" / "x")

    monkeypatch.setattr(hub, "_open_repository", open_and_delete)
    assert "the Hub answered 404" in refused(capfd, finished, "--repo_id", "user/x")


@pytest.mark.parametrize("where", ["POST .*/preupload/main", "POST .*/commit/main", "POST .*/repos/create"])
def test_a_hub_that_dies_in_the_middle_has_nothing_and_the_push_can_be_repeated(
    server, trusting, finished, capfd, where, monkeypatch
):
    monkeypatch.setattr("time.sleep", lambda _: None)  # of the client, between its tries
    server.lfs = (".safetensors",)
    before = tree(finished)
    server.break_at = (where, 100)
    assert "push again" in refused(capfd, finished, "--repo_id", "user/x")
    assert not repository(server)
    assert tree(finished) == before
    uploads = len([request for request in server.requests if request.method == "PUT"])
    server.break_at = None
    assert start("push", finished, "--repo_id", "user/x") == 0
    assert repository(server) == FILES
    # Weights that had arrived are not sent again.
    assert len([request for request in server.requests if request.method == "PUT"]) == 1
    assert uploads == (1 if "commit" in where else 0)


def test_a_hub_that_is_not_there_is_one_line(server, finished, capfd, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    assert "can't be reached" in refused(capfd, finished, "--repo_id", "user/x")


@pytest.mark.parametrize(
    "harm", ["absent", "no weights", "a missing tensor", "no processor", "another model", "pickle"]
)
def test_a_folder_that_is_no_whole_model_is_refused_before_anything_is_sent(server, finished, tmp_path, capfd, harm):
    folder = tmp_path / "model"
    if harm != "absent":
        shutil.copytree(finished, folder)
    if harm in ("no weights", "pickle"):
        (folder / "model.safetensors").unlink()
    if harm == "pickle":
        torch.save({}, folder / "pytorch_model.bin")
    if harm == "results":
        (folder / "results.json").write_text('{"knn": 99}')
    if harm == "no processor":
        (folder / "preprocessor_config.json").unlink()
    if harm in ("another model", "a missing tensor"):
        config = json.loads((folder / "config.json").read_text())
        architecture = "ViTModel" if harm == "another model" else "MAEForImageClassification"
        (folder / "config.json").write_text(json.dumps({**config, "architectures": [architecture]}))
    line = refused(capfd, folder, "--repo_id", "user/x")
    assert str(folder) in line
    assert not server.requests


def test_code_that_the_folder_names_is_neither_run_nor_pushed(server, trusting, finished, tmp_path):
    folder, canary = shutil.copytree(finished, tmp_path / "model"), tmp_path / "canary"
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w').close()\nclass C: pass\n")
    for name, codes in (("config.json", AUTO_MAP), ("preprocessor_config.json", PROCESSOR_MAP)):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**settings, "auto_map": dict.fromkeys(codes, "evil.C")}))
    assert start("push", folder, "--repo_id", "user/x") == 0
    assert not canary.exists()
    assert repository(server) == FILES
    assert auto_map(server.root / "models" / "user" / "x") == AUTO_MAP
    assert auto_map(server.root / "models" / "user" / "x", "preprocessor_config.json") == PROCESSOR_MAP


def test_the_hub_of_these_tests_hides_what_is_private(server, trusting, finished):
    assert start("push", finished, "--repo_id", "user/x", "--private", "true") == 0
    assert HfApi().model_info("user/x").private
    for token, name in ((False, "user/x"), ("hf_wrong", "user/x"), (TOKEN, "user/other")):
        with pytest.raises(RepositoryNotFoundError):
            HfApi(token=token).model_info(name)


def test_the_measurements_of_the_check_differ_where_the_models_do(finished, tmp_path):
    expected = check.measure(str(finished), trust_remote_code=False)
    assert set(expected) == {"pixels of MAEImageProcessor", "pixels of MAEImageProcessorPil", "features", "loss"}
    assert compare(expected, check.measure(str(finished), trust_remote_code=False)) == 0
    model = MAEForPreTraining.from_pretrained(finished)
    with torch.no_grad():
        model.decoder.decoder_pred.bias += 0.1  # the features stay
    shutil.copytree(finished, tmp_path / "other")
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="loss: a difference"):
        compare(expected, check.measure(str(tmp_path / "other"), trust_remote_code=False))
    with pytest.raises(ValueError, match="features: a difference of nan"):
        compare(expected, {**expected, "features": expected["features"] * torch.nan})


# ------------------------------------------------------------------------------------------ pulling back


@pytest.mark.slow
def test_what_does_not_come_back_as_it_was_is_not_called_published(server, finished, capfd, monkeypatch):
    measure = check.measure
    monkeypatch.setattr(
        check, "measure", lambda *a, **k: {name: value + 0.1 for name, value in measure(*a, **k).items()}
    )
    line = refused(capfd, finished, "--repo_id", "user/x")
    assert "its download differs" in line
    assert "a difference of 0.1" in line
    assert "revision=" not in (server.root / "models" / "user" / "x" / "README.md").read_text()


@pytest.mark.slow
def test_code_that_comes_back_changed_is_not_run(server, trusting, finished, tmp_path, monkeypatch):
    assert start("push", finished, "--repo_id", "user/x") == 0
    monkeypatch.undo()
    for name, value in {**server.env, "HF_TOKEN": TOKEN}.items():
        monkeypatch.setenv(name, value)
    pushed = tmp_path / "pushed"
    pushed.mkdir()
    for path in (server.root / "models" / "user" / "x").glob("*.py"):
        shutil.copy(path, pushed)
    code = server.root / "models" / "user" / "x" / "configuration_mae.py"
    code.write_text(f"open({str(tmp_path / 'canary')!r}, 'w').close()\n" + code.read_text())
    with pytest.raises(hub.UserError, match=r"configuration_mae.py differs from the file that was pushed"):
        hub._pull_back("user/x", "main", tmp_path, pushed, tmp_path / "cache")
    assert not (tmp_path / "canary").exists()


def publishers_outputs(folder):
    return outputs(str(folder), AUTO_MODELS)


def stranger(server, home, *words):
    """`stranger.py WORDS` in a fresh process, with the caches in `home`."""
    command = [sys.executable, "-P", REPOSITORY / "tests" / "stranger.py", *words]
    subprocess.run(command, env={**server.env, "HF_HOME": str(home), "HF_TOKEN": TOKEN}, check=True)


def assert_stranger_gets(expected, server, tmp_path, *places):
    """A fresh process with an empty cache and without the package loads the same in every way from each of them."""
    files = [tmp_path / f"outputs-{number}.safetensors" for number in range(len(places))]
    words = [word for pair in zip(places, files, strict=True) for word in pair]
    stranger(server, tmp_path / "home", "load", *words)
    for place, file in zip(places, files, strict=True):
        found, local = load_file(file), Path(place).is_dir()
        wanted = {name: value for name, value in expected.items() if not (local and "AutoBackbone" in name)}
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert torch.equal(found[name], value), f"{place}: {name}"


@pytest.mark.slow
def test_what_the_command_pushed_loads_without_the_package_and_can_be_pushed_again(server, finished, tmp_path, capsys):
    assert start("push", finished, "--repo_id", "user/x", "--private", "true") == 0
    assert "largest difference 0\n" in capsys.readouterr().out
    words = ("user/x", "AutoModelForPreTraining", "torchvision", tmp_path / "again", "user/again")
    stranger(server, tmp_path / "first", "again", *words)
    assert_stranger_gets(publishers_outputs(finished), server, tmp_path, "user/x", "user/again")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("auto_class", "saved_backend", "origin", "backend"),
    [
        ("AutoModel", "torchvision", "saved", "pil"),
        ("AutoModelForPreTraining", "pil", "pushed", "torchvision"),
        ("AutoModelForImageClassification", "torchvision", "saved", "torchvision"),
        ("AutoBackbone", "pil", "pushed", "pil"),
    ],
)
def test_what_was_saved_or_pushed_by_method_loads_without_the_package(
    server, tmp_path, auto_class, saved_backend, origin, backend
):
    places = {"saved": tmp_path / "saved", "pushed": "user/x"}
    model = tiny(AUTO_MODELS[auto_class], num_labels=3)
    processor = PROCESSORS[saved_backend](size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    for saved in (model, processor):
        saved.push_to_hub("user/x")
        saved.save_pretrained(tmp_path / "plain")
        saved.save_pretrained(places["saved"], with_code=True)
    assert auto_map(tmp_path / "plain") is None
    assert not list((tmp_path / "plain").glob("*.py"))
    stranger(server, tmp_path / "first", "again", places[origin], auto_class, backend, tmp_path / "again", "user/again")
    expected = publishers_outputs(tmp_path / "plain")
    assert_stranger_gets(expected, server, tmp_path, *places.values(), tmp_path / "again", "user/again")


@pytest.mark.slow
def test_a_stock_trainer_pushes_registered_classes_with_all_of_their_code(server, tmp_path, monkeypatch):
    from transformers import Trainer, TrainingArguments

    for cls in (MAEForPreTraining, MAEImageProcessor):
        monkeypatch.setattr(cls, "_auto_class", None)  # to be put back
        cls.register_for_auto_class(*(["AutoModelForPreTraining"] if cls is MAEForPreTraining else []))
    processor = MAEImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    args = TrainingArguments(
        str(tmp_path / "out"), max_steps=1, per_device_train_batch_size=2, report_to="none", push_to_hub=True,
        hub_model_id="user/x", use_cpu=True, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    data = [{"pixel_values": image} for image in pixels(4)]
    trainer = Trainer(tiny(MAEForPreTraining), args, train_dataset=data, processing_class=processor)
    trainer.train()
    trainer.push_to_hub()
    assert repository(server) >= {*CODE, "model.safetensors"}
    monkeypatch.undo()
    local = tmp_path / "out"
    MAEForPreTraining.from_pretrained(local).save_pretrained(tmp_path / "local")
    MAEImageProcessor.from_pretrained(local).save_pretrained(tmp_path / "local")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    assert_stranger_gets(publishers_outputs(tmp_path / "local"), server, tmp_path, "user/x")


@pytest.mark.slow
def test_checkpoints_are_pushed_in_the_background_and_a_failure_is_a_line(server, finished, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    said: list[str] = []
    background = hub.BackgroundPush("user/x", True, said.append)
    background.start(finished / "checkpoint-2")
    assert not said
    background.start(finished / "checkpoint-2")
    assert said == ["checkpoint-2 is not pushed: the previous push to user/x is still running"]
    background.wait()
    assert said[1].startswith(f"published {server.url}/user/x at ")
    assert server.private == {"user/x"}
    assert repository(server) == FILES
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    background.start(finished / "checkpoint-2")
    background.wait()
    background.wait()
    assert "no valid token" in said[2]
    assert len(said) == 3


def test_the_package_in_use_is_the_one_beside_these_tests():
    assert Path(hf_mae.__file__).parent == REPOSITORY / "hf_mae"

"""Publish a model with the code that loads it, then download it from the Hub and compare.

    push("outputs/quickstart", "user/quickstart")

The token is the one that huggingface_hub finds (HF_TOKEN, or `hf auth login`); nothing here reads or writes it.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, errors
from safetensors.torch import load_file

from ..backbone_mae import MAEBackbone
from ..classifier_mae import MAEForImageClassification
from ..conversion.compare import Outputs, compare
from ..errors import UserError, one_line
from ..files import read_json, write_bytes, write_json, write_text, writing
from ..image_processing_mae import MAEImageProcessor
from ..modeling_mae import MAEForPreTraining, MAEModel
from ..pretrained import loading
from ..run_folder import CONFIG_NAME, RunFolder
from . import check
from .card import Card

MODELS = {cls.__name__: cls for cls in (MAEForPreTraining, MAEForImageClassification, MAEModel, MAEBackbone)}
PICTURE = "reconstruction.png"
# Files of an earlier push, which are deleted if the new model doesn't have them.
OURS = ["*.safetensors", "*.safetensors.index.json", "conversion.json", "recipe.yaml", PICTURE]


def write_card(folder: str, output: str) -> str | None:
    """Write the card that `push` would publish, with its picture, and nothing else.

    Args:
        folder: the model's folder; nothing is written into it.
        output: file to write, NAME.md; NAME becomes the card's title.

    Returns:
        Path of the picture beside the card, NAME.png; None if the folder has no picture.

    Raises:
        UserError: if the folder doesn't hold a model of this package, or the card can't be written.
    """
    file, picture = Path(output), Path(output).with_suffix(".png")
    with _whole_folder(folder):
        card = Card(folder)
        content = Path(card.picture).read_bytes() if card.picture else None
        card.name, card.picture = file.stem, picture.name if content else None
        text = card.text()
    with writing(output, "file"):
        file.parent.mkdir(parents=True, exist_ok=True)
        if content:
            write_bytes(picture, content)
        write_text(file, text)
    return str(picture) if content else None


def push(folder: str, repo_id: str, private: bool = False, revision: str | None = None) -> dict[str, Any]:
    """Publish a model folder, then load it from the Hub in a fresh process without this package, and compare.

    All files arrive in one commit or none does, so an interrupted push can be repeated. A second commit adds the
    compared revision to the card. The folder is only read. A README.md in it is not pushed, because the card is
    written from the folder's records.

    Args:
        folder: model folder with config.json, *.safetensors and preprocessor_config.json.
        repo_id: repository to push to, USER/NAME.
        private: whether the repository must be private.
        revision: branch to push to; the repository's main branch when None.

    Returns:
        `url`; `commit`, the one compared; `difference`, the largest in loss, features and pixels.

    Raises:
        UserError: if folder, name, token or network prevents the push; one line with the remedy.
    """
    with tempfile.TemporaryDirectory() as temporary:
        staged = Path(temporary) / "files"
        card = stage(Path(folder), staged, repo_id)
        expected = check.measure(folder, trust_remote_code=False)
        with _hub_errors(repo_id):
            api = HfApi()
            _open_repository(api, repo_id, private, revision, {file.name for file in staged.glob("*.py")})
            commit = api.upload_folder(
                repo_id=repo_id, revision=revision, folder_path=staged, delete_patterns=OURS,
                commit_message=f"{card.name}, with the code that loads it",
            ).oid  # fmt: skip
        difference = _pull_back(repo_id, commit, expected, staged, Path(temporary) / "cache")
        card.revision = commit
        with _hub_errors(repo_id):
            api.upload_file(
                repo_id=repo_id, revision=revision, path_or_fileobj=card.text().encode(), path_in_repo="README.md",
                commit_message="Card: the revision that was pulled back and compared",
            )  # fmt: skip
    return {"url": f"{api.endpoint}/{repo_id}", "commit": commit, "difference": difference}


class BackgroundPush:
    """Pushes checkpoints while the run continues: `hf-mae push` in a separate process, one at a time.

    A failed push doesn't stop the training. How a push ended is passed to `say` when the next one starts.
    """

    def __init__(self, repo_id: str, private: bool, say: Callable[[str], None]):
        self.repo_id, self.private, self.say = repo_id, private, say
        self.process: subprocess.Popen[str] | None = None

    def start(self, folder: Path) -> None:
        """Push a checkpoint, unless the previous one is still being pushed."""
        if self.process and self.process.poll() is None:
            self.say(f"{folder.name} is not pushed: the previous push to {self.repo_id} is still running")
            return
        self.wait()
        words = ["push", str(folder), "--repo_id", self.repo_id, "--private", str(self.private).lower()]
        # The push must not use the run's GPUs or join its process group.
        launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        kept = {name: value for name, value in os.environ.items() if name not in launcher}
        env = {**kept, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hf_mae.cli", *words], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, start_new_session=True,  # a signal to the run must not reach the push
        )  # fmt: skip

    def wait(self) -> None:
        """Wait for the push that is running, if any, and report how it ended."""
        if self.process:
            lines = self.process.communicate()[0].splitlines()
            outcomes = [line for line in lines if line.startswith(("published", "hf-mae: error:"))]
            self.say((outcomes or lines or ["the push printed nothing"])[-1])
            self.process = None


def stage(folder: Path, target: Path, repo_id: str | None = None) -> Card:
    """Write everything a repository needs to a new folder: weights, configuration, image processor, code, card, recipe.

    The model's folder is only read. Returns the card as written.

    Raises:
        UserError: if the folder isn't a complete model of this package.
    """
    with _whole_folder(folder):
        architecture = read_json(folder / CONFIG_NAME)["architectures"][0]
        model, loaded = MODELS[architecture].from_pretrained(folder, use_safetensors=True, output_loading_info=True)
        processor = MAEImageProcessor.from_pretrained(folder)
        card = Card(folder, repo_id)
    if loaded["missing_keys"]:
        raise UserError(f"{folder} lacks the weights {sorted(loaded['missing_keys'])[:3]} of {architecture}")
    model.save_pretrained(target, with_code=True)
    processor.save_pretrained(target, with_code=True)
    if card.conversion:
        write_json(RunFolder(target).conversion_file, card.conversion)
    if card.picture:
        shutil.copy(card.picture, target / PICTURE)
        card.picture = PICTURE
    if card.recipe:
        write_text(target / "recipe.yaml", card.recipe_yaml())
    write_text(target / "README.md", card.text())
    return card


def _whole_folder(folder: str | Path) -> AbstractContextManager[None]:
    return loading(f"{folder} is not a complete model folder", "name one that hf-mae wrote")


def _open_repository(api: HfApi, repo_id: str, private: bool, revision: str | None, code: set[str]) -> None:
    """Create the repository and the branch, or check that an existing one is empty or holds one of our models.

    `code`: names of the code files in each of our models.
    """
    api.create_repo(repo_id, private=private or None, exist_ok=True)
    repository = api.model_info(repo_id)
    if private and not repository.private:
        raise UserError(f"{repo_id} already exists and is public; make it private on the Hub, or choose another name")
    names = {sibling.rfilename for sibling in repository.siblings or []}
    if names - {".gitattributes", "README.md", "LICENSE"} and not names & code:
        some = ", ".join(sorted(names)[:3])
        raise UserError(f"{repo_id} already holds something else ({some}); choose another name, or empty it first")
    if revision:
        api.create_branch(repo_id, branch=revision, exist_ok=True)


def _pull_back(repo_id: str, commit: str, expected: Outputs, code: Path, cache: Path) -> float:
    """The largest difference between the local outputs and those of a fresh download from the Hub."""
    cache.mkdir(exist_ok=True)
    empty = {name: str(cache / name) for name in ("HF_HUB_CACHE", "HF_MODULES_CACHE", "HF_XET_CACHE")}
    measured = cache / "measured.safetensors"
    # -P keeps the script's folder off sys.path, where its siblings would hide modules of the same name.
    command = [sys.executable, "-P", check.__file__, repo_id, commit, str(code), str(measured)]
    done = subprocess.run(command, env={**os.environ, **empty}, capture_output=True, text=True, check=False)
    try:
        if done.returncode:
            raise ValueError((done.stderr.strip().splitlines() or ["no message"])[-1])
        return compare(expected, load_file(measured))
    except ValueError as error:
        raise UserError(
            f"{repo_id} was uploaded as {commit[:12]}, but its download differs ({one_line(error)}); push it "
            "again, or delete it"
        ) from error


@contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """Turn errors of the Hub and the network into a UserError of one line with a remedy."""
    try:
        yield
    except UserError:
        raise
    except errors.HFValidationError as error:
        raise UserError(f"repo_id '{repo_id}' is not the name of a repository; write USER/NAME") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        remedy = {
            401: "no valid token; log in with `hf auth login`, or set HF_TOKEN to one with write access",
            403: "this token may not write there; check USER, and the token's permissions",
            404: "it doesn't exist, or you have no access; check the name and the token",
            409: "something else was pushed at the same time; push again",
        }.get(status, "push again; only missing files are sent")
        missing = status == 401 and isinstance(error, errors.RepositoryNotFoundError)
        raise UserError(f"{repo_id}: the Hub answered {404 if missing else status}: {remedy}") from error
    except (errors.HTTPError, OSError) as error:  # pyright: ignore[reportPrivateImportUsage]
        what = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{repo_id}: the Hub can't be reached ({what}); push again") from error
    except ValueError as error:  # from the card's metadata
        raise UserError(f"{repo_id}: {one_line(error)}") from error

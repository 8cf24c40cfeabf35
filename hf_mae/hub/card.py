"""The card of a model: one template, card.md, for `model_cards/` and for the README.md of a pushed repository.

    print(Card("outputs/quickstart").text())

Everything in it is read from the model's folder: config.json and the files of its run. The card of a `checkpoint-STEP`
is read from the folder of its run, up to that step. A card leaves out what these files don't record.
"""

import os
import re
import statistics
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..errors import without_secrets
from ..files import as_utf8, is_hub_id, local_path, read_json, sha256
from ..keys import height_width, names_where
from ..keys.finetune_keys import FinetuneRecipe
from ..keys.run_keys import PretrainRecipe
from ..run_folder import (
    CONFIG_NAME,
    FEW_IMAGES,
    RunFolder,
    curve,
    is_percent,
    limits_of,
    run_of,
    show_figure,
    show_limits,
)

LICENCES = {"apache-2.0": "Apache-2.0", "cc-by-nc-4.0": "CC BY-NC 4.0 (not for commercial use)"}
LOCAL = " (local)"
EVALUATED_ON = r"(split \S+ of )(.+)"


class Card:
    """The contents of a model's card. It shows only the last name of a local path.

    Args:
        folder: the model's folder. It needs a config.json; all other files may be missing.
        repo_id: USER/NAME on the Hub, where the model is or will be.

    Attributes:
        config, conversion, licence, results: of the model. `results` are those of exactly these weights.
        recipe, derived, events, step: of the run that trained it; empty if nothing is recorded. `step` is that of a
            checkpoint before the end of its run, else None.
        repo_id, name, picture, revision: of the place where the card is shown: the repository, the card's title, the
            path of the picture beside it, the commit that was downloaded and compared. Set these before `text`.
    """

    def __init__(self, folder: str | Path, repo_id: str | None = None):
        folder = Path(folder)
        (run, step), model = run_of(folder), RunFolder(folder)
        recipe, derived = run.config()
        conversion = model.conversion()
        pictures = [path for number, path in run.pictures() if step is None or number == step]
        self.repo_id, self.name = repo_id, (repo_id or folder.resolve().name).split("/")[-1]
        self.picture = str(pictures[-1]) if pictures else None
        self.revision: str | None = None

        places = _Places(recipe, derived)
        self.config = read_json(folder / CONFIG_NAME)
        self.conversion = places.show_all(conversion)
        self.licence = _licence_of(model, conversion, recipe)
        self.results = [
            {**entry, **{part: places.show_all(entry[part]) for part in ("data", "protocol")}}
            for entry in _own_results(model)
        ]

        self.recipe, self.derived = places.show_all(recipe), places.show_all(derived)
        self.events = [event for event in run.events() if step is None or event["step"] <= step]
        self.step = step if step != derived.get("total_steps") else None

    @property
    def classifies(self) -> bool:
        """Whether the model is a classifier."""
        return "MAEForImageClassification" in (self.config.get("architectures") or [])

    @property
    def command(self) -> str:
        """The command that trained the model."""
        return "finetune" if "layer_decay" in self.recipe else "pretrain"

    @property
    def data(self) -> str | None:
        """The data that the model was trained on."""
        keys = ("dataset_config", "dataset_revision", "split")
        more = [f"{key.removeprefix('dataset_')} {self.recipe[key]}" for key in keys if self.recipe.get(key)]
        return ", ".join([str(self.recipe["dataset"]), *more]) if "dataset" in self.recipe else None

    @property
    def processes(self) -> str | None:
        """The number of processes that trained it, and how they shared the work."""
        number, strategy = self.derived.get("processes"), self.derived.get("strategy")
        return f"{number} ({strategy})" if number not in (None, 1) and strategy else _count(number)

    def recipe_yaml(self) -> str:
        """The run's keys as a recipe file for `hf-mae`, with "path/to/NAME" for local data and models."""
        hidden = names_where(FinetuneRecipe if self.command == "finetune" else PretrainRecipe, card=False)
        keys = {key: value for key, value in self.recipe.items() if value is not None and key not in hidden}
        placeholders = {key: f"path/to/{keys[key].removesuffix(LOCAL)}" for key in self.local_keys}
        return yaml.safe_dump(keys | placeholders, sort_keys=False)

    @property
    def local_keys(self) -> list[str]:
        """The keys of the recipe that name local data or models."""
        return [key for key in _Places.KEYS if str(self.recipe.get(key)).endswith(LOCAL)]

    def _metadata(self) -> ModelCardData:
        """The head of the card, which the Hub searches and shows."""
        dataset, model = (str(self.recipe.get(key) or "") for key in ("dataset", "model"))
        known = self.licence is None or self.licence in LICENCES
        results = [
            EvalResult(
                task_type="image-classification",
                dataset_type=_slug(entry["data"]["dataset"]),
                dataset_name=f"{entry['data']['dataset']}, {entry['data']['evaluated_on']}",
                dataset_config=entry["data"].get("config"),
                dataset_revision=entry["data"].get("revision"),
                metric_type="accuracy",
                metric_name=f"{figure} (%), {_protocol(entry)}",
                metric_value=round(value, 2),
            )
            for entry in self.results
            for figure, value in entry["figures"].items()
            # The metadata is compared across models.
            if is_percent(figure) and entry["data"]["eval_images"] >= FEW_IMAGES
        ]
        return ModelCardData(
            library_name="transformers",
            license=self.licence if known else "other",
            license_name=None if known else re.sub(r"[^a-z0-9.-]+", "-", str(self.licence).lower()),
            pipeline_tag="image-classification" if self.classifies else "image-feature-extraction",
            tags=["masked-autoencoder", "mae", "vision", "self-supervised-learning", "arxiv:2111.06377"],
            datasets=[dataset] if _names_repository(dataset) else None,
            base_model=model if _names_repository(model) else None,
            model_name=self.name if results else None,
            eval_results=results or None,
        )

    def text(self) -> str:
        """The whole card, Markdown with its head."""
        speeds = [speed for _, speed in curve(self.events, "images_per_second") if speed]
        card = ModelCard.from_template(
            self._metadata(),
            template_path=str(Path(__file__).with_name("card.md")),
            card=self,
            config=self.config,
            recipe=self.recipe,
            derived=self.derived,
            eval_losses=[] if self.classifies else curve(self.events, "eval_loss"),
            images_per_second=statistics.median(speeds) if speeds else None,
            licence_name=LICENCES.get(str(self.licence), self.licence),
            count=_count,
            figure=show_figure,
            limits=show_limits,
            limits_of=limits_of,
            protocol=_protocol,
            settings=_settings,
            sides=lambda size: "{} x {}".format(*height_width(size)),
        )
        return as_utf8(f"{card}\n")


# ------------------------------------------------------------------------------------------ licence and results


def licence_of(folder: str | Path, passed: tuple[Path, ...] = ()) -> str | None:
    """The licence of a model's weights, as the Hub spells it; None if it is not recorded.

    Converted weights keep their licence. Weights trained from other weights take theirs. Weights trained from scratch
    are under Apache-2.0. `passed` are folders that were trained from this one.
    """
    model = RunFolder(folder)
    return _licence_of(model, model.conversion(), run_of(model.path)[0].config()[0], passed)


def _licence_of(
    model: RunFolder, conversion: dict[str, Any], recipe: dict[str, Any], passed: tuple[Path, ...] = ()
) -> str | None:
    if model.conversion_file.exists():  # even if it can't be read, these weights come from elsewhere
        licence = re.sub(r"[\s_]+", "-", str(conversion.get("licence") or "")).lower()
        return "cc-by-nc-4.0" if licence.startswith("cc-by-nc") else licence or None
    if not recipe:
        return None
    if not recipe.get("model"):
        return "apache-2.0"
    start, passed = str(recipe["model"]), (*passed, model.path.resolve())
    return licence_of(start, passed) if os.path.isdir(start) and Path(start).resolve() not in passed else None


def _own_results(model: RunFolder) -> list[dict[str, Any]]:
    """The results of exactly these weights: the folder's weights may have changed since an evaluation."""
    own = sha256(model.weights_file) if model.weights_file.is_file() else None
    return [entry for entry in model.results() if entry["checkpoint"].get("sha256") == own]


# ------------------------------------------------------------------------------------------ words for values


class _Places:
    """How a card names data and models: a local path by its last name and "(local)", a Hub id or a URL unchanged."""

    KEYS = ("dataset", "eval_dataset", "model", "start", "source")

    def __init__(self, recipe: dict[str, Any], derived: dict[str, Any]):
        # A relative path looks like a Hub id, so a run records which of its keys are paths.
        keys = derived.get("local_keys")
        self.recorded = [recipe.get(key) for key in keys] if isinstance(keys, list) else []

    def show(self, place: str) -> str:
        path = local_path(place)
        may_be_on_hub = is_hub_id(place) and not os.path.exists(place)
        elsewhere = place == "digits" or "://" in path or (may_be_on_hub and place not in self.recorded)
        return place if elsewhere else f"{Path(path).name or 'folder'}{LOCAL}"

    def show_all(self, values: dict[str, Any]) -> dict[str, Any]:
        """The values of a table, without "local_keys". Paths under other keys become their last names."""
        shown = without_secrets({key: value for key, value in values.items() if key != "local_keys"})
        for key, value in shown.items():
            if not isinstance(value, str):
                continue
            if key in self.KEYS:
                shown[key] = self.show(value)
            elif key == "evaluated_on" and (parts := re.fullmatch(EVALUATED_ON, value)):
                shown[key] = parts[1] + self.show(parts[2])
            elif key == "labels" or value.startswith(("/", "~", "file://")):
                shown[key] = Path(value).name
        return shown


def _names_repository(name: str) -> bool:
    return "/" in name and is_hub_id(name) and not Path(name).suffix


def _slug(name: str) -> str:
    """An id for the metadata, even for data that isn't on the Hub."""
    return name if _names_repository(name) else re.sub(r"[^\w.-]+", "-", Path(name).name).strip("-") or "data"


def _count(number: Any) -> str | None:
    return f"{number:,}" if isinstance(number, int) else None if number is None else str(number)


def _protocol(entry: dict[str, Any]) -> str:
    return entry["protocol"]["name"].replace("_", " ")


def _settings(protocol: dict[str, Any]) -> str:
    """The settings of a protocol, without the empty ones."""
    named = {key: value for key, value in protocol.items() if key != "name" and value not in (None, {}, [])}
    return ", ".join(f"{key} {_short(value)}" for key, value in named.items())


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {_short(item)}" for key, item in value.items()) + ")"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)

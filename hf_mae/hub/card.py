"""The card of a model: one template for `model_cards/` and for the README.md of a pushed repository.

    print(Card.read("outputs/quickstart").text())

Everything in it is read from the model's folder (config.json, run_config.yaml, metrics.jsonl, results.json,
conversion.json, reconstructions/); of a `checkpoint-STEP`, from its run's folder, up to that step. What these do not
say, the card does not say either.
"""

import hashlib
import json
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from ..keys import names_where
from ..keys.finetune_keys import FinetuneRecipe
from ..keys.run_keys import PretrainRecipe

LICENCES = {"apache-2.0": "Apache-2.0", "cc-by-nc-4.0": "CC BY-NC 4.0 (not for commercial use)"}


@dataclass
class Card:
    """What a card is made of.

    Args:
        name: title.
        config: config.json.
        processor: preprocessor_config.json.
        recipe: keys of the run; empty if none is recorded.
        derived: what the run derived from them.
        events: lines of metrics.jsonl.
        results: entries of results.json that belong to these weights.
        conversion: conversion.json; empty for weights that were trained, not converted.
        licence: of the weights, an id of the Hub's list; None if it is not known.
        picture: path of the reconstructions, which the card shows from there: set it to where they are beside the card.
        step: of a checkpoint that was taken before the end of its run.
        repo_id: where the model is, or will be.
        revision: a commit that was pulled back and compared.
    """

    name: str
    config: dict[str, Any]
    processor: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    derived: dict[str, Any] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    conversion: dict[str, Any] = field(default_factory=dict)
    licence: str | None = None
    picture: str | None = None
    step: int | None = None
    repo_id: str | None = None
    revision: str | None = None

    @classmethod
    def read(cls, folder: str | Path, repo_id: str | None = None) -> "Card":
        """A card of a model's folder.

        Args:
            folder: config.json has to be there; all else may be missing.
            repo_id: USER/NAME on the Hub.
        """
        folder = Path(folder)
        step, home = _checkpoint(folder)
        run = _read_run(home)
        lines = (home / "metrics.jsonl").read_text().splitlines() if (home / "metrics.jsonl").is_file() else []
        events = [event for event in map(json.loads, lines) if step is None or event["step"] <= step]
        pictures = {int(path.stem.split("-")[1]): path for path in home.glob("reconstructions/step-*.png")}
        shown = [number for number in pictures if step is None or number == step]
        return cls(
            name=(repo_id or folder.resolve().name).split("/")[-1],
            config=json.loads((folder / "config.json").read_text()),
            processor=_read_json(folder / "preprocessor_config.json") or {},
            recipe={key: _portable(value) for key, value in run.get("recipe", {}).items()},
            derived=run.get("derived", {}),
            events=events,
            results=_own_results(folder),
            conversion={key: _portable(value) for key, value in (_read_json(folder / "conversion.json") or {}).items()},
            licence=licence_of(folder),
            picture=str(pictures[max(shown)]) if shown else None,
            step=step if step != run.get("derived", {}).get("total_steps") else None,
            repo_id=repo_id,
        )

    @property
    def classifies(self) -> bool:
        """Whether the model is a classifier."""
        return "MAEForImageClassification" in (self.config.get("architectures") or [])

    @property
    def command(self) -> str:
        """The command that the model was trained by."""
        return "finetune" if "layer_decay" in self.recipe else "pretrain"

    def recipe_yaml(self) -> str:
        """The keys of the run as a recipe file that `hf-mae` takes."""
        hidden = names_where(FinetuneRecipe if self.command == "finetune" else PretrainRecipe, card=False)
        keys = {key: value for key, value in self.recipe.items() if value is not None and key not in hidden}
        return yaml.safe_dump(keys, sort_keys=False)

    def metadata(self) -> ModelCardData:
        """The head of the card, which the Hub searches and shows."""
        dataset, model = str(self.recipe.get("dataset", "")), str(self.recipe.get("model") or "")
        known = self.licence is None or self.licence in LICENCES
        return ModelCardData(
            library_name="transformers",
            license=self.licence if known else "other",
            license_name=None if known else re.sub(r"[^a-z0-9.-]+", "-", str(self.licence).lower()),
            pipeline_tag="image-classification" if self.classifies else "image-feature-extraction",
            tags=["masked-autoencoder", "mae", "vision", "self-supervised-learning", "arxiv:2111.06377"],
            datasets=[dataset] if _is_hub_id(dataset) else None,
            base_model=model if _is_hub_id(model) else None,
            model_name=self.name if (results := self._eval_results()) else None,
            eval_results=results or None,
        )

    def _eval_results(self) -> list[EvalResult]:
        return [
            EvalResult(
                task_type="image-classification",
                dataset_type=_slug(entry["data"]["dataset"]),
                dataset_name=f"{_portable(entry['data']['dataset'])}, {_portable_text(entry['data']['evaluated_on'])}",
                dataset_config=entry["data"].get("config"),
                dataset_revision=entry["data"].get("revision"),
                metric_type="accuracy",
                metric_name=f"{figure} (%), {_protocol(entry)}",
                metric_value=round(value, 2),
            )
            for entry in self.results
            for figure, value in entry["figures"].items()
            if "top" in figure
        ]

    def text(self) -> str:
        """The whole card, Markdown with its head."""
        sections = [
            ("", self._what()),
            ("How to load it", self._loading()),
            ("Results", self._results()),
            ("Training", self._training()),
            ("Reconstructions", self._picture()),
            ("Limits", self._limits()),
            ("Licence", self._licence()),
        ]
        body = "\n\n".join(f"## {title}\n\n{text}" if title else text for title, text in sections if text)
        return f"---\n{self.metadata().to_yaml()}\n---\n\n# {self.name}\n\n{body}\n"

    def _what(self) -> str:
        config = self.config
        kind = (
            "An image classifier, fine-tuned from a masked autoencoder" if self.classifies else "A masked autoencoder"
        )
        sizes = f"{_sides(config['image_size'])} pixels, patches of {_sides(config['patch_size'])}"
        lines = [
            f"{kind} ([arXiv:2111.06377](https://arxiv.org/abs/2111.06377)): a ViT of {config['num_hidden_layers']} "
            f"layers, width {config['hidden_size']}, {config['num_attention_heads']} heads, for "
            f"{config['num_channels']}-channel images of {sizes}."
        ]
        if not self.classifies:
            how = " with cross-attention alone" if config.get("decoder_attention") == "cross" else ""
            lines.append(
                f"Its decoder{how} has {config['decoder_num_hidden_layers']} layers of width "
                f"{config['decoder_hidden_size']}; {config['mask_ratio']:.0%} of the patches are hidden in pretraining."
            )
        if "parameters" in self.derived:
            lines.append(f"{self.derived['parameters']:,} parameters.")
        if self.conversion:
            source = self.conversion.get("source")
            lines.append("The weights are converted" + (f" from {source}." if source else "."))
        return "\n".join(lines)

    def _loading(self) -> str:
        place = self.repo_id or f"outputs/{self.name}"
        pinned = f'revision="{self.revision}"' if self.revision else ""
        auto = "AutoModelForImageClassification" if self.classifies else "AutoModel"
        output = "logits" if self.classifies else "pooler_output"

        def snippet(first: list[str], *options: str) -> str:
            more = "".join(f", {option}" for option in options if option)
            return "\n".join([
                "```python",
                *first,
                f"from transformers import AutoImageProcessor, {auto}",
                "",
                f'processor = AutoImageProcessor.from_pretrained("{place}"{more})',
                f'model = {auto}.from_pretrained("{place}"{more})',
                f'{output} = model(**processor(image, return_tensors="pt")).{output}',
                "```",
            ])  # fmt: skip

        text = f"With the package hf-mae:\n\n{snippet(['import hf_mae'], pinned)}"
        if not self.repo_id:
            return text
        said = "That revision was loaded from the Hub without the package, and compared." if self.revision else ""
        return (
            f"{text}\n\nWithout it, by the code in this repository:\n\n{snippet([], pinned, 'trust_remote_code=True')}"
            + (f"\n\n{said}" if said else "")
        )

    def _results(self) -> str:
        blocks = []
        for entry in self.results:
            data = entry["data"]
            ranges = entry.get("ranges", {})
            learnt = f"learnt from {data['train_images']:,} images, " if "train_images" in data else ""
            rows = [
                f"| {name} | {_figure(name, value, ranges.get(name))} |" for name, value in entry["figures"].items()
            ]
            settings = ", ".join(
                f"{key} {_short(_portable(value))}"
                for key, value in entry["protocol"].items()
                if key != "name" and value not in (None, {}, [])
            )
            blocks.append(
                f"**{_protocol(entry)}** on {_portable(data['dataset'])}: {learnt}evaluated on "
                f"{data['eval_images']:,} images ({_portable_text(data['evaluated_on'])}), {data['classes']} classes."
                "\n\n" + "\n".join(["| figure | value |", "|---|---|", *rows]) + f"\n\nProtocol: {settings}."
            )
        losses = [event for event in self.events if event.get("eval_loss") is not None]
        if losses and not self.classifies:
            last = losses[-1]
            blocks.append(
                f"Loss on held-out images with fixed masks: {last['eval_loss']:.4f} after step {last['step']:,}"
                + (f" ({losses[0]['eval_loss']:.4f} before step 1)." if losses[0]["step"] == 0 else ".")
            )
        return "\n\n".join(blocks)

    def _training(self) -> str:
        if not self.recipe:
            return ""
        recipe, derived = self.recipe, self.derived
        speeds = [event["images_per_second"] for event in self.events if event.get("images_per_second")]
        rows = [
            ("data", _data(recipe)),
            ("training images", _count(derived.get("training_images"))),
            ("evaluated on", _portable_text(derived.get("evaluated_on") or "") or None),
            ("started from", recipe.get("model") or ("random weights" if self.command == "pretrain" else None)),
            ("steps", _count(derived.get("total_steps"))),
            ("these weights", None if self.step is None else f"after step {self.step:,}, before the end of the run"),
            ("images a step", _count(recipe.get("total_batch_size"))),
            ("peak learning rate", derived.get("lr")),
            ("hardware", derived.get("hardware")),
            ("processes", _processes(derived)),
            ("precision", {"no": "float32"}.get(str(derived.get("mixed_precision")), derived.get("mixed_precision"))),
            ("throughput", f"{statistics.median(speeds):,.0f} images a second (median)" if speeds else None),
            ("hf-mae", derived.get("version")),
            ("torch", derived.get("torch")),
        ]
        table = "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows if value is not None)])
        where = ", a file of this repository" if self.repo_id else ""
        return (
            f"{table}\n\nTo train it again, with the keys below as `recipe.yaml`{where}:\n\n"
            f"```bash\nhf-mae {self.command} --recipe recipe.yaml --output_dir outputs/{self.name}\n```\n\n"
            f"```yaml\n{self.recipe_yaml()}```"
        )

    def _picture(self) -> str:
        if not self.picture:
            return ""
        note = (
            " The model predicts patches without their mean and contrast, which the picture takes from the original."
            if self.config.get("norm_pix_loss")
            else ""
        )
        titles = "original, masked, reconstruction"
        return f"![{titles}]({self.picture})\n\nHeld-out images: {titles}.{note}"

    def _limits(self) -> str:
        size = _sides(self.config["image_size"])
        lines = [
            f"- Images are resized and cropped to {size} pixels by the image processor; other sizes need "
            "`from_pretrained(..., image_size=...)`, and were not measured unless a result above says so.",
            "- What was learnt is what was in the training images; how it does on others, and for whom it errs, is not "
            "known beyond the results above.",
        ]
        if not self.classifies:
            lines.append("- It names nothing: features need a classifier, a search or fine-tuning on top.")
        if not self.results:
            lines.append("- No evaluation of these weights is recorded.")
        return "\n".join(lines)

    def _licence(self) -> str:
        if self.licence is None:
            return "The licence of these weights is not recorded."
        name, note = LICENCES.get(self.licence, self.licence), self.conversion.get("licence_note")
        if self.conversion or self.recipe.get("model"):
            return f"Weights: {name}, the licence of what they come from. The code in this repository: Apache-2.0." + (
                f"\n\n{note}" if note else ""
            )
        return f"Weights and code: {name}. The training data has a licence of its own."


def licence_of(folder: str | Path) -> str | None:
    """The licence of a model's weights, as the Hub spells it.

    What was converted keeps its own, and what was trained from other weights takes theirs; Apache-2.0 is for training
    from scratch. None if the folder does not tell.
    """
    folder = Path(folder)
    if (folder / "conversion.json").is_file():
        found = re.sub(r"[\s_]+", "-", str(_read_json(folder / "conversion.json").get("licence") or "")).lower()
        return "cc-by-nc-4.0" if found.startswith("cc-by-nc") else found or None
    recipe = _read_run(_checkpoint(folder)[1]).get("recipe")
    if not recipe:
        return None
    if not recipe.get("model"):
        return "apache-2.0"
    return licence_of(recipe["model"]) if Path(recipe["model"]).is_dir() else None


def _checkpoint(folder: Path) -> tuple[int | None, Path]:
    """The step of a `checkpoint-STEP` and the folder of its run; None and the folder itself for any other."""
    found = re.fullmatch(r"checkpoint-(\d+)", folder.resolve().name)
    return (int(found[1]), folder.resolve().parent) if found else (None, folder)


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None


def _read_run(folder: Path) -> dict[str, Any]:
    file = folder / "run_config.yaml"
    return yaml.safe_load(file.read_text()) if file.is_file() else {}


def _own_results(folder: Path) -> list[dict[str, Any]]:
    """Entries of results.json about these very weights: the folder may have got others since."""
    entries = _read_json(folder / "results.json") or []
    if not isinstance(entries, list):
        raise ValueError(f"{folder / 'results.json'} is no list of results of hf-mae; move it away")
    weights = folder / "model.safetensors"
    sha256 = None
    if weights.is_file():
        with weights.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return [entry for entry in entries if entry["checkpoint"]["sha256"] == sha256]


def _portable(value: Any) -> Any:
    """A path of one machine by its last name; all else as it is."""
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value


def _portable_text(text: str) -> str:
    return re.sub(r"(?<!\S)[/~]\S*/(\S+)", r"\1", text)


def _is_hub_id(name: str) -> bool:
    return bool(re.fullmatch(r"[\w-]+/[\w.-]+", name)) and not Path(name).exists() and not Path(name).suffix


def _slug(name: str) -> str:
    """An id for the metadata, also for data that has none on the Hub."""
    return name if _is_hub_id(name) else re.sub(r"[^\w.-]+", "-", Path(name).name).strip("-") or "data"


def _sides(size: int | list[int]) -> str:
    height, width = (size, size) if isinstance(size, int) else size
    return f"{height} x {width}"


def _count(number: int | None) -> str | None:
    return None if number is None else f"{number:,}"


def _data(recipe: dict[str, Any]) -> str:
    keys = ("dataset_config", "dataset_revision", "split")
    more = [f"{key.removeprefix('dataset_')} {recipe[key]}" for key in keys if recipe.get(key)]
    return ", ".join([str(recipe["dataset"]), *more])


def _processes(derived: dict[str, Any]) -> str | None:
    if "processes" not in derived:
        return None
    strategy = derived.get("strategy")
    return f"{derived['processes']}" + (f" ({strategy})" if strategy and derived["processes"] > 1 else "")


def _protocol(entry: dict[str, Any]) -> str:
    return entry["protocol"]["name"].replace("_", " ")


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {_short(item)}" for key, item in value.items()) + ")"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _figure(name: str, value: float, low_high: list[float] | None) -> str:
    percent = " %" if "top" in name else ""
    digits = ".2f" if percent else ".4g"
    spread = f" ({low_high[0]:{digits}} to {low_high[1]:{digits}})" if low_high else ""
    return f"{value:{digits}}{percent}{spread}"

"""Run as a script: what someone without the package does with a model that brings its code.

    python -P stranger.py load PLACE OUTPUTS.safetensors [PLACE OUTPUTS.safetensors ...]
    python -P stranger.py again PLACE AUTO_CLASS BACKEND FOLDER REPO

`load` loads from folders or repositories in every way, and writes down what the models give. `again` loads one class
and one image processor, and nothing else, then saves and pushes them.
"""

import sys
from pathlib import Path


class WithoutPackage:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] == "hf_mae":
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)


if __name__ == "__main__":
    sys.meta_path.insert(0, WithoutPackage)

import torch  # noqa: E402
import transformers  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, pipeline  # noqa: E402

MODELS = (
    "AutoModel",
    "AutoModelForPreTraining",
    "AutoModelForMaskedImageModeling",
    "AutoModelForImageClassification",
    "AutoBackbone",
)


def outputs(place: str, models: dict, **loading) -> dict[str, torch.Tensor]:
    """What every way to load gives for one picture; `models` is name -> class with `from_pretrained`."""
    picture = Image.radial_gradient("L").resize((19, 23))
    found = {}
    for backend in ("pil", "torchvision"):
        processor = AutoImageProcessor.from_pretrained(place, backend=backend, **loading)
        assert type(processor).__name__ == {"pil": "MAEImageProcessorPil"}.get(backend, "MAEImageProcessor")
        found[backend] = pixels = processor(picture, return_tensors="pt").pixel_values
    for name, model_class in models.items():
        torch.manual_seed(0)  # of a head that the file does not have
        model = model_class.from_pretrained(place, **loading).eval()
        with torch.no_grad():
            output = model(pixels)
        for key in ("loss", "logits", "last_hidden_state", "pooler_output"):
            if output.get(key) is not None:
                found[f"{name} {key}"] = output[key]
        for index, maps in enumerate(output.get("feature_maps", ())):
            found[f"{name} map {index}"] = maps
    features = pipeline("image-feature-extraction", model=place, **loading)
    found["features"] = torch.tensor(features(picture))
    torch.manual_seed(0)
    classes = pipeline("image-classification", model=place, **loading)(picture, top_k=2)
    found["scores"] = torch.tensor([score["score"] for score in classes])
    return {name: value.contiguous() for name, value in found.items()}


def load(*places_and_files: str) -> None:
    for place, file in zip(places_and_files[::2], places_and_files[1::2], strict=True):
        config = AutoConfig.from_pretrained(place, trust_remote_code=True)
        assert type(config).__module__.startswith("transformers_modules."), type(config)
        models = {name: getattr(transformers, name) for name in MODELS}
        if Path(place).is_dir():
            # transformers asks the Hub about every place that a backbone is loaded from.
            del models["AutoBackbone"]
            assert type(AutoBackbone.from_config(config, trust_remote_code=True)).__name__ == "MAEBackbone"
        save_file(outputs(place, models, trust_remote_code=True), file)


def again(place: str, auto_class: str, backend: str, folder: str, repo: str) -> None:
    model = getattr(transformers, auto_class).from_pretrained(place, trust_remote_code=True)
    processor = AutoImageProcessor.from_pretrained(place, backend=backend, trust_remote_code=True)
    for loaded in (model, processor):
        loaded.save_pretrained(folder)
        loaded.push_to_hub(repo)


if __name__ == "__main__":
    {"load": load, "again": again}[sys.argv[1]](*sys.argv[2:])

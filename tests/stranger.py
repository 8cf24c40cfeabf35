"""Run as a script: loads a pushed model as someone without the package does, and writes down what it gives.

    python -P stranger.py REPO OUTPUTS.safetensors [OTHER_REPO]

With OTHER_REPO, model and image processor are pushed there as they were loaded.
"""

import sys


class WithoutPackage:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] == "hf_mae":
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)


if __name__ == "__main__":
    sys.meta_path.insert(0, WithoutPackage)

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import (  # noqa: E402
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    AutoModelForPreTraining,
    pipeline,
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


def main(repo: str, file: str, again: str = "") -> None:
    config = AutoConfig.from_pretrained(repo, trust_remote_code=True)
    assert type(config).__module__.startswith("transformers_modules."), type(config)
    models = {
        "AutoModel": AutoModel,
        "AutoModelForPreTraining": AutoModelForPreTraining,
        "AutoModelForMaskedImageModeling": AutoModelForMaskedImageModeling,
        "AutoModelForImageClassification": AutoModelForImageClassification,
        "AutoBackbone": AutoBackbone,
    }
    save_file(outputs(repo, models, trust_remote_code=True), file)
    if again:
        own = AutoModelForImageClassification if "Classif" in config.architectures[0] else AutoModelForPreTraining
        own.from_pretrained(repo, trust_remote_code=True).push_to_hub(again)
        AutoImageProcessor.from_pretrained(repo, trust_remote_code=True).push_to_hub(again)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A model's outputs for a fixed image, and a script that measures them again on a download from the Hub.

`push.py` starts this file as a script after an upload. It then runs without the package, as on a stranger's machine. It
runs the code that comes with the model, but only after checking that its bytes are those that were pushed.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download
from safetensors.torch import save_file


@torch.no_grad()
def measure(place: str, **loading: Any) -> dict[str, torch.Tensor]:
    """Pixels, features and loss (for a classifier: logits) of one fixed image.

    Args:
        place: folder or Hub id of the model.
        **loading: keywords for every `from_pretrained`.
    """
    config = transformers.AutoConfig.from_pretrained(place, **loading)
    height, width = config.image_height_width
    count = height * width * config.num_channels
    image = (torch.arange(count) * 7919 % 251).to(torch.uint8).view(height, width, config.num_channels).numpy()
    measured = {}
    for backend in ("torchvision", "pil"):
        processor = transformers.AutoImageProcessor.from_pretrained(place, backend=backend, **loading)
        pixel_values = processor(image, return_tensors="pt", input_data_format="channels_last").pixel_values
        measured[f"pixels of {type(processor).__name__}"] = pixel_values
    model = transformers.AutoModel.from_pretrained(place, **loading).eval()
    measured["features"] = model(pixel_values, interpolate_pos_encoding=True).last_hidden_state
    architecture = (config.architectures or [""])[0]
    if architecture == "MAEForPreTraining":
        model = transformers.AutoModelForPreTraining.from_pretrained(place, **loading).eval()
        measured["loss"] = model(pixel_values, interpolate_pos_encoding=True).loss
    if architecture == "MAEForImageClassification":
        model = transformers.AutoModelForImageClassification.from_pretrained(place, **loading).eval()
        measured["logits"] = model(pixel_values, interpolate_pos_encoding=True).logits
    return {name: value.float().contiguous() for name, value in measured.items()}


class _WithoutPackage:
    """Hides the package from every import, wherever it is installed."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] == "hf_mae":
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)


def main(repo_id: str, revision: str, code: str, output: str) -> int:
    """Measure a commit of a repository, and write the tensors to a safetensors file.

    It only runs code that equals the pushed .py files, which are in the folder `code`.
    """
    sys.meta_path.insert(0, _WithoutPackage)  # type: ignore[arg-type]
    for pushed in sorted(Path(code).glob("*.py")):
        if Path(hf_hub_download(repo_id, pushed.name, revision=revision)).read_bytes() != pushed.read_bytes():
            raise ValueError(f"{pushed.name} differs from the file that was pushed; it was not run")
    save_file(measure(repo_id, revision=revision, trust_remote_code=True), output)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

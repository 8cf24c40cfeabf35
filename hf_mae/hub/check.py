"""What a model gives on a fixed image, and the fresh process that measures it again on what the Hub gives back.

As a script this file runs without the package, as on a stranger's machine: `push.py` starts it after an upload. The
code that comes with the model is run there, and only after its bytes have been found to be those of this package.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download
from safetensors.torch import save_file

# What `save_pretrained` writes beside a model and its image processor (hub_code_mae.py): the files of that ending.
CODE = tuple(sorted(path.name for path in Path(__file__).parents[1].glob("*_mae.py")))


@torch.no_grad()
def measure(place: str, **loading: Any) -> dict[str, torch.Tensor]:
    """Pixels, features and loss (of a classifier: logits) for one fixed image.

    Args:
        place: folder or Hub id.
        **loading: keywords of every `from_pretrained`.
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
    """Makes the package absent to every import, wherever it is installed."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] == "hf_mae":
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)


def main(repo_id: str, revision: str, code: str, output: str) -> int:
    """Measure a commit of a repository, and write the tensors to a safetensors file.

    Only code equal to the files in the folder `code`, those that were pushed, is run.
    """
    sys.meta_path.insert(0, _WithoutPackage)  # type: ignore[arg-type]
    for name in CODE:
        if Path(hf_hub_download(repo_id, name, revision=revision)).read_bytes() != (Path(code) / name).read_bytes():
            raise ValueError(f"{name} is not the file that was pushed; it was not run")
    save_file(measure(repo_id, revision=revision, trust_remote_code=True), output)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

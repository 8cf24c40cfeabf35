"""The keys of the commands that convert, publish and show models and runs."""

from dataclasses import dataclass
from typing import Literal

from . import PICTURE_FILES, ImageSize, Recipe, data_key, key, masking_key, model_key, output_key, positional_key
from .evaluation_keys import ModelInput

Statistics = Literal["visible", "true", "raw"]
Format = Literal["mae", "vit_mae", "vit", "timm", "original"]
ExportFormat = Literal["onnx", "torch_export"]


@dataclass
class SourceFacts(Recipe):
    """Facts that weight files don't state; None if not given."""

    image_size: ImageSize | None = model_key(None, "new image size in pixels, such as 224 or 208x320", "unchanged")
    num_attention_heads: int | None = model_key(
        None, "attention heads of the encoder in a .pth or .safetensors file", "from its width"
    )
    decoder_num_attention_heads: int | None = model_key(
        None, "attention heads of the decoder in a .pth or .safetensors file", "from its width"
    )
    norm_pix_loss: bool | None = model_key(
        None, "whether the decoder in a .pth file predicts normalised patches", "from the file's name"
    )

    def check(self) -> None:
        self.check_least(image_size=1, num_attention_heads=1, decoder_num_attention_heads=1)


@dataclass
class ConvertRecipe(SourceFacts):
    """Keys of `hf-mae convert SRC DST`."""

    model: str = positional_key(".pth or .safetensors file, folder, or Hub id", metavar="SRC")
    output_dir: str = positional_key("folder to write; must not exist, or be empty", metavar="DST")
    to: Format = key("mae", "format of the model that is written")
    num_channels: int | None = model_key(None, "new number of image channels, such as 1 or 3", "unchanged")

    def check(self) -> None:
        super().check()
        self.check_least(num_channels=1)


@dataclass
class ExportRecipe(Recipe):
    """Keys of `hf-mae export SRC DST`."""

    model: str = positional_key("folder or Hub id of a model, or any other source of hf-mae convert", metavar="SRC")
    output_dir: str = positional_key("folder to write; must not exist, or be empty", metavar="DST")
    to: ExportFormat = key("onnx", "kind of graph to write")


@dataclass
class PushRecipe(ModelInput):
    """Keys of `hf-mae push RUN`."""

    model: str = positional_key("folder of the model; it is only read", metavar="RUN")
    repo_id: str = key(help_text="repository on the Hub; created if it doesn't exist", metavar="USER/NAME")
    private: bool = key(False, "create the repository as private, and refuse one that is public")
    revision: str | None = key(None, "branch; created if it doesn't exist", "main", metavar="BRANCH")


@dataclass
class CardRecipe(ModelInput):
    """Keys of `hf-mae card RUN OUT`."""

    model: str = positional_key("folder of the model; it is only read", metavar="RUN")
    output: str = positional_key("file NAME.md to write, with its picture NAME.png beside it", metavar="OUT")

    def check(self) -> None:
        self.check_ending("output", ".md")


@dataclass
class ReportRecipe(Recipe):
    """Keys of `hf-mae report RUN [RUN ...]`."""

    runs: list[str] = positional_key("folders of the runs to report", metavar="RUN")
    output: str | None = key(None, "file for the HTML page", "report.html of the first run", metavar="FILE")


@dataclass
class DemoRecipe(ModelInput):
    """Keys of `hf-mae demo`."""

    gallery: str | None = data_key(None, "data set that the page searches for the nearest images", "none")
    gallery_split: str = data_key("train", "split of the gallery to read", metavar="NAME")
    max_gallery: int = data_key(1000, "maximum number of images in the gallery, evenly spaced")
    host: str = key("127.0.0.1", "address to listen on; 0.0.0.0 lets other machines connect", metavar="ADDRESS")
    port: int = key(7860, "port to listen on; 0 for any free port")
    output_dir: str | None = key(
        None, "folder of a Space to write instead of starting the page", "start the page", metavar="DIR"
    )

    def check(self) -> None:
        self.check_least(max_gallery=1)
        self.check_range("port", high=65_535)


@dataclass
class ReconstructRecipe(ModelInput):
    """Keys of `hf-mae reconstruct IMAGE [IMAGE ...]`."""

    images: list[str] = positional_key("image files, folders of them, or data sets", group="data", metavar="IMAGE")
    output: str = output_key("reconstruction.png", "file for the picture, .png, .webp or .jpg", metavar="FILE")
    mask_ratios: list[float] | None = masking_key(
        None, "fractions of patches to hide, one after the other", "the model's own"
    )
    seed: int = masking_key(0, "random seed of the masks")
    statistics: Statistics = output_key(
        "visible", "how hidden patches get mean and contrast: from the visible patches, their true ones, or not at all"
    )
    max_images: int = data_key(8, "maximum number of images of each folder or data set, evenly spaced")
    split: str = data_key("train", "split of a data set", metavar="NAME")
    image_size: ImageSize | None = model_key(None, "size of the crop in pixels, such as 224 or 208x320", "the model's")
    bands: list[int] | None = output_key(
        None, "one channel to show as grey, or three as red, green and blue, from 0", "the first"
    )
    cell: int = output_key(128, "pixels of an image's longer side in the picture")

    def check(self) -> None:
        self.check_ending("output", *PICTURE_FILES)
        self.check_least(max_images=1)
        self.check_range("cell", low=16, high=2048)
        self.check_seed()

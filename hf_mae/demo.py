"""`hf-mae demo`: a page to try a pretrained model on your own photo, and the same page as a Space."""

import importlib.metadata
import shutil
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from gradio.themes import Default
from packaging.requirements import Requirement
from PIL import Image, ImageOps

from .data.decode import BadImage
from .data.loader import EvaluationSet, each_batch, make_loader
from .data.order import Rows
from .data.sources import open_source
from .errors import DataError, UserError
from .evaluation.knn import nearest_rows
from .files import check_free, new_folder, write_text
from .keys.publishing_keys import DemoRecipe, Statistics
from .run_folder import CONFIG_NAME, PROCESSOR_NAME
from .visualize.command import Reconstructor
from .visualize.grid import FOOTERS, GRAY, shown_bands, to_pictures
from .visualize.reconstruction import masked_scores, reconstruct, seeded_noise

SIDE, THUMBNAIL, NEIGHBOURS = 384, 96, 8
PICTURES = {
    "original": "The cropped photo",
    "masked": "What the model sees (click a patch)",
    "predicted": "What it predicts for the rest",
    "pasted": "Visible and predicted patches",
    "attention": "Attention of the patch you clicked",
}
HIDE, ATTEND = "hides or shows it", "shows what it attends to"


@dataclass(frozen=True)
class Session:
    """One visitor's photo and mask."""

    pixel_values: torch.Tensor  # (1, C, H, W) the photo
    hidden: torch.Tensor  # (N,) True where a patch is hidden
    seed: int = 0  # of the mask


class Demo:
    """The functions of the page, without the page itself.

    Args:
        model: folder or Hub id of the model.
        gallery: images for the nearest neighbours; no neighbours are shown when omitted.

    Raises:
        UserError: if the model can't be loaded, or no image of the gallery can be decoded.
    """

    def __init__(self, model: str, gallery: Rows | None = None):
        self.name, self.reconstructor = model, Reconstructor(model)
        self.model = self.reconstructor.model
        self.model.set_attn_implementation("eager")  # the only one that returns attention weights
        self.grid_size = self.model.config.grid_size
        self.features, self.thumbnails = self._read_gallery(gallery) if gallery else (None, [])

    @torch.no_grad()
    def _read_gallery(self, rows: Rows) -> tuple[torch.Tensor, list[Image.Image]]:
        features, thumbnails = [], []
        loader = make_loader(EvaluationSet(rows, self.reconstructor.spec, 64), num_workers=0)
        with closing(each_batch(loader)) as batches:
            for batch in batches:
                if batch.keys:
                    pixel_values = self.reconstructor.normalize(batch.images.to(self.reconstructor.device))
                    features.append(self.model.mae(pixel_values).pooler_output.cpu())
                    thumbnails += self._pictures(pixel_values, pixel_values, THUMBNAIL)
        if not features:
            raise DataError(f"none of the images of {rows.name} can be decoded; give another --gallery")
        return torch.cat(features), thumbnails

    def _pictures(self, images: torch.Tensor, like: torch.Tensor, side: int) -> list[Image.Image]:
        return to_pictures(shown_bands(images, like, self.reconstructor.mean, self.reconstructor.std), side)

    def photo(self, session: Session) -> Image.Image:
        """The photo as the page shows it."""
        return self._pictures(session.pixel_values, session.pixel_values, SIDE)[0]

    def open(self, file: str | Path, ratio: float) -> Session:
        """Open a photo and hide this fraction of its patches; raises BadImage if it can't be decoded."""
        pixel_values = self.reconstructor.pixel_values([Path(file).read_bytes()])
        return self.hide(Session(pixel_values, torch.zeros(0, dtype=torch.bool)), ratio)

    def hide(self, session: Session, ratio: float) -> Session:
        """Hide this fraction of the patches, with the session's seed; at least one is hidden, and one stays visible."""
        count = self.grid_size[0] * self.grid_size[1]
        keep = min(max(1, int(count * (1 - ratio))), count - 1)
        order = seeded_noise(session.seed, 1, count)[0].argsort()
        hidden = torch.ones(count, dtype=torch.bool)
        hidden[order[:keep]] = False
        return replace(session, hidden=hidden)

    def patch_at(self, x: float, y: float, width: int, height: int) -> int:
        """The number of the patch at the pixel (x, y) of a picture of this size."""
        h, w = self.grid_size
        return min(int(y * h / height), h - 1) * w + min(int(x * w / width), w - 1)

    def toggle(self, session: Session, patch: int) -> Session:
        """Hide a visible patch, or show a hidden one; at least one of each remains."""
        hidden = session.hidden.clone()
        hidden[patch] = ~hidden[patch]
        return replace(session, hidden=hidden) if hidden.any() and not hidden.all() else session

    def draw(self, session: Session, statistics: Statistics) -> tuple[list[Image.Image], str]:
        """Photo, masked photo, predictions, predictions with the visible patches; and the caption."""
        mask = session.hidden.float()[None].to(self.reconstructor.device)
        result = reconstruct(self.model, session.pixel_values, mask=mask, statistics=statistics)
        photo, (pasted,) = self.photo(session), self._pictures(result.pasted, result.pixel_values, SIDE)
        removed = to_pictures(result.removed.float(), SIDE)[0].convert("1", dither=Image.Dither.NONE)
        gray = Image.new("RGB", photo.size, (round(255 * GRAY),) * 3)
        psnr, ssim = masked_scores(result, self.reconstructor.mean, self.reconstructor.std)
        caption = [
            f"{int(session.hidden.sum())} of {len(session.hidden)} patches hidden ({result.mask_ratio:.0%})",
            f"hidden part: {psnr.item():.1f} dB, SSIM {ssim.item():.2f}",
            FOOTERS.get(result.statistics, ""),
        ]
        pictures = [photo, Image.composite(gray, photo, removed), Image.composite(pasted, gray, removed), pasted]
        return pictures, "  \n".join(line for line in caption if line)

    @torch.no_grad()
    def attention(self, session: Session, patch: int) -> Image.Image:
        """Heat map of a patch's attention in the last layer (mean over heads, nothing masked); the patch is framed."""
        attentions = self.model.mae(session.pixel_values, output_attentions=True).attentions
        weights = attentions[-1][0].mean(dim=0)[1 + patch, 1:].view(1, 1, *self.grid_size)
        photo = self.photo(session)
        heat = to_pictures(weights / weights.max(), max(photo.size))[0].convert("L").resize(photo.size)
        picture = Image.composite(Image.new("RGB", photo.size, (255, 60, 0)), photo.convert("L").convert("RGB"), heat)
        h, w = self.grid_size
        height, width, (row, column) = photo.height / h, photo.width / w, divmod(patch, w)
        left, top = round(column * width), round(row * height)
        right, bottom = round((column + 1) * width), round((row + 1) * height)
        inner = photo.crop((left + 2, top + 2, right - 2, bottom - 2))
        picture.paste(ImageOps.expand(inner, 2, (0, 120, 255)), (left, top))
        return picture

    @torch.no_grad()
    def neighbours(self, session: Session) -> list[tuple[Image.Image, str]]:
        """The gallery images with the most similar features to the whole photo's, with their cosine similarity."""
        assert self.features is not None
        query = self.model.mae(session.pixel_values).pooler_output.cpu()
        similarity, rows = nearest_rows(query, self.features, min(NEIGHBOURS, len(self.features)))
        pairs = zip(similarity[0].tolist(), rows[0].tolist(), strict=True)
        return [(self.thumbnails[row], f"{cosine:.2f}") for cosine, row in pairs]


# ------------------------------------------------------------------------------------------ the page


def build(demo: Demo) -> gr.Blocks:
    """Build the page."""

    def show(session: Session | None, statistics: Statistics) -> list[Any]:
        if session is None:
            return [None] * 5 + [""]
        pictures, caption = demo.draw(session, statistics)
        return [session, *pictures, caption]

    def opened(file: str | None, ratio: float, statistics: Statistics) -> list[Any]:
        if file is None:
            return [*show(None, statistics), None, []]
        try:
            session = demo.open(file, ratio)
        except BadImage as error:
            raise gr.Error(f"This file can't be shown: {error}. Choose another one.", duration=None) from error
        return [*show(session, statistics), None, demo.neighbours(session) if demo.features is not None else []]

    def remasked(session: Session | None, ratio: float, statistics: Statistics) -> list[Any]:
        return show(session and demo.hide(session, ratio), statistics)

    def redrawn(session: Session | None, ratio: float, statistics: Statistics) -> list[Any]:
        return remasked(session and replace(session, seed=session.seed + 1), ratio, statistics)

    def clicked(session: Session | None, click: str, statistics: Statistics, event: gr.SelectData) -> list[Any]:
        if session is None:
            return [*show(None, statistics), None]
        x, y = event.index
        patch = demo.patch_at(x, y, *demo.photo(session).size)
        if click == ATTEND:
            return [*[gr.skip()] * len(pictures), demo.attention(session, patch)]
        return [*show(demo.toggle(session, patch), statistics), gr.skip()]

    with gr.Blocks(title="Masked autoencoder", analytics_enabled=False) as page:
        name = Path(demo.name).name
        gr.Markdown(f"# Masked autoencoder\n`{name}` predicts the hidden patches of a photo from the visible ones.")
        session = gr.State()
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                file = gr.File(label="Photo", type="filepath", elem_id="photo")
                ratio = gr.Slider(0.05, 0.95, 0.75, step=0.05, label="Hidden part", elem_id="ratio")
                again = gr.Button("Hide other patches", elem_id="again")
                click = gr.Radio([HIDE, ATTEND], value=HIDE, label="A click on a patch", elem_id="click")
                statistics = gr.Radio(
                    [("visible patches around", "visible"), ("the original (uses ground truth)", "true"),
                     ("nowhere (raw)", "raw")], value="visible",
                    label="Mean and contrast of hidden patches from", visible=demo.model.config.norm_pix_loss,
                )  # fmt: skip
                caption = gr.Markdown(elem_id="said")
            with gr.Column(scale=3, min_width=320), gr.Row():
                shown = [
                    gr.Image(label=label, interactive=False, min_width=240, elem_id=name, buttons=["fullscreen"])
                    for name, label in PICTURES.items()
                ]
        neighbours = gr.Gallery(
            label="Nearest in the gallery", columns=NEIGHBOURS, height=160, visible=demo.features is not None,
            elem_id="neighbours",
        )  # fmt: skip
        pictures, attention = [session, *shown[:4], caption], shown[4]
        file.change(opened, [file, ratio, statistics], [*pictures, attention, neighbours], show_progress="minimal")
        # While the slider is dragged, always draw its latest position next.
        chosen = [session, ratio, statistics]
        ratio.change(remasked, chosen, pictures, show_progress="hidden", trigger_mode="always_last")
        again.click(redrawn, chosen, pictures, show_progress="minimal")
        statistics.change(show, [session, statistics], pictures, show_progress="minimal")
        shown[1].select(clicked, [session, click, statistics], [*pictures, attention], show_progress="minimal")
    return page


def launch(page: gr.Blocks, **options: Any) -> Any:
    """Serve the page, without fonts and analytics from other sites."""
    theme = Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    return page.launch(theme=theme, max_file_size="64mb", footer_links=[], **options)


def run_demo(recipe: DemoRecipe) -> str | None:
    """Serve the page until it is stopped, or write a Space and return its folder.

    Raises:
        UserError: if the model can't be loaded, or the port or the folder can't be used.
    """
    if recipe.output_dir:
        return export_space(recipe)
    gallery = None
    if recipe.gallery:
        gallery = Rows(open_source(recipe.gallery, split=recipe.gallery_split), max_samples=recipe.max_gallery)
    page = build(Demo(recipe.model, gallery))
    try:
        launch(page, server_name=recipe.host, server_port=recipe.port or None)
    except OSError as error:
        raise UserError(f"port {recipe.port} of {recipe.host} can't be used; give another --port, or 0") from error
    return None


# ------------------------------------------------------------------------------------------ the Space

APP = '''"""A page to try a masked autoencoder on your own photo."""

from hf_mae.demo import Demo, build, launch

launch(build(Demo({model!r})))
'''
README = """---
title: Masked autoencoder
sdk: gradio
sdk_version: {gradio}
app_file: app.py
license: apache-2.0
---

Hide part of a photo and see how the masked autoencoder `{name}` fills it in. Made by `hf-mae demo --output_dir`.
"""


def space_requirements() -> list[str]:
    """The requirements of the package with its extra [train], in pip's format."""
    needed = [Requirement(line) for line in importlib.metadata.requires("hf-mae") or []]
    needed = [one for one in needed if one.marker is None or one.marker.evaluate({"extra": "train"})]
    return [str(one).split(";")[0].strip() for one in needed]


def export_space(recipe: DemoRecipe) -> str:
    """Write the files of a Space (the page, this package, and the model if it is a folder); returns its folder."""
    target, model = Path(str(recipe.output_dir)), Path(recipe.model)
    check_free(target, "name another folder with --output_dir")
    Reconstructor(recipe.model)  # raises if it can't be loaded
    name = model.resolve().name if model.is_dir() else recipe.model
    with new_folder(target, "--output_dir") as folder:
        shutil.copytree(Path(__file__).parent, folder / "hf_mae", ignore=shutil.ignore_patterns("__pycache__"))
        if model.is_dir():
            (folder / "model").mkdir()
            for file in (model / CONFIG_NAME, model / PROCESSOR_NAME, *model.glob("model*.safetensors*")):
                shutil.copy(file, folder / "model")
        write_text(folder / "app.py", APP.format(model="model" if model.is_dir() else recipe.model))
        write_text(folder / "README.md", README.format(gradio=gr.__version__, name=name))
        write_text(folder / "requirements.txt", "\n".join(space_requirements()) + "\n")
    return str(target)

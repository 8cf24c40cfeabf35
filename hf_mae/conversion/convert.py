"""`hf-mae convert`: weights of the original, of transformers and of timm to ours, and back.

Read the source and compare our model with the source's own implementation. Change the image size or the channels on
request. Write the target into a temporary folder, read it back with the target's own implementation and compare again.
Only then does the folder get its name.
"""

from functools import partial
from pathlib import Path
from typing import Any

from transformers import __version__ as transformers_version

from ..data.transform import move_crop
from ..errors import UserError
from ..files import check_free, new_folder, write_json
from ..keys import height_width
from ..keys.publishing_keys import ConvertRecipe
from ..run_folder import RunFolder
from .compare import compare_runs, run_ours
from .processors import adapt_channels
from .read import NON_COMMERCIAL, Source, open_source
from .write import WRITERS, describe_use, part_for

NOTE = (
    "The MAE authors published their weights under CC-BY-NC 4.0: no commercial use, and you must name the authors. "
    "This licence covers these weights and all weights made from them. It doesn't apply if you trained the source "
    "yourself."
)


def convert(recipe: ConvertRecipe) -> dict[str, Any]:
    """Convert a model, or write nothing.

    Returns:
        The content of `DST/conversion.json`, and under `use` the line of Python that loads the result.

    Raises:
        UserError: if the source can't be read, the target format can't hold it, DST isn't empty, or outputs differ.
    """
    check_free(Path(recipe.output_dir))
    source = open_source(recipe.model, recipe)
    config, ours = source.model.config, partial(run_ours, source.model)
    differences = {"read": compare_runs(source.run, ours, config, f"{recipe.model} and hf_mae")}
    changes = _adapt(source, recipe)
    model, more = part_for(source.model, recipe.to)
    if source.processor.nodata is not None and recipe.to in ("vit_mae", "vit", "timm"):
        more.append(f"nodata {source.processor.nodata:g} -> none: {recipe.to} doesn't handle missing pixels")
    with new_folder(Path(recipe.output_dir), "--output_dir") as folder:
        written = WRITERS[recipe.to](model, source.processor, folder)
        pair = f"hf_mae and {recipe.to}"
        differences["written"] = compare_runs(partial(run_ours, model), written, config, pair)
        record = _record(source, recipe, differences, changes + more)
        write_json(RunFolder(folder).conversion_file, record)
    return record | {"use": describe_use(recipe.to, model, recipe.output_dir)}


def _adapt(source: Source, recipe: ConvertRecipe) -> list[str]:
    """Change image size and channels in place, if the recipe asks for it; returns the changes in words."""
    config, changes = source.model.config, []
    old, channels = config.image_height_width, config.num_channels
    height, width = height_width(config.image_size if recipe.image_size is None else recipe.image_size)
    try:
        source.model.resize_input(height if height == width else [height, width], recipe.num_channels)
    except ValueError as error:
        raise UserError(str(error)) from error
    if (height, width) != old:
        move_crop(source.processor, (height, width))
        changes.append(f"image_size {old[0]}x{old[1]} -> {height}x{width}, positions: {config.position_resize}")
    if config.num_channels != channels:
        adapt_channels(source.processor, config.num_channels)
        rule = "sum" if config.num_channels == 1 else "mean, scaled to the same sum"
        changes.append(f"num_channels {channels} -> {config.num_channels}, filters: {rule}")
    return changes


def _record(source: Source, recipe: ConvertRecipe, differences: dict[str, float], changes: list[str]) -> dict[str, Any]:
    from .. import __version__

    return {
        "source": recipe.model,
        "from": source.format,
        "to": recipe.to,
        "class": type(source.model).__name__,
        "revision": source.revision,
        "sha256": source.sha256,
        "licence": source.licence,
        "licence_note": NOTE if source.licence == NON_COMMERCIAL else None,
        "changes": changes,
        "largest_difference": differences,
        "hf_mae": __version__,
        "transformers": transformers_version,
        "before": source.before,
    }


def describe_conversion(record: dict[str, Any], dest: str) -> str:
    """The lines that the command prints."""
    largest = max(record["largest_difference"].values())
    lines = [
        f"{record['class']} from {record['from']} to {record['to']}: outputs differ by {largest:.1g} at most",
        *(f"changed  {change}" for change in record["changes"]),
        f"licence  {record['licence']}" if record["licence"] else "",
        f"         {record['licence_note']}" if record["licence_note"] else "",
        f"written  {dest} (conversion.json records the source)",
        f"load it  {record['use']}",
    ]
    return "\n".join(filter(None, lines))

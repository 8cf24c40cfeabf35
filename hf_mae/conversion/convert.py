"""`hf-mae convert`: weights of the original, of transformers and of timm to ours, and back.

Read the source, check ours against the source's own implementation, adapt it on request, write the target beside DEST,
read it back by the target's own implementation, check again, and only then give it its name.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError
from transformers import __version__ as transformers_version

from ..errors import UserError
from ..files import check_free, new_folder, write_json
from ..run_folder import RunFolder
from .compare import compare_runs, run_ours
from .processors import SETTINGS, adapt_channels, evaluation_processor
from .read import NON_COMMERCIAL, Numbers, Source, open_source
from .write import WRITERS, describe_use, part_for

NOTE = (
    "The MAE authors published their weights under CC-BY-NC 4.0: no commercial use, name the authors. It holds for "
    "these and for what is derived from them, unless the source is your own training in the original's format."
)


@dataclass
class ConvertOptions(Numbers):
    """The command line of `hf-mae convert`; see `convert_parser`."""

    source: str = ""
    dest: str = ""
    to: str = "mae"
    num_channels: int | None = None


class OneLineParser(argparse.ArgumentParser):
    """Raises what argparse would print with a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def parse_options(arguments: list[str]) -> ConvertOptions:
    """Read the command line.

    Raises:
        UserError: for an unknown flag or a bad value.
    """
    parser = OneLineParser(prog="hf-mae convert", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("source", help=".pth or .safetensors file, folder, or Hub id")
    parser.add_argument("dest", help="folder to write; must not exist, or be empty")
    parser.add_argument("--to", choices=list(WRITERS), default="mae", help="format to write (default: %(default)s)")
    parser.add_argument("--image_size", type=int, nargs="+", help="move to another size: pixels, or height and width")
    parser.add_argument("--num_channels", type=int, help="move to another number of channels")
    parser.add_argument("--num_attention_heads", type=int, help="of a file's encoder, where no table knows its width")
    parser.add_argument("--decoder_num_attention_heads", type=int, help="of a file's decoder")
    parser.add_argument("--norm_pix_loss", type=_boolean, help="true | false: a file's decoder predicts such patches")
    options = ConvertOptions(**vars(parser.parse_args(arguments)))
    if options.image_size and len(options.image_size) > 2:
        parser.error(f"--image_size {options.image_size} has more than a height and a width")
    return options


def _boolean(word: str) -> bool:
    if word.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{word} is neither true nor false")
    return word.lower() == "true"


def convert(options: ConvertOptions) -> dict[str, Any]:
    """Convert a model, or write nothing.

    Returns:
        What is written to `DEST/conversion.json`, and under `use` the line that loads the result.

    Raises:
        UserError: if the source can't be read or expressed, DEST isn't empty, or outputs differ.
    """
    check_free(Path(options.dest))
    source = open_source(options.source, options)
    config, ours = source.model.config, run_ours(source.model)
    differences = {"read": compare_runs(source.run, ours, config, f"{options.source} and hf_mae")}
    changes = _adapt(source, options)
    model, more = part_for(source.model, options.to)
    try:
        with new_folder(Path(options.dest)) as folder:
            written = WRITERS[options.to](model, source.processor, folder)
            differences["written"] = compare_runs(run_ours(model), written, config, f"hf_mae and {options.to}")
            record = _record(source, options, differences, changes + more)
            write_json(record, RunFolder(folder).conversion_file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{options.dest} can't be written: {error}; name another folder, or make room") from error
    return record | {"use": describe_use(options.to, model, options.dest)}


def _adapt(source: Source, options: ConvertOptions) -> list[str]:
    """Another image size or channel count, in place; what was done, in words."""
    config, changes = source.model.config, []
    size = tuple(options.image_size * 2)[:2] if options.image_size else config.image_height_width
    old, channels = config.image_height_width, config.num_channels
    try:
        source.model.resize_input(list(size) if size[0] != size[1] else size[0], options.num_channels)
    except ValueError as error:
        raise UserError(str(error)) from error
    if size != old:
        settings = {key: getattr(source.processor, key) for key in SETTINGS}
        source.processor = evaluation_processor(config, **settings)
        changes.append(f"image_size {old[0]}x{old[1]} -> {size[0]}x{size[1]}, positions: {config.position_resize}")
    if config.num_channels != channels:
        adapt_channels(source.processor, config.num_channels)
        rule = "sum" if config.num_channels == 1 else "mean, scaled to the same sum"
        changes.append(f"num_channels {channels} -> {config.num_channels}, filters: {rule}")
    return changes


def _record(
    source: Source, options: ConvertOptions, differences: dict[str, float], changes: list[str]
) -> dict[str, Any]:
    from .. import __version__

    return {
        "source": options.source,
        "from": source.format,
        "to": options.to,
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
    """What the command prints of it."""
    largest = max(record["largest_difference"].values())
    lines = [
        f"{record['class']} from {record['from']} to {record['to']}: outputs differ by {largest:.1g} at most",
        *(f"changed  {change}" for change in record["changes"]),
        *([f"licence  {record['licence']}"] if record["licence"] else []),
        *([f"         {record['licence_note']}"] if record["licence_note"] else []),
        f"written  {dest} (conversion.json says from what)",
        f"load it  {record['use']}",
    ]
    return "\n".join(lines)

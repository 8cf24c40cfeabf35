"""The command line: `hf-mae COMMAND`. Whatever takes long to import is imported inside the commands."""

import sys
from collections.abc import Callable
from typing import Any

from .errors import UserError

COMMANDS = {
    "pretrain": "train a masked autoencoder, from scratch or from a checkpoint",
    "finetune": "train a classifier on a pretrained model, with labels",
    "evaluate": "evaluate knn | linear-probe: what frozen features are worth; evaluate classification",
    "embed": "write frozen features of any data to a parquet or numpy file",
    "reconstruct": "draw original, masked and reconstructed images of a pretrained model",
    "report": "write one HTML file of a run, or of several side by side",
    "demo": "start a page to try a pretrained model on one's own photos, or write it as a Space",
    "convert": "weights of the original (.pth), of transformers' vit_mae and of timm to ours, and back",
    "export": "an encoder or a classifier as an ONNX file, or as one of torch.export",
    "push": "publish a model on the Hugging Face Hub, with the code that loads it, and check what comes back",
    "card": "write a model's card to a file, as push would publish it",
    "prepare": "re-encode a data set once, at the size that training needs, to sharded parquet",
    "stats": "print a data set's per-channel mean and standard deviation",
}

# Import names of the extras, without which the package loads and runs models all the same.
EXTRAS = {
    **dict.fromkeys(
        ("accelerate", "datasets", "evaluate", "fsspec", "pyarrow", "sklearn", "timm", "tqdm", "yaml"), "train"
    ),
    **dict.fromkeys(("onnx", "onnxruntime", "onnxscript"), "export"),
    "matplotlib": "viz",
    "gradio": "demo",
}
# What to do after an interruption.
REPEATS = {
    **dict.fromkeys(("pretrain", "finetune"), "go on with --resume auto"),
    "push": "the same command repeats the upload",
}
USAGE = """usage: hf-mae COMMAND [--key value ...]

Masked autoencoders (arXiv:2111.06377) as Hugging Face Transformers models.

{commands}

hf-mae COMMAND --help lists the keys of a command. A first run, on a data set that comes along:
  hf-mae pretrain --recipe quickstart
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; 0 if it went well, 2 for a mistake that its one-line message names, 130 if interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE.format(commands="\n".join(f"  {name:11} {text}" for name, text in COMMANDS.items())))
        return 0
    name, rest = arguments[0], arguments[1:]
    if name == "--version":
        from . import __version__

        print(__version__)
        return 0
    runners: dict[str, Callable[[list[str]], int]] = {
        "pretrain": _pretrain,
        "finetune": _finetune,
        "evaluate": _evaluate,
        "embed": _embed,
        "reconstruct": _reconstruct,
        "report": _report,
        "demo": _demo,
        "convert": _convert,
        "export": _export,
        "push": _push,
        "card": _card,
        "prepare": _prepare,
        "stats": _stats,
    }
    if name not in runners:
        import difflib

        nearest = difflib.get_close_matches(name, runners, n=1)
        hint = f"did you mean '{nearest[0]}'?" if nearest else f"there are {', '.join(runners)}"
        return _fail(f"unknown command '{name}'; {hint}")
    try:
        return _run(runners[name], rest)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in EXTRAS:
            raise
        return _fail(f"hf-mae {name} needs the package {package}: pip install 'hf-mae[{EXTRAS[package]}]'")
    except KeyboardInterrupt:
        _fail(f"interrupted; {REPEATS.get(name, 'the same command starts anew')}")
        return 130


def _run(runner: Callable[[list[str]], int], arguments: list[str]) -> int:
    from transformers.utils import logging as transformers_logging

    from . import register

    register()
    # One bar, ours: not another one for each file that a library writes.
    transformers_logging.disable_progress_bar()
    try:
        return runner(arguments)
    except UserError as error:
        return _fail(str(error))


def _fail(message: str) -> int:
    sys.stderr.write(f"hf-mae: error: {message}\n")  # in one piece, where several processes write at once
    return 2


def _pretrain(arguments: list[str]) -> int:
    from .training.pretrain import pretrain
    from .training.recipe import load_pretrain_recipe

    summary = pretrain(load_pretrain_recipe(arguments))
    if summary["picture"]:  # only the main process has one
        first, last = (
            "not finite" if loss is None else f"{loss:.4f}"
            for loss in (summary["first_eval_loss"], summary["last_eval_loss"])
        )
        shown = {"knn_top1": "kNN {:.1f} %", "linear_top1": "linear {:.1f} %", "rankme": "RankMe {:.1f}"}
        figures = [text.format(summary["quality"][key]) for key, text in shown.items() if key in summary["quality"]]
        quality = f"features {', '.join(figures)}\n" if figures else ""
        print(
            f"evaluation loss {first} before step 1, {last} after step {summary['steps']}\n{quality}"
            f"model    {summary['model']}\n"
            f"picture  {summary['picture']}\n"
            f"load it  import hf_mae; from transformers import AutoModel; "
            f"model = AutoModel.from_pretrained({summary['model']!r})"
        )
    return 0


def _finetune(arguments: list[str]) -> int:
    from .training.finetune import finetune
    from .training.finetune_recipe import load_finetune_recipe

    recipe = load_finetune_recipe(arguments)
    result, folder = finetune(recipe), recipe.output_dir
    if result:  # only the main process has one
        bad = result["data"]["bad_samples"]
        figures = ", ".join(f"{name} {value:.4g}" for name, value in result["figures"].items())
        print(
            f"{figures}, on {result['data']['eval_images']:,} images\n"
            + (f"{bad} images could not be decoded: {folder}/bad_samples.jsonl\n" if bad else "")
            + f"model    {folder}\n"
            f"figures  {folder}/results.json\n"
            f"use it   import hf_mae; from transformers import pipeline; "
            f"pipeline('image-classification', {folder!r})(image)"
        )
    return 0


def _evaluate(arguments: list[str]) -> int:
    from accelerate import PartialState

    from .evaluation.classification import ClassificationRecipe, evaluate_classification
    from .evaluation.commands import KnnRecipe, LinearProbeRecipe, evaluate_knn, evaluate_linear_probe
    from .evaluation.results import describe_result
    from .training.recipe import parse_dataclass

    protocols: dict[str, tuple[Any, Any, str | None]] = {
        "knn": (KnnRecipe, evaluate_knn, None),
        "linear-probe": (LinearProbeRecipe, evaluate_linear_probe, "linear_probe_"),
        "classification": (ClassificationRecipe, evaluate_classification, None),
    }
    if not arguments or arguments[0] not in protocols:
        raise UserError(f"evaluate what? hf-mae evaluate {' | '.join(protocols)} --model DIR --dataset DATA")
    keys, evaluate, recipes = protocols[arguments[0]]
    recipe = parse_dataclass(keys, arguments[1:], f"hf-mae evaluate {arguments[0]}", recipes)
    result = evaluate(recipe)
    PartialState().destroy_process_group()
    if result:  # only the main process has one
        print(describe_result(result))
        print(f"added to {recipe.results_file}" if recipe.results_file else "written nowhere; --results FILE keeps it")
    return 0


def _embed(arguments: list[str]) -> int:
    from .evaluation.embed import EmbedRecipe, embed
    from .training.recipe import parse_dataclass

    written = embed(parse_dataclass(EmbedRecipe, arguments, "hf-mae embed"))
    shape = " x ".join(map(str, written["width"]))
    print(f"{written['images']:,} images, {shape} features each: {written['path']}")
    return 0


def _reconstruct(arguments: list[str]) -> int:
    from .training.recipe import parse_dataclass
    from .visualize.command import ReconstructRecipe, reconstruct_files

    drawn = reconstruct_files(parse_dataclass(ReconstructRecipe, arguments, "hf-mae reconstruct"))
    for key, reason in drawn["bad"]:
        print(f"left out {key}: {reason}")
    for score in drawn["scores"]:
        print(f"masked {score['mask_ratio']:.0%}: {score['psnr']:.2f} dB, SSIM {score['ssim']:.3f} of the hidden part")
    print(f"picture  {drawn['path']}")
    return 0


def _report(arguments: list[str]) -> int:
    from .report import ReportRecipe, write_report
    from .training.recipe import parse_dataclass

    folders_first = bool(arguments) and not arguments[0].startswith("-")
    recipe = parse_dataclass(ReportRecipe, ["--runs", *arguments] if folders_first else arguments, "hf-mae report")
    out = recipe.out or f"{recipe.runs[0]}/report.html"
    write_report(recipe.runs, out)
    print(f"report   {out}")
    return 0


def _demo(arguments: list[str]) -> int:
    from .demo import DemoRecipe, run_demo
    from .training.recipe import parse_dataclass

    if folder := run_demo(parse_dataclass(DemoRecipe, arguments, "hf-mae demo")):
        print(f"space    {folder}\npublish  hf upload --repo-type space USER/NAME {folder}")
    return 0


def _convert(arguments: list[str]) -> int:
    from .conversion.convert import convert, describe_conversion, parse_options

    options = parse_options(arguments)
    print(describe_conversion(convert(options), options.dest))
    return 0


def _export(arguments: list[str]) -> int:
    from .conversion.export import describe_export, export, parse_options

    print(describe_export(export(parse_options(arguments))))
    return 0


def _push(arguments: list[str]) -> int:
    from dataclasses import asdict

    from .hub.push import PushRecipe, push
    from .training.recipe import parse_dataclass

    published = push(**asdict(parse_dataclass(PushRecipe, _keyed(arguments, "folder"), "hf-mae push")))
    print(
        f"published {published['url']} at {published['commit']}\n"
        f"loaded from there without this package: largest difference {published['difference']:.3g}"
    )
    return 0


def _card(arguments: list[str]) -> int:
    from .hub.push import CardRecipe, write_card
    from .training.recipe import parse_dataclass

    keys = parse_dataclass(CardRecipe, _keyed(arguments, "folder", "output"), "hf-mae card")
    picture = write_card(keys.folder, keys.output)
    print(f"card     {keys.output}" + (f"\npicture  {picture}" if picture else ""))
    return 0


def _keyed(arguments: list[str], *keys: str) -> list[str]:
    """The first words as flags, where they are none: `push FOLDER` for `push --folder FOLDER`."""
    if not keys or not arguments or arguments[0].startswith("-"):
        return arguments
    return [f"--{keys[0]}", arguments[0], *_keyed(arguments[1:], *keys[1:])]


def _prepare(arguments: list[str]) -> int:
    from .data.prepare import PrepareRecipe, prepare
    from .training.recipe import parse_dataclass

    recipe = parse_dataclass(PrepareRecipe, _keyed(arguments, "source", "dest"), "hf-mae prepare")
    for name, split in prepare(recipe)["splits"].items():
        bad = ", ".join(f"{count} {reason}" for reason, count in split["bad"].items())
        left_out = f"; left out: {bad}" if bad else ""
        print(f"{name}: {split['rows']:,} images in {len(split['shards'])} shards{left_out}")
    print(f"data     {recipe.dest}\nuse it   hf-mae pretrain --dataset {recipe.dest}")
    return 0


def _stats(arguments: list[str]) -> int:
    import json

    from .data.locate import locate
    from .data.order import Rows
    from .data.sources import open_split
    from .data.stats import channel_stats, probe_rows
    from .training.recipe import load_pretrain_recipe

    recipe = load_pretrain_recipe(arguments)
    rows = Rows(open_split(locate(recipe), recipe.split, recipe.streaming))
    num_channels, dtype = probe_rows(rows)
    num_channels = recipe.model_config.get("num_channels", num_channels)
    print(json.dumps(channel_stats(rows, num_channels, dtype, recipe.max_samples or len(rows)), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The command line: `hf-mae COMMAND`. Slow imports wait until a command starts to work."""

import io
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import __version__, register
from .errors import UserError, nearest, short
from .keys import Recipe
from .keys.data_keys import InspectRecipe, PrepareRecipe
from .keys.evaluation_keys import (
    ClassificationRecipe,
    EmbedRecipe,
    KnnRecipe,
    LinearProbeRecipe,
    PredictRecipe,
    ScoreRecipe,
)
from .keys.finetune_keys import FinetuneRecipe
from .keys.publishing_keys import (
    CardRecipe,
    ConvertRecipe,
    DemoRecipe,
    ExportRecipe,
    PushRecipe,
    ReconstructRecipe,
    ReportRecipe,
)
from .keys.run_keys import PretrainRecipe

# Extra of the package -> the modules that need it. Models load and run without any.
EXTRAS = {
    "train": [
        "accelerate",
        "datasets",
        "evaluate",
        "fsspec",
        "jinja2",
        "pyarrow",
        "scipy",
        "sklearn",
        "tifffile",
        "timm",
        "tqdm",
    ],
    "export": ["onnx", "onnxruntime", "onnxscript"],
    "viz": ["matplotlib"],
    "demo": ["gradio"],
}
# What to do after an interruption.
REPEATS = {
    **dict.fromkeys(("pretrain", "finetune"), "continue with --resume auto"),
    "push": "repeat the command to finish the upload",
}
USAGE = """usage: hf-mae COMMAND [--key value ...]

Masked autoencoders (arXiv:2111.06377) as Hugging Face Transformers models.

{commands}

hf-mae COMMAND --help lists the keys of a command.
For a first run, on handwritten digits that need no download:
  hf-mae pretrain --recipe quickstart
"""
EVALUATE_USAGE = """usage: hf-mae evaluate PROTOCOL [--key value ...]

Evaluate a model on a labelled data set.

{commands}

hf-mae evaluate PROTOCOL --help lists the keys of a protocol.
"""
# The examples of a command's help are the lines with its name.
EXAMPLES = """\
hf-mae pretrain --recipe quickstart
hf-mae pretrain --recipe cifar10_vit_tiny --dataset path/to/images --output_dir outputs/mine
torchrun --nproc_per_node 8 -m hf_mae.cli pretrain --recipe vit_base_in1k --resume auto
hf-mae finetune --recipe finetune_quickstart --model outputs/quickstart
hf-mae evaluate knn --model outputs/mine --dataset path/to/images
hf-mae evaluate linear-probe --model outputs/mine --dataset path/to/images
hf-mae evaluate linear-probe --recipe linear_probe_vit_base_in1k --model outputs/base
hf-mae evaluate classification --model outputs/finetune_quickstart --dataset digits
hf-mae predict --model outputs/finetune_quickstart --dataset path/to/images --output labels.csv
hf-mae embed --model outputs/mine --dataset path/to/images --output features.parquet
hf-mae reconstruct photo.jpg path/to/images --model outputs/mine --output picture.png
hf-mae report outputs/mine
hf-mae report outputs/a outputs/b --output compared.html
hf-mae demo --model outputs/mine --gallery path/to/images
hf-mae convert facebook/vit-mae-base outputs/base
hf-mae convert outputs/mine outputs/for_timm --to timm
hf-mae export outputs/mine outputs/mine_onnx --to onnx
hf-mae push outputs/mine --repo_id user/mine --private true
hf-mae card outputs/mine cards/mine.md
hf-mae prepare path/to/images outputs/images_256 --shortest_edge 256 --num_workers 8
hf-mae inspect path/to/images --output outputs/sheet.png
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns 0 for success, 2 for a mistake (named in one line), 130 for an interruption."""
    words = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names may hold bytes that are not text
    try:
        return _answer(words)
    finally:
        _show()


def _show(*texts: str) -> None:
    """Print, and write out what was printed before; a reader that stops early, such as head, isn't an error."""
    try:
        print(*texts, end="\n" if texts else "", flush=True)
    except BrokenPipeError:  # Python would try once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _answer(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        _show(USAGE.format(commands=_list_commands(COMMANDS)))
        return 0
    if words[0] == "--version":
        _show(__version__)
        return 0
    if words[0] == "evaluate" and words[1:2] in (["-h"], ["--help"]):
        _show(EVALUATE_USAGE.format(commands=_list_commands(PROTOCOLS)))
        return 0
    try:
        return _run(*find_command(words))
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        _fail(f"interrupted; {REPEATS.get(words[0], 'repeat the command to start again')}")
        return 130


@dataclass(frozen=True)
class Command:
    """A command: its line of the help, its keys, and the function that runs it."""

    help: str
    keys: type[Recipe]
    run: Callable[[Any], None]  # prints the outcome; slow imports are inside


def find_command(words: list[str]) -> tuple[str, list[str]]:
    """The name of a command in `COMMANDS`, and the words that follow it; a UserError for an unknown name."""
    name, *rest = words
    if name == "evaluate":
        if not rest or rest[0].startswith("-"):
            raise UserError(f"evaluate what? hf-mae evaluate {' | '.join(PROTOCOLS)} --model DIR --dataset DATA")
        if rest[0] not in PROTOCOLS:
            raise UserError(f"unknown protocol '{short(rest[0])}' of evaluate{_hint(rest[0], list(PROTOCOLS))}")
        return f"evaluate {rest[0]}", rest[1:]
    if name not in COMMANDS:
        names = dict.fromkeys(command.split()[0] for command in COMMANDS)
        raise UserError(f"unknown command '{short(name)}'{_hint(name, list(names))}")
    return name, rest


def _hint(word: str, words: list[str]) -> str:
    return nearest(word, words) or f"; choose one of {', '.join(words)}"


def read_keys(name: str, words: list[str]) -> Any:
    """The keys of a command from its words, checked; a UserError for an unknown key, or a value that it can't have."""
    from .commandline import parse, shipped_recipes

    command, recipes = COMMANDS[name], shipped_recipes(name)
    description = f"{command.help[0].upper()}{command.help[1:]}."
    examples = [line for line in EXAMPLES.splitlines() if f" {name} " in line]
    return parse(command.keys, words, f"hf-mae {name}", recipes=recipes, description=description, examples=examples)


def _run(name: str, words: list[str]) -> int:
    try:
        keys = read_keys(name, words)  # before torch is imported, so that a mistake is reported at once
        _prepare_transformers()
        COMMANDS[name].run(keys)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        for extra, packages in EXTRAS.items():
            if package in packages:
                return _fail(f"hf-mae {name} needs the package {package}: pip install 'hf-mae[{extra}]'")
        raise
    return 0


def _prepare_transformers() -> None:
    from transformers.utils import logging as transformers_logging

    register()
    # Show only our progress bar, not one for each file that a library writes.
    transformers_logging.disable_progress_bar()


def _fail(message: str) -> int:
    sys.stderr.write(f"hf-mae: error: {message}\n")  # one write, because several processes may write at once
    return 2


def _list_commands(commands: dict[str, Command]) -> str:
    width = max(map(len, commands))
    return "\n".join(f"  {name:{width}} {command.help}" for name, command in commands.items())


# ------------------------------------------------------------------------------------------ what each command does


def _pretrain(recipe: PretrainRecipe) -> None:
    from .training.pretrain import pretrain

    summary = pretrain(recipe)
    if summary["picture"]:  # only the main process has one
        losses = summary["first_eval_loss"], summary["last_eval_loss"]
        first, last = ("not finite" if loss is None else f"{loss:.4f}" for loss in losses)
        shown = {"knn_top1": "kNN {:.1f} %", "linear_top1": "linear {:.1f} %", "rankme": "RankMe {:.1f}"}
        measured = {key: value for key, value in summary["quality"].items() if value is not None}
        figures = [text.format(measured[key]) for key, text in shown.items() if key in measured]
        quality = f"features {', '.join(figures)}\n" if figures else ""
        print(
            f"evaluation loss {first} before step 1, {last} after step {summary['steps']}\n{quality}"
            f"model    {summary['model']}\n"
            f"picture  {summary['picture']}\n"
            f"load it  import hf_mae; from transformers import AutoModel; "
            f"model = AutoModel.from_pretrained({summary['model']!r})"
        )


def _finetune(recipe: FinetuneRecipe) -> None:
    from .evaluation.results import describe_figures
    from .training.finetune import finetune

    result, folder = finetune(recipe), recipe.output_dir
    if result:  # only the main process has one
        bad = result["data"].get("bad_samples", 0)
        print(
            "\n".join([f"evaluated on {result['data']['eval_images']:,} images", *describe_figures(result), ""])
            + (f"{bad} images could not be decoded: {folder}/bad_samples.jsonl\n" if bad else "")
            + f"model    {folder}\n"
            f"figures  {folder}/results.json\n"
            f"use it   {_describe_use(recipe)}"
        )


def _describe_use(recipe: FinetuneRecipe) -> str:
    """A line of Python that uses a fine-tuned model."""
    folder = recipe.output_dir
    if recipe.problem_type != "regression":
        return f"import hf_mae; from transformers import pipeline; pipeline('image-classification', {folder!r})(image)"
    # The pipeline would turn numbers into the probabilities of classes.
    return (
        "import hf_mae; from transformers import AutoImageProcessor, AutoModelForImageClassification; "
        f"processor = AutoImageProcessor.from_pretrained({folder!r}); "
        f"model = AutoModelForImageClassification.from_pretrained({folder!r}); "
        "model(**processor(image, return_tensors='pt')).logits"
    )


def _knn(recipe: KnnRecipe) -> None:
    from .evaluation.knn import evaluate_knn

    _show_result(recipe, evaluate_knn(recipe))


def _linear_probe(recipe: LinearProbeRecipe) -> None:
    from .evaluation.linear_probe import evaluate_linear_probe

    _show_result(recipe, evaluate_linear_probe(recipe))


def _classification(recipe: ClassificationRecipe) -> None:
    from .evaluation.classification import evaluate_classification

    _show_result(recipe, evaluate_classification(recipe))


def _show_result(recipe: ScoreRecipe, result: dict[str, Any] | None) -> None:
    from accelerate import PartialState

    from .evaluation.results import describe_result

    PartialState().destroy_process_group()
    if result:  # only the main process has one
        print(describe_result(result))
        print(f"added to {recipe.results_file}" if recipe.results_file else "not saved; pass --results FILE to save it")


def _predict(recipe: PredictRecipe) -> None:
    from accelerate import PartialState

    from .evaluation.predictions import predict

    written = predict(recipe)
    PartialState().destroy_process_group()
    if written:  # only the main process has one
        classes = ", ".join(f"{name}: {count:,}" for name, count in [*written["classes"].items()][:20])
        print(f"{written['images']:,} images{f' ({classes})' if classes else ''}: {written['path']}")


def _embed(recipe: EmbedRecipe) -> None:
    from .evaluation.embed import embed

    written = embed(recipe)
    shape = " x ".join(map(str, written["width"]))
    print(f"{written['images']:,} images, {shape} features each: {written['path']}")


def _reconstruct(recipe: ReconstructRecipe) -> None:
    from .visualize.command import reconstruct_files

    drawn = reconstruct_files(recipe)
    for key, reason in drawn["bad"]:
        print(f"left out {key}: {reason}")
    for score in drawn["scores"]:
        print(f"masked {score['mask_ratio']:.0%}: {score['psnr']:.2f} dB, SSIM {score['ssim']:.3f} of the hidden part")
    print(f"picture  {drawn['path']}")


def _report(recipe: ReportRecipe) -> None:
    from .report import write_report

    file = recipe.output or f"{recipe.runs[0]}/report.html"
    write_report(recipe.runs, file)
    print(f"report   {file}")


def _demo(recipe: DemoRecipe) -> None:
    from .demo import run_demo

    if folder := run_demo(recipe):
        print(f"space    {folder}\npublish  hf upload --repo-type space USER/NAME {folder}")


def _convert(recipe: ConvertRecipe) -> None:
    from .conversion.convert import convert, describe_conversion

    print(describe_conversion(convert(recipe), recipe.output_dir))


def _export(recipe: ExportRecipe) -> None:
    from .conversion.export import describe_export, export

    print(describe_export(export(recipe)))


def _push(recipe: PushRecipe) -> None:
    from .hub.push import push

    published = push(recipe.model, recipe.repo_id, recipe.private, recipe.revision)
    print(
        f"published {published['url']} at {published['commit']}\n"
        f"loaded from there without this package: largest difference {published['difference']:.3g}"
    )


def _card(recipe: CardRecipe) -> None:
    from .hub.push import write_card

    picture = write_card(recipe.model, recipe.output)
    print(f"card     {recipe.output}" + (f"\npicture  {picture}" if picture else ""))


def _prepare(recipe: PrepareRecipe) -> None:
    from .data.prepare import prepare

    for name, split in prepare(recipe)["splits"].items():
        bad = ", ".join(f"{count} {reason}" for reason, count in split["bad"].items())
        left_out = f"; left out: {bad}" if bad else ""
        print(f"{name}: {split['rows']:,} images in {len(split['shards'])} shards{left_out}")
    print(f"data     {recipe.output_dir}\nuse it   hf-mae pretrain --dataset {recipe.output_dir}{recipe.nodata_flag}")


def _inspect(recipe: InspectRecipe) -> None:
    from .data.inspect import describe_inspection, inspect
    from .visualize.sheet import write_contact_sheet

    found, tiles = inspect(recipe)
    print(json.dumps(found, indent=1) if recipe.json else describe_inspection(found))
    if recipe.output:
        write_contact_sheet(recipe.output, found, tiles)
        if not recipe.json:
            print(f"picture  {recipe.output}")


COMMANDS: dict[str, Command] = {
    "pretrain": Command("train a masked autoencoder, from scratch or from a checkpoint", PretrainRecipe, _pretrain),
    "finetune": Command("train a classifier on a pretrained model, with labels", FinetuneRecipe, _finetune),
    "evaluate knn": Command("classify by the nearest neighbours among frozen features", KnnRecipe, _knn),
    "evaluate linear-probe": Command("train a linear classifier on frozen features", LinearProbeRecipe, _linear_probe),
    "evaluate classification": Command("score a fine-tuned model", ClassificationRecipe, _classification),
    "predict": Command("write a fine-tuned model's predictions for images without labels", PredictRecipe, _predict),
    "embed": Command("write frozen features of any data to a parquet or numpy file", EmbedRecipe, _embed),
    "reconstruct": Command(
        "draw original, masked and reconstructed images of a pretrained model", ReconstructRecipe, _reconstruct
    ),
    "report": Command("write one HTML file about a run, or about several side by side", ReportRecipe, _report),
    "demo": Command("start a page to try a model on your own photos, or write it as a Space", DemoRecipe, _demo),
    "convert": Command(
        "convert weights to and from the formats of the original, transformers and timm", ConvertRecipe, _convert
    ),
    "export": Command("export an encoder or a classifier to ONNX or torch.export", ExportRecipe, _export),
    "push": Command("publish a model on the Hub with the code that loads it, and check the upload", PushRecipe, _push),
    "card": Command("write a model's card to a file, as push would publish it", CardRecipe, _card),
    "prepare": Command(
        "re-encode images once, at the size that training needs, into parquet shards", PrepareRecipe, _prepare
    ),
    "inspect": Command("show what is in a data set, and what is wrong with it", InspectRecipe, _inspect),
}
PROTOCOLS = {name.split()[1]: command for name, command in COMMANDS.items() if name.startswith("evaluate ")}

if __name__ == "__main__":
    sys.exit(main())

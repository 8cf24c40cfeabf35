"""`hf-mae report`: one self-contained HTML file of a run, or of several side by side; report.html is its template."""

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from .errors import DataError
from .files import as_utf8, write_text, writing
from .run_folder import RunFolder, curve, is_count, limits_of, show_figure, show_limits

# Key of metrics.jsonl -> title of its curve.
CURVES = {
    "loss": "Training loss",
    "eval_loss": "Evaluation loss",
    "top1": "Accuracy, %",
    "knn_top1": "kNN accuracy, %",
    "linear_top1": "Linear accuracy, %",
    "rankme": "RankMe",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "images_per_second": "Images per second",
    "data_wait": "Time spent waiting for data, %",
}
COLOURS = ("#1f6feb", "#d9480f", "#2b8a3e", "#862e9c", "#0b7285", "#a61e4d")
MOST_PICTURES = 12


class Run:
    """What a run's folder records; a DataError if it isn't one."""

    def __init__(self, path: Path):
        folder = RunFolder(path)
        if not folder.metrics_file.is_file():
            raise DataError(f"{path} has no metrics.jsonl; name the folder of a run of hf-mae pretrain or finetune")
        self.name = as_utf8(path.resolve().name)
        self.recipe, self.derived = folder.config()
        self.events, self.results, self.bad = folder.events(), folder.results(), folder.bad_samples()
        self.pictures = folder.pictures()

    def curve(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of a key, by step."""
        return curve(self.events, key)

    @property
    def summary(self) -> dict[str, str]:
        """The number of steps, and the first and last value of each figure."""
        steps, total = max((event["step"] for event in self.events), default=0), self.derived.get("total_steps")
        figures = {"steps": f"{steps:,} of {total:,}" if is_count(total) else f"{steps:,}"}
        for key in ("eval_loss", "knn_top1", "linear_top1", "top1"):
            if values := [value for _, value in self.curve(key)]:
                figures[CURVES[key]] = f"{_number(values[0])} → {_number(values[-1])}"
        if speeds := sorted(value for _, value in self.curve("images_per_second")):
            figures["Images per second, median"] = _number(speeds[len(speeds) // 2])
        return figures

    @property
    def shown_pictures(self) -> list[tuple[int, str]]:
        """(step, base64 of the PNG) of evenly spaced pictures, including the first and the last."""
        last, count = len(self.pictures) - 1, MOST_PICTURES - 1
        chosen = sorted({round(i * last / count) for i in range(count + 1)})
        pictures = [self.pictures[index] for index in chosen]
        return [(step, base64.b64encode(path.read_bytes()).decode()) for step, path in pictures]

    @property
    def bad_by_reason(self) -> list[tuple[str, list[str]]]:
        """(reason, keys) of the images that can't be decoded, the most frequent reason first."""
        keys: dict[str, list[str]] = {}
        for sample in self.bad:
            keys.setdefault(sample["reason"], []).append(sample["key"])
        return sorted(keys.items(), key=lambda item: -len(item[1]))


def write_report(folders: Sequence[str | Path], out: str | Path) -> None:
    """Write one HTML file with curves, pictures, results, recipes and hardware; it needs no other file and no network.

    Raises:
        UserError: if a folder doesn't hold a run, or the file can't be written.
    """
    text = page([Run(Path(folder)) for folder in folders])
    with writing(out, "--output"):
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        write_text(Path(out), text)


def page(runs: Sequence[Run]) -> str:
    """The whole file."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"number": _number, "plain": _plain}
    return environment.get_template("report.html").render(
        title=" and ".join(run.name for run in runs),
        figure=show_figure,
        limits=show_limits,
        limits_of=limits_of,
        runs=[(_colour(index), run) for index, run in enumerate(runs)],
        headings=list(dict.fromkeys(heading for run in runs for heading in run.summary)),
        plots=_plots(runs),
        settings=[
            ("Recipe", _compare([run.recipe for run in runs])),
            ("Run and hardware", _compare([run.derived for run in runs])),
        ],
    )


def _plots(runs: Sequence[Run]) -> list[tuple[str, Markup]]:
    """(title, SVG) of each key that has more than one value in any run."""
    drawn = []
    for key, title in CURVES.items():
        factor = 100 if key == "data_wait" else 1
        lines = [[(step, factor * value) for step, value in run.curve(key)] for run in runs]
        if max(map(len, lines)) > 1:
            drawn.append((title, _plot(title, lines, [run.name for run in runs])))
    return drawn


def _plot(title: str, lines: Sequence[list[tuple[int, float]]], names: Sequence[str]) -> Markup:
    """An SVG with one line per run; matplotlib escapes the names."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}):
        figure = Figure(figsize=(4.4, 2.6), layout="constrained")
        axes = figure.subplots()
        for index, (points, name) in enumerate(zip(lines, names, strict=True)):
            if points:
                look = {"color": _colour(index), "marker": "o" if len(points) < 30 else None}
                axes.plot(*zip(*points, strict=True), markersize=3, linewidth=1.5, label=name, **look)
        axes.set_title(title, loc="left")
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if len(names) > 1:
            axes.legend(frameon=False)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    return Markup(svg[svg.index("<svg") :])


def _compare(settings: Sequence[dict[str, Any]]) -> list[tuple[str, list[Any], bool]]:
    """(key, its value in each run, whether these differ), for keys that have a value in any run."""
    keys = dict.fromkeys(key for table in settings for key in table)
    rows = [(key, [table.get(key) for table in settings]) for key in keys]
    return [
        (key, values, values.count(values[0]) < len(values)) for key, values in rows if values != [None] * len(values)
    ]


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _plain(value: Any) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, str | int | float) else json.dumps(value, ensure_ascii=False)

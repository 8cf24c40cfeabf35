"""`hf-mae report`: one self-contained HTML file of a run, or of several side by side."""

import base64
import html
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .data.sources import DataError
from .run_folder import picture_step, read_events, read_results

# Key of metrics.jsonl -> title of its curve and a factor.
CURVES = {
    "loss": ("Training loss", 1),
    "eval_loss": ("Evaluation loss", 1),
    "top1": ("Accuracy, %", 1),
    "knn_top1": ("kNN accuracy, %", 1),
    "linear_top1": ("Linear accuracy, %", 1),
    "rankme": ("RankMe", 1),
    "lr": ("Learning rate", 1),
    "grad_norm": ("Gradient norm", 1),
    "images_per_second": ("Images a second", 1),
    "data_wait": ("Time spent waiting for data, %", 100),
}
COLOURS = ("#1f6feb", "#d9480f", "#2b8a3e", "#862e9c", "#0b7285", "#a61e4d")
MOST_PICTURES, MOST_BAD = 12, 20

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1200px; padding: 1rem; color: #1a1a1a; }
h1 { font-size: 1.6rem; margin: .5rem 0; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1rem 0 .25rem; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(320px, 100%), 1fr)); gap: .5rem; }
svg { width: 100%; height: auto; } img { max-width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid #ddd; vertical-align: top; }
td.differs { background: #fff3bf; } .key { display: inline-block; width: .8rem; height: .8rem; border-radius: 2px; }
input[type=range] { width: min(30rem, 100%); } code { overflow-wrap: anywhere; }
"""
SCRIPT = """
for (const slider of document.querySelectorAll('input[type=range]')) {
  const pictures = slider.closest('section').querySelectorAll('figure');
  const show = () => pictures.forEach((picture, index) => { picture.hidden = index != slider.value; });
  slider.addEventListener('input', show);
  show();
}
"""


@dataclass
class Run:
    """What a run's folder records.

    Args:
        name: of the folder.
        recipe: keys that it ran with.
        derived: what followed from them, the data and the machine.
        events: of metrics.jsonl.
        results: of results.json.
        bad: lines of bad_samples.jsonl.
        pictures: (step, file) of the reconstructions, by step.
    """

    name: str
    recipe: dict[str, Any]
    derived: dict[str, Any]
    events: list[dict[str, Any]]
    results: list[dict[str, Any]]
    bad: list[dict[str, str]]
    pictures: list[tuple[int, Path]]

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """Read a run's folder.

        Raises:
            DataError: if it is none.
        """
        if not (folder / "metrics.jsonl").is_file():
            raise DataError(f"{folder} has no metrics.jsonl; name the folder of a run of hf-mae pretrain or finetune")
        config, bad = folder / "run_config.yaml", folder / "bad_samples.jsonl"
        settings = yaml.safe_load(config.read_text()) if config.is_file() else {}
        pictures = sorted((picture_step(path), path) for path in folder.glob("reconstructions/step-*.png"))
        return cls(
            name=folder.resolve().name,
            recipe=settings.get("recipe", {}),
            derived=settings.get("derived", {}),
            events=read_events(folder / "metrics.jsonl"),
            results=read_results(folder / "results.json"),
            bad=[json.loads(line) for line in bad.read_text().splitlines()] if bad.is_file() else [],
            pictures=pictures,
        )

    def curve(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of a key, by step."""
        return [(event["step"], event[key]) for event in self.events if event.get(key) is not None]


def write_report(folders: Sequence[str | Path], out: str | Path) -> None:
    """Write the HTML file: curves, reconstructions, results, bad samples, recipes, hardware.

    Args:
        folders: of the runs.
        out: the file. It needs no other file and no network.

    Raises:
        DataError: if a folder is none of a run, or the file can't be written.
    """
    runs = [Run.read(Path(folder)) for folder in folders]
    text = page(runs)
    try:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(f"{out} can't be written: {error.strerror}; name another file by --output") from error


def page(runs: Sequence[Run]) -> str:
    """The whole file."""
    title = " and ".join(run.name for run in runs)
    parts = {
        "": summary(runs),
        "Curves": curves(runs),
        "Reconstructions": "".join(reconstructions(run, len(runs) > 1) for run in runs),
        "Results": results(runs),
        "Images that could not be decoded": bad_samples(runs),
        "Recipe": settings_table(runs, [run.recipe for run in runs]),
        "Run and hardware": settings_table(runs, [run.derived for run in runs]),
    }
    body = "".join((f"<h2>{heading}</h2>" if heading else "") + part for heading, part in parts.items() if part)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{_text(title)}</title><style>{STYLE}</style></head>'
        f"<body><h1>{_text(title)}</h1>{body}<script>{SCRIPT}</script></body></html>\n"
    )


def summary(runs: Sequence[Run]) -> str:
    """How far each run came, and the first and last of its figures."""
    rows = []
    for index, run in enumerate(runs):
        steps = max((event["step"] for event in run.events), default=0)
        figures = {}
        for key in ("eval_loss", "knn_top1", "linear_top1", "top1"):
            if values := [value for _, value in run.curve(key)]:
                figures[CURVES[key][0]] = f"{_number(values[0])} → {_number(values[-1])}"
        speeds = sorted(value for _, value in run.curve("images_per_second"))
        if speeds:
            figures["Images a second, median"] = _number(speeds[len(speeds) // 2])
        total = run.derived.get("total_steps")
        done = f"{steps:,} of {total:,}" if total else f"{steps:,}"
        rows.append({"run": _key(index) + _text(run.name), "steps": done} | figures)
    headings = list(dict.fromkeys(heading for row in rows for heading in row))
    return _table(headings, [[row.get(heading, "") for heading in headings] for row in rows])


def curves(runs: Sequence[Run]) -> str:
    """A plot of each figure that any run has more than one value of."""
    plots = []
    for key, (title, factor) in CURVES.items():
        lines = [[(step, factor * value) for step, value in run.curve(key)] for run in runs]
        if max(map(len, lines)) > 1:
            plots.append(_plot(title, lines, [run.name for run in runs]))
    return f'<div class="curves">{"".join(plots)}</div>' if plots else ""


def _plot(title: str, lines: Sequence[list[tuple[int, float]]], names: Sequence[str]) -> str:
    """An SVG of one line a run."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}):
        figure = Figure(figsize=(4.4, 2.6), layout="constrained")
        axes = figure.subplots()
        for index, (points, name) in enumerate(zip(lines, names, strict=True)):
            if points:
                look = {"color": COLOURS[index % len(COLOURS)], "marker": "o" if len(points) < 30 else None}
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
    return f'<div role="img" aria-label="{_text(title)}">{svg[svg.index("<svg") :]}</div>'


def reconstructions(run: Run, named: bool) -> str:
    """The same images over the training, one step at a time."""
    if not run.pictures:
        return ""
    count = len(run.pictures)
    chosen = sorted({round(i * (count - 1) / (MOST_PICTURES - 1)) for i in range(MOST_PICTURES)})
    figures = []
    for step, path in (run.pictures[index] for index in chosen):
        data = base64.b64encode(path.read_bytes()).decode()
        figures.append(
            f'<figure style="margin:0" hidden><figcaption>after step {step:,}</figcaption>'
            f'<img alt="reconstructions after step {step}" src="data:image/png;base64,{data}"></figure>'
        )
    last = len(chosen) - 1
    slider = (
        f'<label>step <input type="range" min="0" max="{last}" value="{last}" step="1"></label>' if last else
        '<input type="range" min="0" max="0" value="0" hidden>'
    )  # fmt: skip
    heading = f"<h3>{_text(run.name)}</h3>" if named else ""
    return f"<section>{heading}{slider}{''.join(figures)}</section>"


def results(runs: Sequence[Run]) -> str:
    """The entries of each results.json."""
    rows = []
    for index, run in enumerate(runs):
        for entry in run.results:
            data, ranges = entry["data"], entry.get("ranges", {})
            figures = []
            for name, value in entry["figures"].items():
                spread = " ({} to {})".format(*map(_number, ranges[name])) if name in ranges else ""
                figures.append(f"{_text(name)} {_number(value)}{spread}")
            learnt = f"{data['train_images']:,} images, " if "train_images" in data else ""
            where = f"{learnt}evaluated on {data['eval_images']:,}: {data['evaluated_on']}"
            rows.append([_key(index) + _text(entry["protocol"]["name"]), "<br>".join(figures), _text(where)])
    return _table(["protocol", "figures", "data"], rows) if rows else ""


def bad_samples(runs: Sequence[Run]) -> str:
    """Counts by reason, and the first of them."""
    rows = []
    for index, run in enumerate(runs):
        for reason, count in Counter(sample["reason"] for sample in run.bad).most_common():
            keys = [_text(sample["key"]) for sample in run.bad if sample["reason"] == reason]
            more = f"<br>and {len(keys) - MOST_BAD} more" if len(keys) > MOST_BAD else ""
            rows.append([_key(index) + _text(reason), str(count), "<br>".join(keys[:MOST_BAD]) + more])
    note = "<p>The first hundred of each run are named in its bad_samples.jsonl, and counted here.</p>"
    return note + _table(["reason", "count", "images"], rows) if rows else ""


def settings_table(runs: Sequence[Run], settings: Sequence[dict[str, Any]]) -> str:
    """Keys with a column a run; where runs differ, the values are marked."""
    rows = []
    for key in dict.fromkeys(key for keys in settings for key in keys):
        values = [keys.get(key) for keys in settings]
        if any(value is not None for value in values):
            mark = ' class="differs"' if any(value != values[0] for value in values) else ""
            cells = "".join(f"<td{mark}><code>{_text(_plain(value))}</code></td>" for value in values)
            rows.append(f"<tr><td>{_text(key)}</td>{cells}</tr>")
    head = "".join(f"<th>{_key(index)}{_text(run.name)}</th>" for index, run in enumerate(runs))
    return f'<div class="scroll"><table><tr><th></th>{head}</tr>{"".join(rows)}</table></div>' if rows else ""


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _key(index: int) -> str:
    """The run's colour in the curves."""
    return f'<span class="key" style="background:{COLOURS[index % len(COLOURS)]}"></span> '


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _plain(value: Any) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, str | int | float) else json.dumps(value, ensure_ascii=False)


def _text(value: Any) -> str:
    return html.escape(str(value))

"""The report: what it shows is what the runs record, and it needs nothing else."""

import base64
import json
import re
from html.parser import HTMLParser
from io import BytesIO

import pytest
import yaml
from PIL import Image
from runs import evaluations, run, start

from hf_mae.report import MOST_PICTURES, Run, page, write_report


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "one"
    return run(folder, total_steps=6, eval_steps=3, log_steps=2, quality_steps=3, quality_samples=40)


class Page(HTMLParser):
    """Text and attributes of a page; fails on tags that don't match."""

    VOID = ("meta", "link", "img", "input", "br")

    def __init__(self, text: str):
        super().__init__()
        self.open, self.texts, self.attributes = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "script" not in self.open and "style" not in self.open:
            self.texts.append(data.strip())

    @property
    def text(self) -> str:
        return " ".join(text for text in self.texts if text)


def test_the_report_of_a_run_shows_its_figures_curves_pictures_recipe_and_machine(finished, tmp_path, capsys):
    assert start("report", finished, "--output", tmp_path / "r.html") == 0
    assert capsys.readouterr().out == f"report   {tmp_path / 'r.html'}\n"
    found = Page((tmp_path / "r.html").read_text())
    losses = evaluations(finished)
    assert f"{losses[0]:.4g} → {losses[6]:.4g}" in found.text
    assert "6 of 6" in found.text
    titles = ("Training loss", "Evaluation loss", "Learning rate", "Images per second", "kNN accuracy, %", "RankMe")
    for title in titles:
        assert title in found.text
    config = yaml.safe_load((finished / "run_config.yaml").read_text())
    assert f"dataset {config['recipe']['dataset']}" in found.text
    assert f"hardware {config['derived']['hardware']}" in found.text
    pictures = [value for tag, name, value in found.attributes if (tag, name) == ("img", "src")]
    steps = [0, 3, 6]
    assert len(pictures) == len(steps)
    for step, picture in zip(steps, pictures, strict=True):
        data = base64.b64decode(picture.removeprefix("data:image/png;base64,"))
        assert data == (finished / "reconstructions" / f"step-{step}.png").read_bytes()


def test_the_report_asks_the_network_for_nothing(finished):
    text = page([Run(finished)])
    for _, name, value in Page(text).attributes:
        if name in ("src", "href", "srcset", "action", "data"):
            assert value.startswith(("data:", "#"))
    assert not re.search(r"url\((?!#)|@import|fetch\(|XMLHttpRequest|<iframe", text)


def test_the_points_of_a_curve_are_the_logged_values(finished):
    events = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    one = Run(finished)
    assert one.curve("loss") == [(event["step"], event["loss"]) for event in events if "loss" in event]
    assert [step for step, _ in one.curve("eval_loss")] == [0, 3, 6]
    text = page([one])
    curve = text[text.index('aria-label="Evaluation loss"') :]
    line = re.search(r'<path d="([^"]+)"[^>]*stroke: #1f6feb', curve)
    assert line is not None
    points = [tuple(map(float, point)) for point in re.findall(r"[ML] ([\d.]+) ([\d.]+)", line[1])]
    (x0, y0), (x1, y1), (x2, y2) = points
    values = [value for _, value in one.curve("eval_loss")]
    assert (x1 - x0) / (x2 - x0) == pytest.approx(0.5, abs=1e-3)
    assert (y1 - y0) / (y2 - y0) == pytest.approx((values[1] - values[0]) / (values[2] - values[0]), abs=1e-3)


def test_several_runs_stand_side_by_side_and_where_they_differ_is_marked(finished, tmp_path):
    other = run(tmp_path / "two", total_steps=4, eval_steps=2, blr=3e-3, quality_steps=0)
    write_report([finished, other], tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    found = Page(text)
    assert "one and two" in found.text
    rows = dict(re.findall(r"<tr><td>(\w+)</td>(.*?)</tr>", text))
    assert 'class="differs"' in rows["blr"]
    assert "<code>0.003</code>" in rows["blr"]
    assert 'class="differs"' not in rows["dataset"]
    for title, names in (("Training loss", ["one", "two"]), ("RankMe", ["one"])):  # no curve, no name
        curve = text[text.index(f'aria-label="{title}"') :]
        legend = curve[curve.index('<g id="legend_1">') : curve.index("</svg>")]
        assert re.findall(r"<text[^>]*>(\w+)</text>", legend) == names


@pytest.mark.slow
def test_of_many_pictures_some_are_shown_the_first_and_last_among_them(finished, tmp_path):
    many = Run(finished)
    Image.new("RGB", (2, 2)).save(tmp_path / "p.png")
    many.pictures = [(step, tmp_path / "p.png") for step in range(0, 500, 5)]
    steps = [int(step) for step in re.findall(r"after step (\d+)<", page([many]))]
    assert len(steps) == MOST_PICTURES
    assert (steps[0], steps[-1]) == (0, 495)
    assert f'max="{MOST_PICTURES - 1}"' in page([many])


def test_bad_samples_and_results_are_told_and_nothing_of_them_is_taken_for_html(finished):
    one = Run(finished)
    one.bad = [{"key": f"<b>{n}</b>.jpg", "reason": "Truncated"} for n in range(25)] + [{"key": "x", "reason": "Empty"}]
    one.results = [
        {"protocol": {"name": "knn"}, "figures": {"knn_top1": 51.25}, "ranges": {"knn_top1": [50.5, 52]},
         "data": {"train_images": 1705, "eval_images": 92, "evaluated_on": "split test of </td>"}}
    ]  # fmt: skip
    text = page([one])
    found = Page(text)
    assert "<b>" not in text
    assert "<b>19</b>.jpg and 5 more" in found.text
    assert "Truncated 25" in found.text
    assert "Empty 1 x" in found.text
    assert "knn knn_top1 51.25 % (50.50 to 52.00) 1,705 images, evaluated on 92: split test of </td>" in found.text


def test_a_run_that_has_only_begun_is_reported_too(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval_loss": 1.5}\n')
    found = Page(page([Run(tmp_path)]))
    assert "1.5 → 1.5" in found.text
    assert "Reconstructions" not in found.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere has no metrics.jsonl; name the folder of a run of hf-mae pretrain or finetune"),
        ([], "--runs"),
    ],
)
def test_what_is_no_run_is_told_in_one_line(words, message, capsys):
    assert start("report", *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_report_that_cannot_be_written_is_told_in_one_line(finished, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert start("report", finished, "--output", tmp_path / "file" / "r.html") == 2
    assert "can't be written" in capsys.readouterr().err


def test_pictures_open(finished):
    text = page([Run(finished)])
    data = re.findall(r"data:image/png;base64,([^\"]+)", text)[-1]
    with Image.open(BytesIO(base64.b64decode(data))) as picture:
        picture.load()
        assert picture.width > 500


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser_the_slider_shows_the_pictures_of_each_step_and_the_page_fits(pages, finished, tmp_path, width):
    other = run(tmp_path / "two", total_steps=2)
    write_report([finished, other], tmp_path / "r.html")
    page = pages((tmp_path / "r.html").as_uri())
    page.set_viewport_size({"width": width, "height": 800})
    shown = page.locator("section:first-of-type figure:visible figcaption")
    assert shown.all_inner_texts() == ["after step 6"]
    for key, step in (("ArrowLeft", 3), ("Home", 0), ("ArrowRight", 3)):
        page.locator("section:first-of-type input[type=range]").press(key)
        assert shown.all_inner_texts() == [f"after step {step}"]
    loaded = "Array.from(document.querySelectorAll('img'), image => image.complete && image.naturalWidth > 500)"
    assert all(page.evaluate(loaded))
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("svg:visible").count() >= 6

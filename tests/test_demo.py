"""The demo: what it does, what it writes as a Space, and the page in a real browser."""

import contextlib
import re
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from PIL import Image
from runs import environment, start
from tiny import tiny

from hf_mae import MAEForPreTraining, MAEImageProcessor
from hf_mae.data.decode import BadImage
from hf_mae.data.order import Rows
from hf_mae.data.sources import open_source
from hf_mae.visualize.reconstruction import reconstruct, seeded_noise

gradio = pytest.importorskip("gradio", reason="gradio, of the extra [demo], is not installed")
from hf_mae.demo import Demo, Session  # noqa: E402  # needs gradio


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny(MAEForPreTraining, image_size=[32, 48], norm_pix_loss=True).save_pretrained(folder)
    size = {"height": 32, "width": 48}
    MAEImageProcessor(size=size, crop_size=size, do_center_crop=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Uploads of all kinds."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("files")
    pixels = rng.integers(0, 256, (64, 96, 4), dtype=np.uint8)
    Image.fromarray(pixels[..., :3]).save(folder / "photo.jpg")
    Image.fromarray(pixels, "CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(rng.integers(0, 65536, (64, 96), dtype=np.uint16)).save(folder / "deep.png")
    frames = [Image.fromarray(frame) for frame in pixels[..., :2].transpose(2, 0, 1)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    (folder / "text.jpg").write_text("not an image")
    Image.new("1", (10_000, 10_000)).save(folder / "huge.png")
    return folder


@pytest.fixture(scope="module")
def demo(saved, files):
    gallery = files / "gallery"
    gallery.mkdir()
    for number in range(12):
        Image.effect_noise((48, 32), 10 + 20 * number).convert("RGB").save(gallery / f"{number:02}.png")
    return Demo(str(saved), Rows(open_source(str(gallery))))


def opened(demo, files, ratio=0.75) -> Session:
    return demo.open(files / "photo.jpg", ratio)


# ------------------------------------------------------------------------------------------ what it does


@pytest.mark.parametrize(("ratio", "hidden"), [(0.05, 2), (0.5, 12), (0.75, 18), (0.95, 23)])
def test_the_slider_hides_a_part_the_same_patches_for_a_seed(demo, files, ratio, hidden):
    session = opened(demo, files, ratio)
    assert session.hidden.sum() == hidden
    assert torch.equal(session.hidden, demo.hide(session, ratio).hidden)
    order = seeded_noise(0, 1, 24)[0].argsort()
    assert set(session.hidden.nonzero().flatten().tolist()) == set(order[24 - hidden :].tolist())
    if hidden > 2:
        other = demo.hide(replace(session, seed=1), ratio)
        assert not torch.equal(session.hidden, other.hidden)


def test_the_pictures_are_the_models_reconstruction(demo, files):
    session = opened(demo, files)
    (photo, masked, predicted, pasted), said = demo.draw(session, "visible")
    result = reconstruct(demo.model, session.pixel_values, mask=session.hidden[None].float(), statistics="visible")
    assert photo.size == masked.size == predicted.size == pasted.size == (384, 256)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MAEImageProcessor().image_mean, MAEImageProcessor().image_std))

    def pixels(picture):
        return np.asarray(picture.resize((48, 32), Image.Resampling.NEAREST), int)

    def expected(images):
        return ((images[0] * std + mean).clamp(0, 1) * 255).round().permute(1, 2, 0).numpy().astype(int)

    hidden = result.removed[0, 0].numpy()
    assert np.array_equal(pixels(photo), expected(session.pixel_values))
    assert np.array_equal(pixels(pasted), expected(result.pasted))
    assert np.array_equal(pixels(masked), np.where(hidden[..., None], 128, pixels(photo)))
    assert np.array_equal(pixels(predicted), np.where(hidden[..., None], pixels(pasted), 128))
    assert "18 of 24 patches hidden (75%)" in said
    assert "estimated from the visible patches" in said
    assert "uses ground truth" in demo.draw(session, "true")[1]


def test_a_click_hides_or_shows_the_patch_under_it_but_never_all_or_none(demo, files):
    session = opened(demo, files)
    for x, y, patch in ((0, 0, 0), (383, 255, 23), (70, 130, 13), (384, 256, 23)):
        assert demo.patch_at(x, y, 384, 256) == patch
    once = demo.toggle(session, 13)
    assert [i for i in range(24) if once.hidden[i] != session.hidden[i]] == [13]
    assert torch.equal(demo.toggle(once, 13).hidden, session.hidden)
    one = replace(session, hidden=torch.arange(24) == 5)
    assert torch.equal(demo.toggle(one, 5).hidden, one.hidden)
    assert torch.equal(demo.toggle(replace(one, hidden=~one.hidden), 5).hidden, ~one.hidden)


def test_attention_is_brightest_where_the_last_layer_looks_most(demo, files, monkeypatch):
    session = opened(demo, files)
    weights = demo.model.mae(session.pixel_values, output_attentions=True).attentions[-1][0].mean(0)[1 + 7, 1:]
    picture = np.asarray(demo.attention(session, 7), float)
    colour = picture[..., 0] - picture[..., 2]  # gray has none; heat is red
    means = [colour[r * 64 : r * 64 + 64, c * 64 : c * 64 + 64].mean() for r in range(4) for c in range(6)]
    others = [patch for patch in range(24) if patch != 7]  # its own place shows the photo
    assert max(others, key=lambda patch: means[patch]) == max(others, key=lambda patch: weights[patch])
    frame = picture[64:128, 64:128]
    assert (frame[0] == [0, 120, 255]).all()
    assert (frame[-1] == [0, 120, 255]).all()


def test_an_image_of_the_gallery_is_its_own_nearest_neighbour(demo, files):
    for number in (0, 7):
        session = demo.open(files / "gallery" / f"{number:02}.png", 0.5)
        (nearest, cosine), *others = demo.neighbours(session)
        assert cosine == "1.00"
        assert nearest is demo.thumbnails[number]
        assert len(others) == 7
        assert all(float(text) <= 1 for _, text in others)


@pytest.mark.parametrize("name", ["cmyk.jpg", "deep.png", "moving.gif"])
def test_unusual_images_are_shown(demo, files, name):
    (photo, *_), _ = demo.draw(demo.open(files / name, 0.5), "visible")
    assert np.asarray(photo).std() > 10


@pytest.mark.parametrize(("name", "message"), [("text.jpg", "not an image"), ("huge.png", "10000 x 10000 pixels")])
def test_what_is_no_image_or_too_large_is_said(demo, files, name, message):
    with pytest.raises(BadImage, match=message):
        demo.open(files / name, 0.5)


# ------------------------------------------------------------------------------------------ the Space


@pytest.mark.slow
def test_the_exported_space_starts_by_itself(saved, files, tmp_path, capsys):
    assert start("demo", "--model", saved, "--output_dir", tmp_path / "space") == 0
    assert f"space    {tmp_path / 'space'}" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "space").iterdir()}
    assert names == {"app.py", "README.md", "requirements.txt", "hf_mae", "model"}
    text = "".join(
        path.read_text() for path in (tmp_path / "space").rglob("*") if path.suffix in (".py", ".md", ".txt")
    )
    assert str(tmp_path) not in text
    needed = (tmp_path / "space" / "requirements.txt").read_text()
    assert {"lazy-loader", "accelerate", "jinja2"} <= set(re.findall(r"^[\w-]+", needed, re.MULTILINE))
    head = (tmp_path / "space" / "README.md").read_text()
    assert f"sdk: gradio\nsdk_version: {gradio.__version__}\napp_file: app.py" in head
    shutil.move(tmp_path / "space", tmp_path / "elsewhere")
    with serving([sys.executable, "app.py"], tmp_path / "elsewhere") as url, urlopen(url) as page:
        assert b"Masked autoencoder" in page.read()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model": "./nowhere"}, "--model ./nowhere can't be loaded"),
        ({"gallery": "nowhere.parquet"}, "nowhere.parquet"),
        ({"output_dir": "full"}, "full already exists and is not empty; name another folder with --output_dir"),
    ],
    ids=str,
)
def test_what_a_user_did_wrong_is_told_in_one_line(saved, tmp_path, monkeypatch, capsys, keys, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    words = [word for key, value in ({"model": saved} | keys).items() for word in (f"--{key}", value)]
    assert start("demo", *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


# ------------------------------------------------------------------------------------------ the page

PHOTO = "#photo input[type=file]"


@contextlib.contextmanager
def serving(command, folder: Path):
    """A page that is served by a command; its address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    variables = environment(GRADIO_SERVER_PORT=port, GRADIO_ANALYTICS_ENABLED="False", HF_HUB_OFFLINE="1")
    with (folder / "server.log").open("w") as log:
        command = [port if word == "PORT" else word for word in command]
        process = subprocess.Popen(command, cwd=folder, env=variables, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None and time.monotonic() < deadline, (folder / "server.log").read_text()  # noqa: PT018
            with contextlib.suppress(OSError), urlopen(url, timeout=5):
                break
            time.sleep(0.3)
        yield url
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def url(saved, files, demo, tmp_path_factory):  # `demo` makes the gallery
    command = [sys.executable, "-m", "hf_mae.cli", "demo", "--model", saved, "--gallery", files / "gallery"]
    with serving([*map(str, command), "--port", "PORT"], tmp_path_factory.mktemp("served")) as address:
        yield address


@pytest.fixture
def page(pages, url):
    page = pages(url)
    page.wait_for_selector(PHOTO, state="attached")
    return page


def upload(page, file) -> None:
    page.set_input_files(PHOTO, file)
    page.wait_for_selector("#pasted img")
    page.wait_for_function("document.querySelector('#said').innerText.includes('patches hidden')")


def picture(page, name: str) -> str:
    return page.locator(f"#{name} img").get_attribute("src")


def wait_for_change(page, name: str, before: str) -> None:
    page.wait_for_function(
        "([name, before]) => document.querySelector(`#${name} img`)?.getAttribute('src') != before", arg=[name, before]
    )


@pytest.mark.browser
def test_a_photo_is_dropped_the_slider_moved_the_mask_redrawn_and_painted(page, files):
    upload(page, files / "photo.jpg")
    assert "18 of 24 patches hidden (75%)" in page.inner_text("#said")
    assert page.locator("#neighbours img").count() >= 8

    before = picture(page, "pasted")
    page.fill("#ratio input[type=number]", "0.5")
    page.press("#ratio input[type=number]", "Enter")
    page.wait_for_function("document.querySelector('#said').innerText.includes('12 of 24')")
    wait_for_change(page, "pasted", before)

    for _ in range(2):  # by 0.05 each
        page.press("#ratio input[type=range]", "ArrowRight")
    page.wait_for_function("document.querySelector('#said').innerText.includes('15 of 24')")
    page.fill("#ratio input[type=number]", "0.5")
    page.press("#ratio input[type=number]", "Enter")
    page.wait_for_function("document.querySelector('#said').innerText.includes('12 of 24')")

    before = picture(page, "masked")
    page.click("#again")
    wait_for_change(page, "masked", before)
    assert "12 of 24" in page.inner_text("#said")

    before = picture(page, "masked")
    box = page.locator("#masked img").bounding_box()
    page.locator("#masked img").click(position={"x": box["width"] / 2 + 5, "y": box["height"] / 2 + 5})
    wait_for_change(page, "masked", before)
    assert page.inner_text("#said").startswith(("11 of 24", "13 of 24"))


@pytest.mark.browser
def test_a_click_shows_the_attention_of_a_patch_and_the_way_back_is_said(page, files):
    upload(page, files / "photo.jpg")
    page.get_by_label("shows what it attends to").check()
    page.locator("#masked img").click(position={"x": 20, "y": 20})
    page.wait_for_selector("#attention img")
    assert "18 of 24" in page.inner_text("#said")
    page.get_by_label("the original (uses ground truth)").check()
    page.wait_for_function("document.querySelector('#said').innerText.includes('uses ground truth')")


@pytest.mark.browser
def test_a_bad_upload_gets_a_friendly_message_and_the_next_one_works(page, files):
    for name, message in (("text.jpg", "it is not an image of a known kind"), ("huge.png", "10000 x 10000 pixels")):
        page.set_input_files(PHOTO, files / name)
        page.get_by_text(message).wait_for()
        page.get_by_role("button", name="Clear").first.click()
    upload(page, files / "cmyk.jpg")
    assert "18 of 24" in page.inner_text("#said")


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_a_phone_and_a_desk(page, files, width):
    page.set_viewport_size({"width": width, "height": 900})
    upload(page, files / "photo.jpg")
    assert page.evaluate("document.documentElement.scrollWidth") <= width

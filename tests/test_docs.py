"""The code of README and documentation, run as it stands there; that of docs/finetuning.md is in test_docs_finetune.py.

The pages are built too, and what they say of names, links and length is checked.
"""

import re
import shlex
import shutil
import sys
import tomllib
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import pytest
from pages import PAGES, blocks
from PIL import Image
from runs import REPOSITORY, run, run_script, start

import hf_mae
from hf_mae import MAEForImageClassification

# Words of the Python that other tests run, which have what it needs.
ELSEWHERE = {
    "layer_decay_groups": "test_docs_finetune.py",
    "FinetuneRecipe": "test_docs_finetune.py",
    "load_dataset": "test_docs_finetune.py",
    "peft": "test_docs_finetune.py",
    "onnxruntime": "conversion/test_export.py",
    "trust_remote_code": "hub/test_push.py",
}
PYTHON = blocks("python")
HERE = [(page, code) for page, code in PYTHON if not any(word in code for word in ELSEWHERE)]
# All lines of the command blocks, and what is added to them so that they take seconds.
LINES = [
    line.split(" #")[0].strip()
    for _, block in blocks("bash")
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip()
]
FEW_STEPS = "--total_steps 2 --total_batch_size 4 --num_workers 0 --quality_steps 0 --max_eval_samples 4"
SMALL = f"""--hidden_size 24 --num_hidden_layers 1 --num_attention_heads 2 --intermediate_size 48
    --decoder_hidden_size 24 --decoder_num_hidden_layers 1 --decoder_num_attention_heads 2
    --decoder_intermediate_size 48 {FEW_STEPS}"""
ADDED = {
    "hf-mae pretrain": SMALL,
    "hf-mae prepare": "--num_workers 0",
    "hf-mae finetune": "--max_samples 16 --total_steps 1 --total_batch_size 4 --num_workers 0",
    "hf-mae evaluate linear-probe --recipe": "--epochs 1 --warmup_epochs 0 --total_batch_size 4 --num_workers 0",
    "hf-mae evaluate classification": "--num_workers 0",
    "hf-mae evaluate knn --model outputs/quickstart --dataset digits": "--num_workers 0",
    "hf-mae evaluate": "--max_samples 16 --num_workers 0",
    "hf-mae predict": "--num_workers 0",
    **dict.fromkeys(("hf-mae embed", "hf-mae inspect", "hf-mae reconstruct", "hf-mae report", "hf-mae card"), ""),
}
# Launchers of what the line ends with: they are in test_launch.py, here it runs in one process.
LAUNCHERS = re.compile(r"^(torchrun .*|accelerate launch .*) -m hf_mae.cli|^sbatch scripts/slurm.sh(?= --)")
# Lines that other tests run, with the word that is looked for in them.
RUN_ELSEWHERE = {
    "hf-mae convert": ("conversion/test_convert.py", "convert"),
    "hf-mae export": ("conversion/test_export.py", "export"),
    "hf-mae push": ("hub/test_push.py", "push"),
    "python scripts/examples/segmentation.py": ("scripts/test_segmentation_script.py", "segmentation.py"),
    "python scripts/studies/study_mask_ratio.py": ("scripts/test_studies.py", "study_mask_ratio.py"),
    "python scripts/studies/compare_vit_mae.py": ("scripts/test_studies.py", "compare_vit_mae"),
    "python scripts/studies/compare_contrastive.py": ("scripts/test_studies.py", "compare_contrastive"),
    "bash scripts/quickstart.sh": ("scripts/test_scripts.py", "quickstart.sh"),
    "python scripts/chaos_drill.py": ("scripts/test_scripts.py", "chaos_drill.py"),
}
NOT_OURS = ("hf auth login", "bash scripts/test.sh")  # the second is what runs this
LINES = [LAUNCHERS.sub("hf-mae" if " -m " in line else "hf-mae pretrain", line) for line in LINES]
# Those with outputs/findings are run in test_docs_finetune.py.
COMMANDS = [line for line in LINES if line.startswith(tuple(ADDED)) and "outputs/findings" not in line]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return run(tmp_path_factory.mktemp("trained") / "run", total_steps=2)


@pytest.fixture
def home(trained, tmp_path, monkeypatch):
    """A folder with models and images where the pages have them."""
    monkeypatch.chdir(tmp_path)
    for name in ("quickstart", "mine", "base"):
        shutil.copytree(trained, tmp_path / "outputs" / name)
    (tmp_path / "tiles").mkdir()
    for i in range(12):
        np.save(tmp_path / "tiles" / f"{i}.npy", np.full((208, 320, 13), i, np.float32))
    photo().save("photo.jpg")
    (tmp_path / "findings.csv").write_text("image,age,findings\na/0.png,64,cyst; mass\nb/7.png,57,cyst\n")
    for folder in ("path/to/images", "DATA/train", "DATA/validation", "DATA/test"):
        for name in (f"{folder}/{label}/{i}.png" for label in "ab" for i in range(8)):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            photo().save(name)
    return tmp_path


def photo() -> Image.Image:
    return Image.fromarray(np.arange(64 * 48, dtype=np.uint32).astype(np.uint8).reshape(48, 64))


def test_all_of_it_is_run_by_a_test():
    assert len(HERE) >= 5
    assert len(COMMANDS) >= 15
    for word, file in ELSEWHERE.items():
        assert any(word in code for _, code in PYTHON), f"{word} is on no page any longer; see {file}"
    for start_of_line, (file, word) in RUN_ELSEWHERE.items():
        assert any(line.startswith(start_of_line) for line in LINES), f"{start_of_line} is on no page any longer"
        assert word in (Path(__file__).parent / file).read_text()
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for line in LINES:
        if line.startswith("pip install"):
            assert set(re.findall(r"\[(.*?)\]", line)[0].split(",")) <= set(extras)
        else:
            assert line.startswith((*ADDED, *RUN_ELSEWHERE, *NOT_OURS)), f"no test runs {line}"


@pytest.mark.parametrize(("page", "code"), HERE, ids=lambda text: text.splitlines()[-1][:40])
def test_the_python_runs(home, page, code):
    names: dict = {}
    exec(compile(code, page, "exec"), names)
    if "reconstruction_grid" in code:
        with Image.open("picture.png") as picture:
            assert picture.width > 4 * 128
    elif "features" in code:
        assert names["features"].shape == (1, names["model"].config.hidden_size)
    elif "combine" in code:
        assert names["metrics"].compute(predictions=[[0.1, 0.9]], references=[1]) == {"top1": 100.0, "top5": 100.0}
    elif "UperNet" in code:
        assert names["model"].backbone.channels == [names["backbone"].config.hidden_size] * 4
    else:
        assert names["output"].logits.shape == (4, 48, 256)


@pytest.mark.parametrize("line", sorted(set(COMMANDS)))
def test_the_commands_run(home, line, capsys):
    added = next(words for start_of_line, words in ADDED.items() if line.startswith(start_of_line))
    words = [*shlex.split(line)[1:], *shlex.split(added)]
    if "in1k" in line and "--dataset" not in line:
        words += ["--dataset", "DATA"]  # in place of ImageNet
    if words[0] == "pretrain":
        shutil.rmtree("outputs")
    if line.endswith("outputs/images_256 --output_dir outputs/mine"):
        shutil.copytree("path/to/images", "outputs/images_256")
    if words[0] in ("pretrain", "finetune") and "--dataset" in words:
        words += ["--eval_dataset", words[words.index("--dataset") + 1]]  # too few to hold any out
    if "outputs/finetune_quickstart" in line:
        names = {i: str(i) for i in range(10)}
        model = MAEForImageClassification.from_pretrained("outputs/quickstart", id2label=names)
        model.save_pretrained("outputs/finetune_quickstart")
        shutil.copy("outputs/quickstart/preprocessor_config.json", "outputs/finetune_quickstart")
    assert start(*words) == 0, capsys.readouterr().err


def test_the_readme_has_at_most_1500_words():
    assert len(PAGES["README.md"].split()) <= 1500


def test_every_link_leads_to_a_file_and_a_heading():
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            parts = urlparse(target)
            if parts.scheme:
                continue
            file = (REPOSITORY / page).parent / parts.path if parts.path else REPOSITORY / page
            assert file.exists(), f"{page} links to {target}"
            if parts.fragment:
                assert parts.fragment in anchors(file.read_text()), f"{page} links to {target}"


def anchors(text: str) -> set[str]:
    """GitHub's anchors of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_api_page_has_every_public_name():
    documented = re.findall(r"^\.\. (?:auto\w+|py:data):: hf_mae\.(\w+)", PAGES["docs/api.md"], re.MULTILINE)
    assert sorted(documented) == sorted(hf_mae.__all__)


@pytest.mark.slow
def test_the_pages_are_built_without_a_warning(tmp_path):
    pytest.importorskip("sphinx", reason="sphinx is not installed: pip install 'hf-mae[docs]'")
    run_script(sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "docs", tmp_path)
    api = (tmp_path / "api.html").read_text()
    assert all(f'id="hf_mae.{name}"' in api for name in hf_mae.__all__)
    assert len(list(tmp_path.glob("*.html"))) >= len(PAGES)

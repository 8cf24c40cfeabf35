"""Run transformers' own common model tests on our classes, and on its Dinov2 for comparison.

    python scripts/checks/transformers_common_tests.py            # everything, about five minutes on two cores
    python scripts/checks/transformers_common_tests.py -k init    # tests whose name contains "init"

The tests are in transformers' source distribution, not in its wheel. pip downloads that of the installed version into a
temporary folder, without dependencies. This file adds what the distribution lacks: the tests of each model, and a few
helpers. Needs pytest and parameterized (`[dev]`).

Prints how many tests passed, failed and were skipped, for ours and for Dinov2. The exit code is 1 if one of ours
failed, or if ours skip more. Both use the same harness, which is the only difference from how transformers tests its
own models. Each override in it states its reason.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import transformers

# What both testers share. Every test itself comes from transformers' mixins.
HARNESS = '''
from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_BACKBONE_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_PRETRAINING_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from ..test_configuration_common import ConfigTester
from ..test_image_processing_common import ImageProcessingTester
from ..test_modeling_common import ModelTesterMixin, floats_tensor

# The tests recognise base models and classifiers by these tables, which list transformers' own models.
MODEL_MAPPING_NAMES["mae"] = "MAEModel"
MODEL_FOR_PRETRAINING_MAPPING_NAMES["mae"] = "MAEForPreTraining"
MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES["mae"] = "MAEForImageClassification"
MODEL_FOR_BACKBONE_MAPPING_NAMES["mae"] = "MAEBackbone"


class VisionModelTester:
    """A small model and a batch of images, with the numbers of transformers' own vision testers."""

    batch_size = 13
    is_training = True
    num_labels = 10
    numbers = {
        "image_size": 30,
        "patch_size": 2,
        "num_channels": 3,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    more_numbers = {}

    def __init__(self, parent):
        self.parent = parent
        for name, number in self.numbers.items():
            setattr(self, name, number)
        # In tests that pass bool_masked_pos, half of the patches are masked.
        self.mask_length = (self.image_size // self.patch_size) ** 2
        self.num_masks = self.mask_length // 2
        self.seq_length = self.mask_length + 1

    def get_config(self):
        return self.config_class(**self.numbers, **self.more_numbers, num_labels=self.num_labels)

    def prepare_config_and_inputs_for_common(self):
        size = [self.batch_size, self.num_channels, self.image_size, self.image_size]
        return self.get_config(), {"pixel_values": floats_tensor(size)}


class VisionModelTest(ModelTesterMixin):
    # Images have no vocabulary whose embeddings could be resized.
    test_resize_embeddings = False
    # Runs a test that transformers skips unless a copyright line dates the model.
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        self.model_tester = self.model_tester_class(self)
        config_class = self.model_tester_class.config_class
        self.config_tester = ConfigTester(self, config_class=config_class, has_text_modality=False, hidden_size=36)

    def test_config(self):
        self.config_tester.run_common_tests()

    # The input embedding is a projection of patches, not an nn.Embedding (as in every vision model of transformers).
    def test_model_get_set_embeddings(self):
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config())
            self.assertIsInstance(model.get_input_embeddings(), nn.Module)
            new = nn.Embedding(10, 10)
            model.set_input_embeddings(new)
            self.assertIs(model.get_input_embeddings(), new)
            output_embeddings = model.get_output_embeddings()
            self.assertTrue(output_embeddings is None or isinstance(output_embeddings, nn.Linear))


class VisionImageProcessingTester(ImageProcessingTester):
    def __init__(self, parent, **kwargs):
        kwargs.setdefault("size", {"shortest_edge": 20})
        kwargs.setdefault("crop_size", {"height": 18, "width": 18})
        super().__init__(parent, **kwargs)
'''

MAE_TEST = """
import unittest

import torch

import hf_mae
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, WeightConverter
from transformers.testing_utils import torch_device

from ...test_backbone_common import BackboneTesterMixin
from ...test_image_processing_common import ImageProcessingTestMixin
from ..harness import VisionImageProcessingTester, VisionModelTest, VisionModelTester


class MAEModelTester(VisionModelTester):
    config_class = hf_mae.MAEConfig
    more_numbers = {
        "intermediate_size": 37,
        "decoder_hidden_size": 32,
        "decoder_num_hidden_layers": 2,
        "decoder_num_attention_heads": 4,
        "decoder_intermediate_size": 37,
    }


class MAEModelTest(VisionModelTest, unittest.TestCase):
    model_tester_class = MAEModelTester
    all_model_classes = (
        hf_mae.MAEModel,
        hf_mae.MAEForPreTraining,
        hf_mae.MAEForImageClassification,
        hf_mae.MAEBackbone,
    )

    # Two runs of a test must remove the same patches, so pretraining gets its noise. A test that finds both noise and
    # bool_masked_pos in a signature passes both, but they can't be combined.
    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if model_class is hf_mae.MAEForPreTraining and "noise" not in inputs:
            noise = torch.rand(1, self.model_tester.mask_length, generator=torch.Generator().manual_seed(0))
            inputs["noise"] = noise.expand(len(inputs["pixel_values"]), -1).to(torch_device)
        if "noise" in inputs:
            inputs.pop("bool_masked_pos", None)
        return inputs

    # These tests expect the same number of tokens from all classes; pretraining's encoder sees only a quarter.
    def _with_each_length(self, test):
        N, K = self.model_tester.mask_length, self.model_tester.get_config().num_kept_patches(0.75)
        others = tuple(cls for cls in self.all_model_classes if cls is not hf_mae.MAEForPreTraining)
        for classes, tokens in ((others, N + 1), ((hf_mae.MAEForPreTraining,), K + 1)):
            self.all_model_classes, self.model_tester.seq_length = classes, tokens
            test()

    def test_attention_outputs(self):
        self._with_each_length(super().test_attention_outputs)

    def test_hidden_states_output(self):
        self._with_each_length(super().test_hidden_states_output)

    # Our weights need no conversion, and these tests skip models without one. A user may register one; here it fuses
    # split queries, keys and values.
    def _with_a_conversion(self, test):
        conversions = []
        for kind in ("weight", "bias"):
            split = [f"attention.{letter}_proj.{kind}" for letter in "qkv"]
            conversions.append(WeightConverter(split, f"attention.qkv.{kind}", [Concatenate(dim=0)]))
        register_checkpoint_conversion_mapping("mae", conversions, overwrite=True)
        try:
            test()
        finally:
            register_checkpoint_conversion_mapping("mae", [], overwrite=True)

    def test_reverse_loading_mapping(self):
        self._with_a_conversion(super().test_reverse_loading_mapping)

    def test_can_load_from_already_mapped_keys(self):
        self._with_a_conversion(super().test_can_load_from_already_mapped_keys)


class MAEBackboneTest(BackboneTesterMixin, unittest.TestCase):
    all_model_classes = (hf_mae.MAEBackbone,)
    config_class = hf_mae.MAEConfig

    def setUp(self):
        self.model_tester = MAEModelTester(self)


class MAEImageProcessingTester(VisionImageProcessingTester):
    # The mixin looks for classes inside transformers.
    def _get_image_processing_classes(self):
        return {"torchvision": hf_mae.MAEImageProcessor, "pil": hf_mae.MAEImageProcessorPil}


class MAEImageProcessingTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = MAEImageProcessingTester

    # Our processor accepts only the number of channels it was made for; transformers' accepts any.
    def test_call_numpy_4_channels(self):
        self.image_processor_tester.num_channels = 4
        super().test_call_numpy_4_channels()

    # The mixin expects the class of the options in the processor's own file; our two processors share one.
    def test_valid_kwargs_set(self):
        for processor_class in self.image_processing_classes.values():
            self.assertIs(processor_class.valid_kwargs, hf_mae.image_processing_base_mae.MAEImageProcessorKwargs)
"""

DINOV2_TEST = """
import unittest

from transformers import Dinov2Backbone, Dinov2Config, Dinov2ForImageClassification, Dinov2Model

from ...test_backbone_common import BackboneTesterMixin
from ...test_image_processing_common import ImageProcessingTestMixin
from ..harness import VisionImageProcessingTester, VisionModelTest, VisionModelTester


class Dinov2ModelTester(VisionModelTester):
    config_class = Dinov2Config
    # One of the tests needs the conversion of the gated MLP's weights.
    more_numbers = {"use_swiglu_ffn": True}


class Dinov2ModelTest(VisionModelTest, unittest.TestCase):
    model_tester_class = Dinov2ModelTester
    all_model_classes = (Dinov2Model, Dinov2ForImageClassification, Dinov2Backbone)
    # The classifier has a mask token, which it does not use.
    test_all_params_have_gradient = False


class Dinov2BackboneTest(BackboneTesterMixin, unittest.TestCase):
    all_model_classes = (Dinov2Backbone,)
    config_class = Dinov2Config

    def setUp(self):
        self.model_tester = Dinov2ModelTester(self)


# The mixin finds the processors by the folder of this file.
class Dinov2ImageProcessingTester(VisionImageProcessingTester):
    pass


class Dinov2ImageProcessingTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = Dinov2ImageProcessingTester
"""

# Files that the common tests import and the distribution lacks; the last replaces pictures on the Hub.
STUBS = {
    "tests/__init__.py": "",
    "tests/exporters/__init__.py": "",
    "tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "tests/generation/__init__.py": "",
    "tests/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "tests/utils/__init__.py": "",
    "tests/utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
    "utils/fetch_hub_objects_for_ci.py": """
import tempfile

import numpy as np
from PIL import Image


def url_to_local_path(url):
    rows, columns = np.mgrid[0:480, 0:640]
    waves = [np.sin(rows / a) * np.cos(columns / b) for a, b in ((40, 70), (25, 90), (60, 30))]
    path = tempfile.mkdtemp() + "/picture.png"
    Image.fromarray(((np.stack(waves, axis=-1) + 1) * 127.5).astype(np.uint8)).save(path)
    return path
""",
}
SUITES = {
    "hf_mae": ("tests/models/mae/test_common_mae.py", MAE_TEST),
    "Dinov2": ("tests/models/dinov2/test_common_dinov2.py", DINOV2_TEST),
}


def unpack_tests(folder: Path) -> Path:
    """Download and unpack the source distribution of the installed transformers; returns its root."""
    options = ["--quiet", "--no-binary", ":all:", "--no-deps", "--no-build-isolation", "--dest", str(folder)]
    requirement = f"transformers=={transformers.__version__}"
    subprocess.run([sys.executable, "-m", "pip", "download", *options, requirement], check=True)
    (archive,) = folder.glob("transformers-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def write_testers(root: Path) -> None:
    """Put the stubs and the two testers where transformers would have them."""
    files = {**STUBS, "tests/models/__init__.py": "", "tests/models/harness.py": HARNESS}
    for path, text in SUITES.values():
        files[path] = text
        files[str(Path(path).parent / "__init__.py")] = ""
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        if not (root / path).exists():  # the distribution's own files are kept
            (root / path).write_text(text.lstrip("\n"))


def run_suite(root: Path, path: str, expression: str) -> dict[str, tuple[str, str]]:
    """Run one file of tests; returns its tests' names with "passed", "failed" or "skipped", and the reason."""
    report = root / "report.xml"
    report.unlink(missing_ok=True)
    package = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join([package, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "--tb=short", "-rf"]
    subprocess.run(
        [*command, "-W", "ignore", f"--junitxml={report}", "-k", expression, path],
        cwd=root,
        env={**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    if not report.exists():
        return {path: ("failed", "pytest wrote no report")}
    results: dict[str, tuple[str, str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname', '').rsplit('.', 1)[-1]}.{case.get('name')}"
        outcome, reason = "passed", ""
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                outcome = "skipped" if child.tag == "skipped" else "failed"
                reason = child.get("message") or ""
        # A test with sub-tests is reported several times, and fails if one of them fails.
        if results.get(name, ("", ""))[0] != "failed":
            results[name] = (outcome, reason)
    return results


def main() -> int:
    """Run both suites and compare them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-k", default="", metavar="EXPRESSION", help="run the tests that match, as in pytest")
    arguments = parser.parse_args()
    results: dict[str, dict[str, tuple[str, str]]] = {}
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        root = unpack_tests(Path(folder))
        write_testers(root)
        for name, (path, _) in SUITES.items():
            start = time.perf_counter()
            results[name] = run_suite(root, path, arguments.k)
            outcomes = [outcome for outcome, _ in results[name].values()]
            counts = ", ".join(f"{outcomes.count(outcome):3d} {outcome}" for outcome in ("passed", "failed", "skipped"))
            lines.append(f"{name}: {counts} in {time.perf_counter() - start:.0f} s")
    ours, peer = results.values()
    failed = [name for name, (outcome, _) in ours.items() if outcome == "failed"]
    skipped = [
        {name: reason for name, (outcome, reason) in one.items() if outcome == "skipped"} for one in (ours, peer)
    ]
    print(f"\ntransformers {transformers.__version__}, its common tests:", *lines, sep="\n")
    print(f"failed: {', '.join(failed) or 'none'}")
    for name, reason in skipped[0].items():
        if name.replace("MAE", "Dinov2") not in skipped[1]:
            print(f"skipped for ours only: {name}: {reason}")
    return int(bool(failed) or not ours or len(skipped[0]) > len(skipped[1]))


if __name__ == "__main__":
    sys.exit(main())

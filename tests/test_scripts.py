"""The scripts that the README shows, as a user starts them."""

import subprocess
import sys

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from runs import REPOSITORY

from hf_mae.training.log import read_events


def run_script(*words) -> str:
    """What a script prints; it has to go well."""
    done = subprocess.run(
        list(map(str, words)), cwd=REPOSITORY, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not (REPOSITORY / ".venv").exists(), reason="without .venv it would install one here")
def test_the_quickstart_trains_and_says_how_to_load(tmp_path):
    said = run_script("bash", "scripts/quickstart.sh", "--total_steps", 20, "--output_dir", tmp_path / "run")
    assert "from_pretrained" in said
    losses = [event["eval_loss"] for event in read_events(tmp_path / "run" / "metrics.jsonl") if "eval_loss" in event]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_the_chaos_drill_ends_with_equal_weights():
    said = run_script(sys.executable, "scripts/chaos_drill.py", "--seed", 1)
    assert "the same weights, bit by bit" in said


def test_the_fsdp_configuration_is_one():
    config = load_config_from_file(str(REPOSITORY / "scripts" / "accelerate_fsdp2.yaml"))
    assert isinstance(config, ClusterConfig)
    assert config.distributed_type == "FSDP"
    assert config.fsdp_config is not None
    assert config.fsdp_config["fsdp_version"] == 2

"""The scripts that the README shows, as a user starts them."""

import sys

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from runs import REPOSITORY, evaluations, run_script


@pytest.mark.slow
@pytest.mark.skipif(not (REPOSITORY / ".venv").exists(), reason="without .venv it would install one here")
def test_the_quickstart_trains_and_says_how_to_load(tmp_path):
    said = run_script("bash", "scripts/quickstart.sh", "--total_steps", 20, "--output_dir", tmp_path / "run")
    assert "from_pretrained" in said
    losses = evaluations(tmp_path / "run")
    assert losses[20] < losses[0]


@pytest.mark.slow
def test_the_chaos_drill_ends_with_equal_weights():
    said = run_script(sys.executable, "scripts/chaos_drill.py", "--seed", 1)
    assert "the same weights, bit for bit" in said


def test_the_fsdp_configuration_is_one():
    config = load_config_from_file(str(REPOSITORY / "scripts" / "accelerate_fsdp2.yaml"))
    assert isinstance(config, ClusterConfig)
    assert config.distributed_type == "FSDP"
    assert config.fsdp_config is not None
    assert config.fsdp_config["fsdp_version"] == 2

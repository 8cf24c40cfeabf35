"""What a run saves."""

from runs import arguments, run, start

from hf_mae.run_folder import RunFolder
from hf_mae.training import saving
from hf_mae.training.checkpoint import load_tensors


def test_the_first_save_of_a_run_is_read_back(tmp_path, monkeypatch, capfd):
    loaded = []

    def load(path):
        loaded.append(path.parent.name)
        return load_tensors(path)

    monkeypatch.setattr(saving, "load_tensors", load)
    run(tmp_path / "run", total_steps=3, save_steps=1)
    assert loaded == [".tmp-checkpoint-1", ".tmp-checkpoint-1"]  # weights and moments

    def other_bits(path):
        return {name: -value for name, value in load_tensors(path).items()}

    monkeypatch.setattr(saving, "load_tensors", other_bits)
    assert start(*arguments(tmp_path / "other", total_steps=3, save_steps=1)) == 2
    assert "reads back differently from what was written; check the disk" in capfd.readouterr().err
    assert RunFolder(tmp_path / "other").checkpoints() == []

"""Fine-tuning with averaged weights, cut off, and with a loss that diverges."""

import errno
from pathlib import Path

import pytest
import torch
from runs import events, mistake, start, weights_hash
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback
from tunings import arguments, parts_of, results, tune

from hf_mae import files


class Stop(Exception):
    pass


@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_a_run_that_was_cut_off_goes_on_to_the_same_weights(ema_decay, pretrained, tmp_path, monkeypatch):
    keys = {"model": pretrained, "mixup": 0.8, "cutmix": 1.0, "drop_path_rate": 0.3, "random_erasing": 0.5}
    keys |= {"total_steps": 12, "save_steps": 5, "eval_steps": 3, "ema_decay": ema_decay}
    whole = tune(tmp_path / "whole", **keys)
    from hf_mae.training.callbacks import LogCallback

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 7:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(LogCallback, "on_step_begin", stop)
        with pytest.raises(Stop):
            start("finetune", *arguments(tmp_path / "cut", **keys))
    assert (tmp_path / "cut" / "checkpoint-5").is_dir()
    cut = tune(tmp_path / "cut", **keys, resume="auto")
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, cut))
    assert max((first[name] - second[name]).abs().max().item() for name in first) < 1e-6
    losses = [{event["step"]: event["loss"] for event in events(folder) if "loss" in event} for folder in (whole, cut)]
    assert losses[0].keys() == losses[1].keys() == set(range(1, 13))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_a_final_model_that_could_not_be_written_is_written_by_a_resume_without_another_step(
    ema_decay, pretrained, tmp_path, monkeypatch, capsys
):
    keys = {"model": pretrained, "total_steps": 6, "total_batch_size": 16, "ema_decay": ema_decay}
    whole = tune(tmp_path / "whole", **keys)
    with monkeypatch.context() as full:
        full.setattr(files, "replace_files", no_room)
        message = mistake(capsys, "finetune", *arguments(tmp_path / "cut", **keys))
    assert f"the final model can't be written into {tmp_path / 'cut'} (" in message
    cut = tune(tmp_path / "cut", **keys, resume="auto")
    assert weights_hash(cut) == weights_hash(whole)
    assert results(cut)["figures"] == results(whole)["figures"]
    assert max(event["step"] for event in events(cut)) == 6


def no_room(folder, write):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_averaged_weights_are_what_is_scored_and_saved(pretrained, tmp_path):
    parts = parts_of(tmp_path / "out", model=pretrained, ema_decay=0.9, total_steps=6, blr=0.05, eval_steps=4,
                     warmup_steps=1)  # fmt: skip
    model = parts["model"]
    weights = [{name: p.detach().clone() for name, p in model.named_parameters()}]

    class Look(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            weights.append({name: p.detach().clone() for name, p in model.named_parameters()})

    parts["callbacks"].append(Look())
    trainer = Trainer(**parts)
    trainer.train()
    average = weights[0]
    averages = [average]
    for step in weights[1:]:
        average = {name: 0.9 * average[name] + 0.1 * step[name] for name in average}
        averages.append(average)
    assert len(weights) == 7
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), average[name], atol=1e-6, rtol=1e-5)
        assert not torch.allclose(parameter, weights[-1][name], atol=1e-5), name
    logged = {log["step"]: log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log}
    assert set(logged) == {0, 4, 6}
    for step in (4, 6):  # a score in between is of the average, and leaves the weights as they are
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(averages[step][name])
        assert trainer.evaluate()["eval_loss"] == pytest.approx(logged[step], rel=1e-5)


def test_the_average_is_what_the_command_saves(pretrained, tmp_path):
    plain, averaged = (
        load_file(tune(tmp_path / str(decay), model=pretrained, ema_decay=decay, total_steps=1, warmup_steps=0,
                       blr=0.05) / "model.safetensors")
        for decay in (None, 0.75)
    )  # fmt: skip
    first = load_file(Path(pretrained) / "model.safetensors")
    name = "mae.layers.1.mlp.fc1.weight"
    torch.testing.assert_close(averaged[name], 0.75 * first[name] + 0.25 * plain[name], atol=1e-6, rtol=1e-5)
    assert (plain[name] - first[name]).abs().max() > 1e-4


def test_a_loss_that_is_no_number_ends_the_run_with_one_line(pretrained, tmp_path, capsys):
    words = arguments(tmp_path / "out", model=pretrained, blr=1e30, warmup_steps=0)
    assert "the loss is nan at step" in mistake(capsys, "finetune", *words)

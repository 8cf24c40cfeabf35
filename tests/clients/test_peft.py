"""peft: adapters on each of our models and on the peer, their training, and the way to disk and back."""

import copy

import pytest
import torch
from peers import CLASSIFIERS, ENCODERS, PRETRAINERS, batch_of, labelled_rows, make, masked_rows, need
from tiny import pixels

peft = need("peft")

TASKS = {
    None: (PRETRAINERS, masked_rows),
    "FEATURE_EXTRACTION": (ENCODERS, None),
    "SEQ_CLS": (CLASSIFIERS, labelled_rows),
}
PAIRS = [(task, name) for task, (kinds, _) in TASKS.items() for name in kinds]


def targets(model, kind: str) -> list[str]:
    """The names of a model's attention or MLP layers, whatever this version calls them."""
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    found = [name for name in linear if ("attention" in name or "attn" in name) == (kind == "attention")]
    return [name for name in found if "layer" in name and "decoder" not in name]


def lora(model, task, **settings):
    return peft.LoraConfig(**{"r": 2, "target_modules": targets(model, "attention"), "task_type": task} | settings)


def ia3(model, task):
    mlp = [name for name in targets(model, "mlp") if name.endswith("fc2")]
    return peft.IA3Config(target_modules=[*targets(model, "attention"), *mlp], feedforward_modules=mlp, task_type=task)


ADAPTERS = {
    "lora": lora,
    "dora": lambda model, task: lora(model, task, use_dora=True),
    "all_linear": lambda model, task: lora(model, task, target_modules="all-linear"),
    "ia3": ia3,
}


def outcome(model, task) -> torch.Tensor:
    """A loss, or the mean square of the features."""
    rows = TASKS[task][1]
    if rows is None:
        return model(pixel_values=pixels(8)).last_hidden_state.square().mean()
    return model(**batch_of(rows())).loss


def train(model, task, steps: int = 2) -> list[float]:
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    losses = []
    for _ in range(steps):
        loss = outcome(model, task)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize(("task", "name"), PAIRS)
def test_an_adapter_trains_is_saved_loaded_and_merged(adapter, task, name, tmp_path):
    base = make(TASKS[task][0], name)
    model = peft.get_peft_model(copy.deepcopy(base), ADAPTERS[adapter](base, task))
    frozen = base.state_dict()
    first, second = train(model, task)
    assert first == pytest.approx(outcome(base, task).item(), rel=1e-5), "an untrained adapter changes nothing"
    assert second < first
    model.eval()
    after = outcome(model, task).item()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert outcome(loaded, task).item() == pytest.approx(after, rel=1e-5)
    for key, value in model.get_base_model().state_dict().items():
        if (plain := key.replace(".base_layer", "")) in frozen:
            assert torch.equal(value, frozen[plain]), f"the adapter's training changed {plain}"
    merged = loaded.merge_and_unload()
    assert type(merged) is type(base)
    assert outcome(merged, task).item() == pytest.approx(after, rel=1e-4)
    assert merged.state_dict().keys() == frozen.keys()


@pytest.mark.parametrize("task", [None, "SEQ_CLS"])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_modules_to_save_train_the_head_and_return_with_it(name, task, tmp_path):
    base = make(CLASSIFIERS, name)
    model = peft.get_peft_model(copy.deepcopy(base), lora(base, task, modules_to_save=["classifier"]))
    first, second = train(model, "SEQ_CLS")
    assert second < first
    head = model.get_base_model().classifier.modules_to_save["default"].weight
    assert not torch.equal(head, base.classifier.weight)
    model.eval().save_pretrained(tmp_path)
    merged = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).merge_and_unload()
    assert torch.equal(merged.classifier.weight, head)
    assert outcome(merged.eval(), "SEQ_CLS").item() == pytest.approx(outcome(model, "SEQ_CLS").item(), rel=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = type(base).from_pretrained(tmp_path / "merged").eval()
    assert outcome(again, "SEQ_CLS").item() == pytest.approx(outcome(model, "SEQ_CLS").item(), rel=1e-4)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_dropout_and_rank_stabilisation_work_with_gradient_checkpointing(name):
    base = make(CLASSIFIERS, name)
    model = peft.get_peft_model(base, lora(base, None, lora_dropout=0.1, use_rslora=True)).train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    outcome(model, "SEQ_CLS").backward()
    gradients = [p.grad for key, p in model.named_parameters() if "lora_B" in key]
    assert gradients
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


def test_peft_refuses_our_patch_embedding_by_its_name():
    # Not an nn.Conv2d, unlike the peer's: it takes patches.
    base = make(CLASSIFIERS, "ours")
    with pytest.raises(ValueError, match=r"Target module MAEPatchEmbed.* is not supported"):
        peft.get_peft_model(base, lora(base, None, target_modules=["patch_embed"]))


def test_the_patch_embedding_may_be_trained_whole_beside_an_adapter(tmp_path):
    base = make(CLASSIFIERS, "ours")
    model = peft.get_peft_model(copy.deepcopy(base), lora(base, None, modules_to_save=["patch_embed", "classifier"]))
    first, second = train(model, "SEQ_CLS")
    assert second < first
    model.eval().save_pretrained(tmp_path)
    merged = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).merge_and_unload().eval()
    assert not torch.equal(merged.mae.embeddings.patch_embed.weight, base.mae.embeddings.patch_embed.weight)
    assert outcome(merged, "SEQ_CLS").item() == pytest.approx(outcome(model, "SEQ_CLS").item(), rel=1e-4)

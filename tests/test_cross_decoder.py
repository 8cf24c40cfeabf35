"""The cross-attention decoder: against itself done slowly, what it predicts when, and what goes with it."""

import pytest
import torch
import torch.nn.functional as F
from runs import evaluations, run, weights_hash
from tiny import draw_noise, pixels, tiny, tiny_config
from torch import nn
from transformers import AutoModel, AutoModelForPreTraining

from hf_mae import MAEConfig, MAEForPreTraining, MAEModel
from hf_mae.layers_mae import MAEMLP, MAEAttention, sincos_table
from hf_mae.masking_mae import normalize_patches, patchify
from hf_mae.visualize.reconstruction import reconstruct

CROSS = {"decoder_attention": "cross"}
QUARTER = {**CROSS, "prediction_ratio": 0.25}
FUSED = {**QUARTER, "decoder_fusion": True}
variants = pytest.mark.parametrize("overrides", [CROSS, QUARTER, FUSED], ids=["all", "quarter", "fused quarter"])


def norm(module: nn.LayerNorm, vector: torch.Tensor) -> torch.Tensor:
    centred = vector - vector.mean()
    return centred / ((centred**2).mean() + 1e-6) ** 0.5 * module.weight.double() + module.bias.double()


def linear(module: nn.Linear, vector: torch.Tensor) -> torch.Tensor:
    return module.weight.double() @ vector + module.bias.double()


def slow_prediction(model: MAEForPreTraining, stages: list[torch.Tensor], patch: int) -> torch.Tensor:
    """What the decoder predicts (V,) for one patch of one image, by loops over blocks, heads and tokens, in float64.

    `stages` are (1 + K, D): the outputs of the encoder's embedding and blocks, the last one's after the final norm.
    """
    decoder, heads = model.decoder, model.config.decoder_num_attention_heads
    E = model.config.decoder_hidden_size
    query = decoder.mask_token[0, 0].double() + sincos_table((4, 4), E)[1 + patch].double()
    for number, block in enumerate(decoder.decoder_layers):
        memory = stages[-1]
        if decoder.fusion is not None:
            weights = decoder.fusion.weight[number].double()
            memory = sum(weight * stage for weight, stage in zip(weights, stages, strict=True))
            memory = torch.stack([norm(decoder.fusion.norms[number], token) for token in memory])
        asked = linear(block.attention.q, norm(block.norm1, query))
        told = [linear(block.attention.kv, token) for token in memory]
        mixed = []
        for head in range(heads):
            part = slice(head * E // heads, (head + 1) * E // heads)
            scores = torch.stack([asked[part] @ token[:E][part] for token in told]) / (E // heads) ** 0.5
            mixed.append(sum(weight * token[E:][part] for weight, token in zip(scores.softmax(0), told, strict=True)))
        query = query + linear(block.attention.proj, torch.cat(mixed))
        query = query + linear(block.mlp.fc2, F.gelu(linear(block.mlp.fc1, norm(block.norm2, query))))
    return linear(decoder.decoder_pred, norm(decoder.decoder_norm, query))


@variants
@pytest.mark.parametrize("norm_pix_loss", [False, True])
@torch.no_grad()
def test_loss_and_predictions_are_those_of_the_decoder_done_slowly(overrides, norm_pix_loss):
    model = tiny(MAEForPreTraining, norm_pix_loss=norm_pix_loss, **overrides).train()
    images, noise = pixels(3), draw_noise(3)
    output = model(images, noise=noise)
    encoded = model.mae(images, mask_ratio=0.75, noise=noise, output_hidden_states=True)
    count = 12 if overrides is CROSS else 4
    errors = []
    for image in range(3):
        stages = [state[image].double() for state in (*encoded.hidden_states[:-1], encoded.last_hidden_state)]
        by_noise = sorted(range(16), key=lambda patch: noise[image, patch])
        wanted = by_noise[4 : 4 + count]  # 4 of 16 are kept, the next ones are predicted
        for patch in range(16):
            logits = output.logits[image, patch]
            if patch not in wanted:
                assert not logits.any()
                continue
            row, column = divmod(patch, 4)
            target = images[image, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].permute(1, 2, 0).flatten()
            target = normalize_patches(target.double()) if norm_pix_loss else target.double()
            slow = slow_prediction(model, stages, patch)
            torch.testing.assert_close(logits.double(), slow, atol=1e-5, rtol=1e-5)
            errors.append(float(((slow - target) ** 2).mean()))
    assert output.loss.item() == pytest.approx(sum(errors) / (3 * count), rel=1e-5)


@variants
def test_in_evaluation_all_removed_patches_are_predicted_each_as_if_it_were_alone(overrides):
    model, images = tiny(MAEForPreTraining, **overrides), pixels()
    output = model(images, noise=draw_noise())
    assert torch.equal(output.logits.any(dim=-1), output.mask == 1)
    encoded = model.mae(images, mask_ratio=0.75, noise=draw_noise())
    for place in range(12):
        ids = encoded.ids_restore.argsort(dim=1)[:, 4 + place, None]
        alone = model.decoder(encoded.features or encoded.last_hidden_state, ids, (4, 4))
        expected = output.logits.gather(1, ids.unsqueeze(-1).expand(-1, -1, 192))
        torch.testing.assert_close(alone.gather(1, ids.unsqueeze(-1).expand(-1, -1, 192)), expected, atol=1e-5, rtol=0)
    # The loss is that of all removed patches too, whatever part training looks at.
    errors = (output.logits - model.patch_target(images)).square().mean(dim=-1) * output.mask
    assert output.loss.item() == pytest.approx((errors.sum() / output.mask.sum()).item(), rel=1e-5)


def test_predicting_a_part_changes_neither_encoder_nor_masks_nor_other_predictions():
    model, images, noise = tiny(MAEForPreTraining, **CROSS).train(), pixels(), draw_noise()
    whole = model(images, noise=noise)
    model.config.prediction_ratio = 0.25
    part = model(images, noise=noise)
    assert torch.equal(part.mask, whole.mask)
    assert torch.equal(part.ids_restore, whole.ids_restore)
    predicted = part.logits.any(dim=-1)
    assert predicted.sum(dim=1).tolist() == [4, 4]
    assert not (predicted & (part.mask == 0)).any()
    torch.testing.assert_close(part.logits[predicted], whole.logits[predicted], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("removed", "predicted", "count"), [(0.75, 0.75, 12), (0.75, 0.1, 2), (0.7, 0.7, 12)])
def test_as_many_patches_are_predicted_as_a_mask_of_that_ratio_would_remove(removed, predicted, count):
    model = tiny(MAEForPreTraining, decoder_attention="cross", mask_ratio=removed, prediction_ratio=predicted)
    logits = model.train()(pixels(), noise=draw_noise()).logits
    assert logits.any(dim=-1).sum(dim=1).tolist() == [count, count]


def test_all_that_a_mask_of_ones_own_or_a_smaller_ratio_removes_is_predicted():
    model = tiny(MAEForPreTraining, **QUARTER).train()
    mask = torch.zeros(2, 16)
    mask[0, 5:15] = mask[1, 2:12] = 1
    assert torch.equal(model(pixels(), mask=mask).logits.any(dim=-1), mask == 1)
    few = model(pixels(), mask_ratio=0.125)
    assert torch.equal(few.logits.any(dim=-1), few.mask == 1)
    assert model(pixels(), mask_ratio=0, return_loss=False).logits.abs().max() == 0


def test_cells_are_predicted_whole():
    model = tiny(MAEForPreTraining, mask_cell=2, **QUARTER).train()
    cells = model(pixels(), noise=draw_noise()).logits.any(dim=-1).view(2, 2, 2, 2, 2).transpose(2, 3).flatten(3)
    assert cells.all(dim=-1).sum().item() == 2
    assert cells.any(dim=-1).sum().item() == 2


@variants
def test_every_parameter_gets_a_gradient_the_mask_token_and_the_fusion_among_them(overrides):
    model = tiny(MAEForPreTraining, **overrides).train()
    model(pixels()).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []
    assert ("decoder.fusion.weight" in dict(model.named_parameters())) is (overrides is FUSED)


def test_patches_that_are_not_predicted_get_no_gradient():
    model = tiny(MAEForPreTraining, **QUARTER).train()
    output = model(pixels(), noise=draw_noise())
    (gradient,) = torch.autograd.grad(output.loss, output.logits)
    assert torch.equal(gradient.any(dim=-1), output.logits.any(dim=-1))


def test_chosen_patches_are_those_of_all_patches():
    images, ids = pixels(3, 5, 48, 32), torch.stack([torch.randperm(48)[:7] for _ in range(3)])
    every = patchify(images, (8, 4))
    expected = torch.stack([one[chosen] for one, chosen in zip(every, ids, strict=True)])
    assert torch.equal(patchify(images, (8, 4), ids), expected)
    frames = images.to(memory_format=torch.channels_last)
    assert torch.equal(patchify(frames, (8, 4), ids), expected)


@variants
def test_training_lowers_the_loss_and_starts_as_the_paper_says(overrides):
    torch.manual_seed(0)
    model = MAEForPreTraining(tiny_config(**overrides)).train()
    attention = model.decoder.decoder_layers[0].attention
    for layer in (attention.q, attention.kv):  # Xavier: uniform up to sqrt(6 / (in + out))
        bound = (6 / sum(layer.weight.shape)) ** 0.5
        assert 0.9 * bound < layer.weight.abs().max() <= bound
        assert not layer.bias.any()
    if overrides is FUSED:
        deep = {**NARROW, **FUSED, "num_hidden_layers": 48, "decoder_num_hidden_layers": 64}
        wide = MAEForPreTraining(MAEConfig(**deep))
        assert wide.decoder.fusion.weight.std().item() == pytest.approx(1 / 7, rel=0.1)  # of 49 features
        assert wide.decoder.fusion.weight.mean().abs() < 0.01
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(12):
        loss = model(pixels(4), noise=draw_noise(4)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


NARROW = {
    "image_size": 16, "patch_size": 8, "hidden_size": 4, "num_attention_heads": 1, "intermediate_size": 4,
    "decoder_hidden_size": 4, "decoder_num_attention_heads": 1, "decoder_intermediate_size": 4,
}  # fmt: skip


@variants
def test_eager_and_sdpa_agree_and_checkpointing_gives_the_same_gradients(overrides):
    model, images, noise = tiny(MAEForPreTraining, **overrides).train(), pixels(), draw_noise()
    gradients, runs = [], []
    for module in model.modules():
        if isinstance(module, MAEMLP):
            module.register_forward_pre_hook(lambda *_: runs.append(1))
    for change in (lambda: None, model.gradient_checkpointing_enable, lambda: model.set_attn_implementation("eager")):
        change()
        model.zero_grad()
        model(images, noise=noise).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert len(runs) == 6 + 12 + 12
    assert all(torch.equal(one, other) for one, other in zip(*gradients[:2], strict=True))
    torch.testing.assert_close(gradients[2], gradients[0], atol=1e-5, rtol=1e-4)
    assert {module.config._attn_implementation for module in model.modules() if isinstance(module, MAEAttention)} == {
        "eager"
    }


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [QUARTER, FUSED], ids=["quarter", "fused"])
def test_training_compiles_to_one_graph_once(overrides):
    torch._dynamo.reset()
    model = tiny(MAEForPreTraining, num_hidden_layers=2, **overrides).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(3):
            results = []
            for run in (model, compiled):
                model.zero_grad()
                loss = run(pixels(seed=step), noise=draw_noise(seed=step)).loss
                loss.backward()
                results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
            torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=1e-5)


def test_under_autocast_loss_and_gradients_stay_close_to_float32():
    model = tiny(MAEForPreTraining, **FUSED).train()
    exact = model(pixels(), noise=draw_noise()).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(pixels(), noise=draw_noise()).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)
    assert model.decoder.fusion.weight.grad.dtype == torch.float32


# ---------------------------------------------------------------------------------------------- save and load


@variants
def test_a_saved_model_loads_with_the_same_output_and_its_encoder_alone(overrides, tmp_path):
    model = tiny(MAEForPreTraining, **overrides)
    model.save_pretrained(tmp_path)
    loaded, report = MAEForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert all(getattr(loaded.config, key) == value for key, value in overrides.items())
    assert torch.equal(loaded(pixels()).logits, model(pixels()).logits)
    assert torch.equal(AutoModelForPreTraining.from_pretrained(tmp_path)(pixels()).logits, model(pixels()).logits)
    encoder, report = MAEModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(encoder(pixels()).last_hidden_state, model.mae(pixels()).last_hidden_state)
    assert encoder(pixels()).features is None
    assert type(AutoModel.from_pretrained(tmp_path)) is MAEModel


def test_what_a_checkpoint_lacks_starts_as_the_constructor_makes_it(tmp_path):
    tiny(MAEModel, **FUSED).save_pretrained(tmp_path)
    loaded, report = MAEForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert {name.split(".")[1] for name in report["missing_keys"]} == {
        "mask_token", "fusion", "decoder_pos_embed", "decoder_layers", "decoder_norm", "decoder_pred"
    }  # fmt: skip
    decoder = loaded.decoder
    assert torch.equal(decoder.decoder_pos_embed.table, sincos_table((4, 4), 32))
    assert 0 < decoder.fusion.weight.abs().max() < 3
    assert all(torch.equal(layer.weight, torch.ones(48)) for layer in decoder.fusion.norms)
    assert decoder.mask_token.std().item() == pytest.approx(0.02, rel=0.5)


def test_it_moves_to_another_size_and_channel_count(tmp_path):
    model = tiny(MAEForPreTraining, **FUSED)
    model.save_pretrained(tmp_path)
    moved = MAEForPreTraining.from_pretrained(tmp_path, image_size=(48, 40), num_channels=5)
    output = moved(pixels(2, 5, 48, 40))
    assert output.logits.shape == (2, 30, 64 * 5)
    assert output.loss.isfinite()
    bigger = model(pixels(2, 3, 64), interpolate_pos_encoding=True)
    assert torch.equal(bigger.logits.any(dim=-1), bigger.mask == 1)


def test_pictures_show_all_removed_patches():
    model, images = tiny(MAEForPreTraining, **QUARTER), pixels()
    result = reconstruct(model, images, noise=draw_noise())
    where = result.removed.expand_as(images)
    assert torch.equal(result.pasted[~where], images[~where])
    assert (result.pasted[where] != 0).all()
    assert not result.masked[where].any()


def test_a_run_of_the_command_trains_it_and_goes_on_exactly(tmp_path):
    options = {**FUSED, "mask_ratio": 0.75, "save_steps": 6, "num_workers": 1}
    whole = run(tmp_path / "whole", **options)
    assert evaluations(whole)[12] < 0.9 * evaluations(whole)[0]
    again = run(tmp_path / "again", resume=whole / "checkpoint-6", **options)
    assert weights_hash(again) == weights_hash(whole)
    assert AutoModelForPreTraining.from_pretrained(whole).config.prediction_ratio == 0.25


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"prediction_ratio": 0.25}, r"prediction_ratio 0.25 needs decoder_attention cross, not self"),
        ({"decoder_fusion": True}, r"decoder_fusion needs decoder_attention cross, not self"),
        (
            {**CROSS, "prediction_ratio": 0.8},
            r"prediction_ratio 0.8 lies outside \(0, mask_ratio 0.75\]: .* use e.g. 0.25",
        ),
        ({**CROSS, "prediction_ratio": 0}, r"prediction_ratio 0 lies outside \(0, mask_ratio 0.75\]"),
        ({"decoder_attention": "crossed"}, r"decoder_attention"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides, message):
    with pytest.raises(Exception, match=message) as error:
        tiny_config(**overrides)
    if overrides != {"decoder_attention": "crossed"}:
        assert "\n" not in str(error.value).split(": ", 1)[-1]

"""The encoder with a linear head: fine-tuning and linear probing (Appendix A.1)."""

# Shape letters in this file
#   B images   C channels   H, W pixels

from typing import Unpack

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils.generic import can_return_tuple

from .configuration_mae import MAEConfig
from .modeling_mae import MAEKwargs, MAEModel, MAEPreTrainedModel


class MAEForImageClassification(MAEPreTrainedModel):
    """The encoder with a linear head on the pooled tokens, for fine-tuning (Appendix A.1, "End-to-end fine-tuning").

    With mean pooling the pooled vector is normalised (`fc_norm`) instead of the tokens, as in the original.
    """

    # The loss is always a mean over the batch, so a Trainer must average accumulated steps.
    accepts_loss_kwargs = False
    _keys_to_ignore_on_load_unexpected = [r"^decoder\.", r"^(mae\.)?norm\."]

    def __init__(self, config: MAEConfig):
        super().__init__(config)
        self.num_labels = int(config.num_labels or 0)
        mean = config.pooling == "mean"
        self.mae = MAEModel(config, add_final_norm=not mean)
        self.fc_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if mean else nn.Identity()
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self.classifier:
            init.trunc_normal_(self.classifier.weight, std=self.config.head_initializer_range)
            init.zeros_(self.classifier.bias)
        else:
            super()._init_weights(module)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[MAEKwargs],
    ) -> ImageClassifierOutput:
        """Classify images; no patch is removed.

        Args:
            pixel_values: (B, C, H, W) normalised pixels.
            labels: (B,) class indices, or (B, num_labels) float rows that sum to 1 (mixup, cutmix). With
                `config.problem_type` "multi_label_classification": (B, num_labels) of 0 and 1. With "regression":
                (B, num_labels) numbers, or (B,) if `num_labels` is 1.
            interpolate_pos_encoding: accept images whose size differs from `config.image_size`.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Raises:
            ValueError: if the labels have none of these forms, or channels or sizes don't fit.
            TypeError: for an unknown argument, `mask_ratio` among them.
        """
        self._refuse_unknown(kwargs)
        outputs = self.mae(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, return_dict=True, **kwargs)
        logits = self.classifier(self.fc_norm(outputs.pooler_output))
        loss = None if labels is None else self.classification_loss(logits, labels)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def classification_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """() float32 mean loss: cross-entropy, binary cross-entropy or squared error, by `config.problem_type`.

        Args:
            logits: (B, num_labels) outputs of the classifier.
            labels: as for `forward`.

        Raises:
            ValueError: if the labels have none of these forms.
        """
        logits = logits.float()
        if self.config.problem_type == "regression":
            rows = labels.unsqueeze(1) if labels.ndim == 1 and logits.shape[1] == 1 else labels
            return F.mse_loss(logits, self._one_value_per_logit(rows, logits))
        if self.config.problem_type == "multi_label_classification":
            return F.binary_cross_entropy_with_logits(logits, self._one_value_per_logit(labels, logits))
        are_classes = labels.ndim == 1 and not labels.is_floating_point()
        if are_classes or _are_probabilities(labels, logits):
            return F.cross_entropy(logits, labels)
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} and type {labels.dtype} are neither class indices (B,) nor rows of "
            f"{logits.shape[1]} that sum to 1; for several labels or numbers set config.problem_type to "
            '"multi_label_classification" or "regression"'
        )

    def _one_value_per_logit(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Labels as float (B, num_labels); the losses would broadcast another shape instead of failing."""
        if labels.shape != logits.shape:
            raise ValueError(
                f"labels of shape {tuple(labels.shape)} don't fit {tuple(logits.shape)} (images, num_labels) that "
                f'problem_type "{self.config.problem_type}" needs; give {logits.shape[1]} values per image, or change '
                "num_labels"
            )
        return labels.float()


def _are_probabilities(labels: torch.Tensor, logits: torch.Tensor) -> bool:
    """Whether labels are float rows that sum to 1."""
    if labels.shape != logits.shape or not labels.is_floating_point():
        return False
    return torch.allclose(labels.sum(dim=1), labels.new_ones(len(labels)), atol=1e-2)

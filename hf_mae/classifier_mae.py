"""The encoder with a linear head: fine-tuning and linear probing (Appendix A.1)."""

# Shape letters in this file
#   B images   C channels   H, W pixels

from typing import Literal, Unpack

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils.generic import can_return_tuple

from .configuration_mae import MAEConfig
from .modeling_mae import MAEKwargs, MAEModel, MAEPreTrainedModel

ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]


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
            labels: with `config.problem_type` "single_label_classification": (B,) or (B, 1) class indices, or (B,
                num_labels) floats, the probabilities of the classes (mixup, cutmix). With
                "multi_label_classification": (B, num_labels) of 0 and 1. With "regression": (B, num_labels) numbers, or
                (B,) if `num_labels` is 1. Without `config.problem_type`, the first labels decide: see `problem_of`.
            interpolate_pos_encoding: don't warn about images whose size differs from `config.image_size`.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Raises:
            ValueError: if the labels have none of these forms, or channels or sizes don't fit.
            TypeError: for an unknown argument, `mask_ratio` among them.
        """
        known = self._known(kwargs, "num_items_in_batch") | {"return_dict": True}
        outputs = self.mae(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **known)
        logits = self.classifier(self.fc_norm(outputs.pooler_output))
        loss = None if labels is None else self.classification_loss(logits, labels)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def problem_of(self, labels: torch.Tensor) -> ProblemType:
        """The problem type that labels mean, as in transformers.

        One label is a regression, integers of any type are classes, floats are several labels. Soft labels (mixup) need
        the `problem_type` "single_label_classification": their rows can't be told from several labels.
        """
        if self.num_labels == 1:
            return "regression"
        several = labels.is_floating_point() or labels.dtype == torch.bool
        return "multi_label_classification" if several else "single_label_classification"

    def classification_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """() float32 mean loss: cross-entropy, binary cross-entropy or squared error, by `config.problem_type`.

        Without one, `problem_of` the first labels is stored in the config, so that no later batch changes the loss.

        Args:
            logits: (B, num_labels) outputs of the classifier.
            labels: as for `forward`.

        Raises:
            ValueError: if the labels have none of these forms.
        """
        logits = logits.float()
        problem = self.config.problem_type or self.problem_of(labels)
        loss = self._loss_of(problem, logits, labels)
        self.config.problem_type = problem  # not before the labels are known to fit
        return loss

    def _loss_of(self, problem: str, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if problem == "regression":
            rows = labels.unsqueeze(1) if labels.ndim == 1 and logits.shape[1] == 1 else labels
            return F.mse_loss(logits, self._one_value_per_logit(problem, rows, logits))
        if problem == "multi_label_classification":
            return F.binary_cross_entropy_with_logits(logits, self._one_value_per_logit(problem, labels, logits))
        if labels.is_floating_point():
            return F.cross_entropy(logits, self._one_value_per_logit(problem, labels, logits))
        if labels.shape not in ((len(logits),), (len(logits), 1)):
            raise ValueError(
                f"labels of shape {tuple(labels.shape)} are not the class indices of {len(logits)} images; for several "
                'labels of an image give floats, and set config.problem_type to "multi_label_classification"'
            )
        return F.cross_entropy(logits, labels.flatten().long())

    def _one_value_per_logit(self, problem: str, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Labels as float (B, num_labels); the losses would broadcast another shape instead of failing."""
        if labels.shape != logits.shape:
            raise ValueError(
                f"labels of shape {tuple(labels.shape)} don't fit {tuple(logits.shape)} (images, num_labels) that "
                f'problem_type "{problem}" needs; give {logits.shape[1]} values per image, or change '
                "num_labels"
            )
        return labels.float()

"""A loss with a weight for each class, for data with many images of some classes and few of others."""

# Shape letters in this file
#   B images of a micro-batch   n training images   K classes

import torch
from torch.nn import functional as F


def balanced_weights(targets: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Weights of classes by their numbers of training images.

    With one class per image, n / (classes with images * images of the class), as scikit-learn's "balanced": an image's
    weight is then 1 on average. With any number of classes per image, images without the class / images with it, the
    weight of the images that have it. A class that no image has, or every image, keeps the weight 1.

    Args:
        targets: (n,) int64 class indices, or (n, K) float32 of 0 and 1.
        num_classes: K.

    Returns:
        (K,) float32.
    """
    if targets.ndim == 1:
        counts = torch.bincount(targets, minlength=num_classes)
        weights = len(targets) / (counts * (counts > 0).sum())
    else:
        counts = targets.sum(dim=0)
        weights = (len(targets) - counts) / counts
    return torch.where((counts > 0) & (counts < len(targets)), weights, 1.0)


class WeightedLoss:
    """A Trainer's `compute_loss_func`: cross-entropy or binary cross-entropy with a weight for each class.

    It is the mean over all images of an optimizer step, on all processes. It isn't divided by the sum of their weights,
    because then an image's share would depend on the others of its micro-batch, and so on how a step is split up.
    Without gradients, as in evaluation, it is the plain loss of the model.

    Args:
        weights: (K,) float32 weights of the classes.
        several: whether an image may have any number of classes.
    """

    def __init__(self, weights: torch.Tensor, several: bool):
        self.weights, self.several = weights, several

    def __call__(
        self, outputs: dict[str, torch.Tensor], labels: torch.Tensor, num_items_in_batch: torch.Tensor
    ) -> torch.Tensor:
        """() float32; Trainer doesn't scale it for accumulated micro-batches.

        Args:
            outputs: `logits` (B, K).
            labels: (B,) class indices, or (B, K) float32: shares of the classes that sum to 1, or 0 and 1.
            num_items_in_batch: numbers in the labels of the whole step, as Trainer counts them.
        """
        logits = outputs["logits"].float()
        weights = self.weights.to(logits.device) if torch.is_grad_enabled() else None
        if self.several:
            losses = F.binary_cross_entropy_with_logits(logits, labels, pos_weight=weights, reduction="none").mean(1)
        else:
            losses = F.cross_entropy(logits, labels, weights, reduction="none")
        images = num_items_in_batch / labels[0].numel()
        return losses.sum() / images

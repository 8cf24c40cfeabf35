"""Weighted k-nearest-neighbour classification on frozen features (protocol of arXiv:1805.01978, as in DINO)."""

import torch
import torch.nn.functional as F

from .features import Features


def knn_accuracy(
    train: Features, test: Features, ks: tuple[int, ...] = (10, 20, 100, 200), temperature: float = 0.07
) -> dict[str, float]:
    """Top-1 accuracy of neighbours' votes, weighted by exp(cosine similarity / temperature).

    Args:
        train: the bank.
        test: what is classified.
        ks: numbers of neighbours; a k above the size of the bank takes all of it.
        temperature: of the weights.

    Returns:
        `knn_top1_k{k}` for each k, in percent.
    """
    bank, classes = F.normalize(train.values, dim=1), int(train.labels.max()) + 1
    correct = dict.fromkeys(ks, 0)
    # In chunks, so that the similarities of a million features need no more than a few hundred MB.
    chunk = max(1, 2**26 // len(bank))
    for start in range(0, len(test.labels), chunk):
        queries = F.normalize(test.values[start : start + chunk], dim=1)
        similarity, neighbours = (queries @ bank.T).topk(min(max(ks), len(bank)), dim=1)
        votes, weights = train.labels[neighbours], (similarity / temperature).exp()
        for k in ks:
            scores = torch.zeros(len(queries), classes).scatter_add_(1, votes[:, :k], weights[:, :k])
            correct[k] += int((scores.argmax(dim=1) == test.labels[start : start + chunk]).sum())
    return {f"knn_top1_k{k}": 100 * count / len(test.labels) for k, count in correct.items()}

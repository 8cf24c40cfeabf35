"""`hf-mae evaluate knn`: weighted k-nearest-neighbour classification on frozen features.

The protocol of arXiv:1805.01978, as in DINO.
"""

# Shape letters in this file
#   n rows of the bank   q queries of a chunk   D width   K classes

from typing import Any

import torch
import torch.nn.functional as F

from ..keys.evaluation_keys import KnnRecipe
from .commands import Evaluation
from .table import Features

# Rows compared at once: 1,024 x 65,536 similarities are 256 MiB.
QUERIES, BANK = 1024, 65_536


def evaluate_knn(recipe: KnnRecipe) -> dict[str, Any] | None:
    """kNN accuracy of frozen features: the entry of results.json; None on all but the main process.

    Raises:
        UserError: for anything a user can fix; one line with the remedy.
    """
    evaluation = Evaluation(recipe, "mean")
    device = evaluation.accelerator.device
    protocol = {"name": "knn", "k": recipe.k, "temperature": recipe.temperature}
    return evaluation.score_tables(
        protocol, lambda train, test: knn_accuracy(train, test, tuple(recipe.k), recipe.temperature, device)
    )


def nearest_rows(
    queries: torch.Tensor, bank: torch.Tensor, k: int, bank_chunk: int = BANK
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the k most similar rows of a bank (n, D), which may be on the host, for each of the queries (q, D).

    Returns:
        similarity: (q, k) cosines, the largest first.
        neighbours: (q, k) row numbers in the bank.
    """
    queries = F.normalize(queries, dim=1)
    best = queries.new_empty(len(queries), 0)
    neighbours = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
    for start in range(0, len(bank), bank_chunk):
        chunk = F.normalize(bank[start : start + bank_chunk].to(queries.device), dim=1)
        similarity, rows = (queries @ chunk.T).topk(min(k, len(chunk)), dim=1)
        best, order = torch.cat([best, similarity], dim=1).topk(min(k, best.shape[1] + similarity.shape[1]), dim=1)
        neighbours = torch.cat([neighbours, rows + start], dim=1).gather(1, order)
    return best, neighbours


@torch.no_grad()
def knn_accuracy(
    train: Features,
    test: Features,
    ks: tuple[int, ...] = (10, 20, 100, 200),
    temperature: float = 0.07,
    device: torch.device | str = "cpu",
    query_chunk: int = QUERIES,
    bank_chunk: int = BANK,
) -> dict[str, float]:
    """Top-1 accuracy of the k nearest rows' votes, weighted by exp(cosine similarity / temperature).

    The tables stay on the host; chunks of them are compared on the device. A k above the bank's size uses all of it.

    Returns:
        `knn_top1_k{k}` for each of `ks`, in percent.
    """
    classes = int(train.labels.max()) + 1
    labels, most = train.labels.to(device), min(max(ks), len(train.labels))
    correct = dict.fromkeys(ks, 0)
    for values, expected in zip(test.values.split(query_chunk), test.labels.split(query_chunk), strict=True):
        similarity, neighbours = nearest_rows(values.to(device), train.values, most, bank_chunk)
        # Weights relative to the nearest row's give the same votes, and don't overflow at low temperatures.
        votes, weights = labels[neighbours], ((similarity - similarity[:, :1]) / temperature).exp()
        for k in ks:
            scores = torch.zeros(len(values), classes, device=device).scatter_add_(1, votes[:, :k], weights[:, :k])
            correct[k] += int((scores.argmax(dim=1).cpu() == expected).sum())
    return {f"knn_top1_k{k}": 100 * count / len(test.labels) for k, count in correct.items()}

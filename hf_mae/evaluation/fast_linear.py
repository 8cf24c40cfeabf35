"""The fast linear protocol: a logistic regression on a feature table, in seconds."""

# Shape letters in this file
#   D width of the features   K classes   n rows of a table

import torch
import torch.nn.functional as F

from .table import Features, top_k_correct, top_ks

# Factors of half the squared weights, added to the mean cross-entropy. Each fit starts from the next stronger one's.
PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
MAX_ITER = 100
ROWS = 65_536  # maximum number of rows whose logits are in memory at once


def fast_linear_accuracy(
    train: Features,
    test: Features,
    penalties: tuple[float, ...] = PENALTIES,
    max_iter: int = MAX_ITER,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Accuracy of a logistic regression on standardised features.

    Not the paper's protocol (no crops, no LARS); it ranks encoders in seconds. The penalty is chosen on a held-out
    tenth of the training rows, then used to fit all training rows. The evaluation rows don't influence the choice.
    `max_iter` limits the steps of L-BFGS for each penalty.

    Returns:
        `linear_top1` and, with more than five classes, `linear_top5`, in percent; `linear_penalty`, the chosen penalty.
    """
    mean, std = train.values.mean(dim=0), train.values.std(dim=0, correction=0)
    std = torch.where(std > 0, std, 1.0)
    values, labels = ((train.values - mean) / std).to(device), train.labels.to(device)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).to(device)
    tenth = max(1, len(labels) // 10)
    chosen, fitted = order[:tenth], order[tenth:]

    weights = torch.zeros(int(labels.max()) + 1, values.shape[1] + 1, device=device)
    best = -1, 0.0, weights
    for penalty in sorted(penalties, reverse=True):
        weights = logistic_regression(values[fitted], labels[fitted], penalty, weights, max_iter)
        correct = top_k_correct(_logits(values[chosen], weights), labels[chosen], 1)
        if correct > best[0]:
            best = correct, penalty, weights
    _, penalty, weights = best
    weights = logistic_regression(values, labels, penalty, weights, max_iter)
    logits = torch.cat([_logits((part - mean).div(std).to(device), weights).cpu() for part in test.values.split(ROWS)])
    accuracies = {k: 100 * top_k_correct(logits, test.labels, k) / len(test.labels) for k in top_ks(len(weights))}
    return {**{f"linear_top{k}": value for k, value in accuracies.items()}, "linear_penalty": penalty}


def logistic_regression(
    values: torch.Tensor, labels: torch.Tensor, penalty: float, start: torch.Tensor, max_iter: int = 100
) -> torch.Tensor:
    """Minimise mean cross-entropy + penalty / 2 * (squared weights without biases) with L-BFGS over all rows.

    The penalty is `1 / (C * n)` in scikit-learn's LogisticRegression. Values are (n, D), labels (n,) class numbers.
    The initial and the returned weights are (K, D + 1); their last column holds the biases.
    """
    weights = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=max_iter, tolerance_grad=1e-5, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        parts = [penalty / 2 * weights[:, :-1].square().sum()]
        parts[0].backward()
        for part, expected in zip(values.split(ROWS), labels.split(ROWS), strict=True):
            parts.append(F.cross_entropy(_logits(part, weights), expected, reduction="sum") / len(labels))
            parts[-1].backward()
        return torch.stack([part.detach() for part in parts]).sum()

    optimizer.step(closure)  # type: ignore[arg-type]
    return weights.detach()


def _logits(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return F.linear(values, weights[:, :-1], weights[:, -1])

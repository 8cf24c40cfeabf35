"""RankMe (arXiv:2210.02885): how many dimensions features really use; needs no labels."""

import torch


def rankme(values: torch.Tensor) -> float:
    """Effective rank of a feature table: exp of the entropy of its normalised singular values.

    Args:
        values: (n, D) features, not centred; the paper uses 25,600 rows, and n bounds the result.

    Returns:
        From 1 to min(n, D).
    """
    singular = torch.linalg.svdvals(values.double())
    share = singular / singular.sum() + 1e-7  # the paper's epsilon
    return float(torch.exp(-(share * share.log()).sum()))

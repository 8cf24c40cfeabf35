"""Feature tables: planted, random, or of a saved model."""

import torch
from accelerate import Accelerator

from hf_mae.evaluation.table import Features, encoded_batches, even_batches, extract_table


def clusters(n: int, seed: int) -> Features:
    generator = torch.Generator().manual_seed(seed)
    centres = 5 * torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(4, (n,), generator=generator)
    return Features(centres[labels] + 0.3 * torch.randn(n, 16, generator=generator), labels)


def random_features(n: int, seed: int, classes: int = 10, width: int = 8) -> Features:
    generator = torch.Generator().manual_seed(seed)
    return Features(torch.randn(n, width, generator=generator), torch.randint(classes, (n,), generator=generator))


def table_of(encoder, rows, batch_size=8):
    batches = even_batches(rows, encoder.spec, batch_size, 0, Accelerator(cpu=True))
    return extract_table(rows, encoded_batches(encoder, batches))

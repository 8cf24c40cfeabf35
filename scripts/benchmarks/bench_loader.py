"""Images per second of the data path alone, and the time to the first batch of a resumed run."""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import datasets
import numpy as np
import torch
from bench_common import interleaved, spread, table
from torchvision import transforms

from hf_mae import ImageSpec, PrepareRecipe, Rows, StreamPlan, TrainingStream, make_loader, open_source, prepare
from hf_mae.data import decode

VIEW = ImageSpec(size=(224, 224), num_channels=3, dtype="uint8", num_patches=196)
BATCH = 64
RUN_MAE = "run_mae of transformers, on Pillow"


def run_mae_dataset(folder: str) -> Any:
    """The data of transformers' run_mae example: its column and its transform."""
    view = transforms.Compose(
        [
            transforms.Lambda(lambda image: image.convert("RGB") if image.mode != "RGB" else image),
            transforms.RandomResizedCrop(224, scale=(0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    data = datasets.load_dataset("imagefolder", data_dir=folder, split="train")
    data.set_transform(lambda rows: {"pixel_values": [view(image) for image in rows["image"]]})
    return data


def collate(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Collate as in run_mae."""
    return {"pixel_values": torch.stack([example["pixel_values"] for example in examples])}


def run_mae_batches(folder: str, workers: int) -> Iterator[Any]:
    data = run_mae_dataset(folder)
    while True:
        yield from torch.utils.data.DataLoader(
            data, BATCH, shuffle=True, collate_fn=collate, num_workers=workers, drop_last=True
        )


def our_batches(rows: Rows, workers: int, fast: bool) -> Iterator[Any]:
    plan = StreamPlan.choose(BATCH, 1, workers, len(rows), rows.source.random_access)
    stream = TrainingStream(rows, plan, VIEW, 0, [0] * plan.num_streams, 0, 10**6)
    decoder, batches = decode.simplejpeg, None
    while True:
        # Workers start before the first batch, and keep the decoder that is set then.
        decode.simplejpeg = decoder if fast else None
        if batches is None:
            batches = iter(make_loader(stream, workers))
        batch = next(batches)
        decode.simplejpeg = decoder
        yield batch


def rate_of(batches: Iterator[Any], count: int, workers: int) -> float:
    """Images per second; without workers, per second of this process's CPU time, which other programs don't affect."""
    next(batches)
    clock = time.perf_counter if workers else time.process_time
    started = clock()
    for _ in range(count):
        next(batches)
    return count * BATCH / (clock() - started)


def loader(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Our loader and run_mae's on a folder of JPEGs, and ours on the shards that `hf-mae prepare` makes from it."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        recipe = PrepareRecipe(dataset=options.dataset, output_dir=str(folder), num_workers=options.workers)
        started = time.perf_counter()
        count = sum(split["rows"] for split in prepare(recipe)["splits"].values())
        print(f"prepared {count} images in {time.perf_counter() - started:.1f} s, {options.workers} workers")
        sources = {"": Rows(open_source(options.dataset)), ", prepared": Rows(open_source(folder))}
        ways = [False, True] if decode.simplejpeg else [False]
        streams = {RUN_MAE: run_mae_batches(options.dataset, options.workers)}
        for what, rows in sources.items():
            for fast in ways:
                name = f"hf_mae{what}, on {'simplejpeg' if fast else 'Pillow'}"
                streams[name] = our_batches(rows, options.workers, fast)
        cells: dict[str, Callable[[], Any]] = {
            name: partial(rate_of, batches, options.batches, options.workers) for name, batches in streams.items()
        }
        found = interleaved(cells, options.repeats)
    unit = "images/s" if options.workers else "images/s of CPU time"
    print(f"\nloader, {options.batches} batches of {BATCH}, {options.workers} workers, 1 thread")
    table(found, unit, RUN_MAE)
    return [
        {"what": "loader", "cell": name, "workers": options.workers, "unit": unit, **spread(values)}
        for name, values in found.items()
    ]


def first_batch_after(step: int, rows: Rows, plan: StreamPlan, workers: int) -> float:
    """Seconds from the start of the loader to its first batch, for a run that resumes after `step` steps."""
    # The streams' positions at that step: each reads a chunk of rows in every `groups`-th step.
    chunk = plan.total_batch_size // plan.chunks
    turns = [step // plan.groups + (stream // plan.chunks < step % plan.groups) for stream in range(plan.num_streams)]
    stream = TrainingStream(rows, plan, VIEW, 0, (np.array(turns) * chunk).tolist(), step, step + 100)
    started = time.perf_counter()
    batches = iter(make_loader(stream, workers))
    next(batches)
    seconds = time.perf_counter() - started
    if workers:
        batches._shutdown_workers()  # type: ignore[attr-defined]
    return seconds


def resume(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time to the first batch after a resume, early and late in a run."""
    results = []
    for streaming in (None, True) if options.streaming else (None,):
        rows = Rows(open_source(options.dataset, split=options.split, streaming=streaming))
        plan = StreamPlan.choose(BATCH, 1, options.workers, len(rows), rows.source.random_access)
        cells = {
            f"first batch of {BATCH}, resumed at step {step:,}": partial(
                first_batch_after, step, rows, plan, options.workers
            )
            for step in (10, 10_000)
        }
        access = "random access" if rows.source.random_access else "streamed"
        print(f"\n{len(rows):,} images, {access}, {plan}")
        found = interleaved(cells, options.repeats)
        table(found, "s")
        results += [{"what": "resume", "cell": name, "access": access, **spread(v)} for name, v in found.items()]
    return results

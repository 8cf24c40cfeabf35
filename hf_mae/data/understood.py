"""What a command understood of its data, in two lines that it prints before it starts to work.

    data     images (splits from folder names): 60 images of split train, evaluated on 20 images: split test; labels:
             4 classes from class folders
    images   3 channels of 8 bits (uint8), about 480 x 640 pixels, used at 224 x 224

Only the main process calls these functions.
"""

import logging
from collections.abc import Sequence

import numpy as np

from .order import Rows
from .shards import Source
from .stats import Probe
from .transform import ImageSpec

logger = logging.getLogger(__name__)

BITS = {"uint8": 8, "uint16": 16, "float32": 32}
MOST_ENLARGED = 2  # times


def announce_data(
    probe: Probe,
    spec: ImageSpec,
    rows: Rows | None,
    eval_rows: Rows | None = None,
    evaluated_on: str = "",
    classes: str | None = None,
) -> None:
    """Print the two lines, and warn if the model's images are much larger than those of the data.

    Args:
        probe: what the images are like.
        spec: size, channels and dtype of the model's images.
        rows: images to learn from or to read; None if there are only images to evaluate on.
        eval_rows: images to evaluate on, if any.
        evaluated_on: what `open_splits` says of them.
        classes: the number of classes as text, if the command knows it.
    """
    first = eval_rows if rows is None else rows
    assert first is not None
    used = [] if rows is None else [count_images(rows)]
    if eval_rows is not None:
        part = evaluated_on.removesuffix(f" of {first.source.name}")
        used.append(f"evaluated on {_counted(len(eval_rows), 'image')}: {part}")
    print(describe_data(first.source, used, classes))
    print(f"images   {describe_images(probe, spec)}", flush=True)
    edge, resized = float(np.median(probe.sizes.min(axis=1))), int(np.min(spec.eval_resize))
    if resized > MOST_ENLARGED * edge:
        logger.warning(
            "%s: images are enlarged %.1f times, from %g pixels of their shorter side to %d; a model with a smaller "
            "image_size and patch_size loses nothing and is faster",
            *(first.source.name, resized / edge, edge, resized),
        )


def describe_data(source: Source, used: Sequence[str], classes: str | None = None) -> str:
    """The first line: the data set, its splits, the images that are `used` of each, and the labels."""
    return (
        f"data     {source.name} ({describe_splits(source.splits_from)}): {', '.join(used)}; "
        f"labels: {_describe_labels(source, classes)}"
    )


def count_images(rows: Rows) -> str:
    """The number of images of a split, such as "1,705 images of split train"."""
    return f"{_counted(len(rows), 'image')} of split {rows.source.split}"


def describe_splits(splits_from: str | None) -> str:
    """`Place.splits_from` in words."""
    return f"splits from {splits_from}" if splits_from else "only one split"


def _describe_labels(source: Source, classes: str | None) -> str:
    if source.labels_from is None:
        return "none"
    if classes is None and source.label_names is not None:
        classes = _counted(len(source.label_names), "class", "es")
    if classes is None and (labels := source.known_labels()) is not None:
        values = [part for label in labels for part in (label if isinstance(label, list) else [label])]
        values = [value for value in values if value not in (None, "")]
        # Numbers may be classes, or what a regression predicts.
        noun = ("class", "es") if all(isinstance(value, str) for value in values) else ("different value",)
        classes = _counted(len(set(map(str, values))), *noun)
    return f"{classes} from {source.labels_from}" if classes else f"from {source.labels_from}"


def describe_images(probe: Probe, spec: ImageSpec) -> str:
    """Channels, depth and size of the images, and what the model gets of them."""
    size = np.median(probe.sizes, axis=0).round().astype(int)
    about = "" if (probe.sizes == size).all() else "about "
    height, width = spec.size
    kind, used = _kind(probe.channels, probe.dtype), _kind([spec.num_channels], spec.dtype)
    converted = "" if kind == used else f", as {used}"
    nodata = "" if spec.nodata is None else f", {spec.nodata:g} stands for missing data"
    return f"{kind}, {about}{size[0]} x {size[1]} pixels, used at {height} x {width}{converted}{nodata}"


def _kind(channels: list[int], dtype: str) -> str:
    noun = "channel" if channels == [1] else "channels"
    return f"{' or '.join(map(str, channels))} {noun} of {BITS[dtype]} bits ({dtype})"


def _counted(number: int, noun: str, plural: str = "s") -> str:
    return f"{number:,} {noun}{plural if number != 1 else ''}"

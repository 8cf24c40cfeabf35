"""How an optimizer step is divided into micro-batches."""

from ..errors import UserError


def micro_batch(
    total_batch_size: int, per_device_batch_size: int | None, ranks: int, most: int = 64, masks: int = 1
) -> tuple[int, int]:
    """The micro-batch size of a device, and the number of micro-batches per step and process.

    Args:
        total_batch_size: images per optimizer step, over all processes.
        per_device_batch_size: images per micro-batch, capped at a process's share of the step. When None, the largest
            size that fits, up to `most`.
        ranks: number of processes.
        masks: masks per decoded image. `total_batch_size` counts an image once for each mask, and all its masks are in
            one micro-batch.

    Raises:
        UserError: if the sizes don't make up the total; it names the ones that do.
    """
    share, remainder = divmod(total_batch_size // masks, ranks)
    if remainder:
        fitting = [n for n in range(1, ranks + 1) if total_batch_size // masks % n == 0]
        raise UserError(
            f"total_batch_size {total_batch_size} can't be split evenly over {ranks} processes; use {fitting} "
            f"processes, or a multiple of {ranks * masks} images"
        )
    fitting = [masks * n for n in range(1, share + 1) if share % n == 0]
    # Capped at the process's share, so that a recipe fits any number of processes.
    size = min(per_device_batch_size or max(n for n in fitting if n <= max(most, masks)), masks * share)
    if size not in fitting:
        raise UserError(
            f"total_batch_size {total_batch_size} is not a multiple of per_device_batch_size {size} x {ranks} "
            f"processes; sizes that fit: {', '.join(map(str, fitting[-12:]))}"
        )
    return size, share * masks // size

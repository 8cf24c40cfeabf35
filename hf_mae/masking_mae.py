"""Images become patches, and a mask says which of them are removed."""

# Shape letters in this file
#   B images   C channels   H, W pixels   P, Q patch height and width in pixels   V = P*Q*C numbers in a patch
#   h, w patch grid   N = h*w patches per image   K kept patches   M wanted patches   D token width

from typing import NamedTuple

import torch

from .configuration_mae import MAEConfig


def patchify(pixel_values: torch.Tensor, patch_size: tuple[int, int], ids: torch.Tensor | None = None) -> torch.Tensor:
    """Cut images into patches.

    Args:
        pixel_values: (B, C, H, W) images.
        patch_size: (height, width) in pixels; must divide H and W.
        ids: (B, M) indices of the patches to copy; all patches, in order, when omitted.

    Returns:
        (B, N or M, P*Q*C) patches from left to right, top to bottom; in each patch: row, column, channel.
    """
    (B, C, H, W), (P, Q) = pixel_values.shape, patch_size
    h, w = H // P, W // Q
    patches = pixel_values.reshape(B, C, h, P, w, Q).permute(0, 2, 4, 3, 5, 1)
    if ids is None:
        return patches.reshape(B, h * w, P * Q * C)
    images = torch.arange(B, device=ids.device).unsqueeze(1)
    return patches[images, ids // w, ids % w].flatten(2)


def unpatchify(patches: torch.Tensor, patch_size: tuple[int, int], grid_size: tuple[int, int]) -> torch.Tensor:
    """Put patches back together as images; the inverse of `patchify`.

    Args:
        patches: (B, N, P*Q*C) patches from left to right, top to bottom; in each patch: row, column, channel.
        patch_size: (height, width) of a patch in pixels.
        grid_size: (h, w) patches of an image.

    Returns:
        (B, C, H, W) images, in the unit of the patches.

    Raises:
        ValueError: if N differs from h * w.
    """
    (B, N, V), (P, Q), (h, w) = patches.shape, patch_size, grid_size
    if N != h * w:
        raise ValueError(f"{N} patches don't fill a {h}x{w} grid of {h * w}; pass the grid_size of these images")
    pixels = patches.reshape(B, h, w, P, Q, V // (P * Q))
    return pixels.permute(0, 5, 1, 3, 2, 4).reshape(B, V // (P * Q), h * P, w * Q)


def gather_tokens(tokens: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """(B, N, D) tokens and (B, M) indices -> the (B, M, D) tokens at these indices."""
    return tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def normalize_patches(patches: torch.Tensor) -> torch.Tensor:
    """Scale each patch (..., V) to mean 0 and (unbiased) variance 1 (Sec. 3, "Reconstruction target")."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()


def hashed_noise(seed: int, count: int, device: torch.device) -> torch.Tensor:
    """(count,) float32 in [0, 1) that depend only on the seed and their index, so they are equal on every device.

    A hash of the index (github.com/skeeto/hash-prospector), because torch.compile can't create a torch.Generator.
    """
    bits = (torch.arange(count, device=device) + seed * 0x9E3779B9 % 2**32) % 2**32
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        bits = (bits ^ (bits >> shift)) * factor % 2**32
    return ((bits ^ (bits >> 15)) >> 8) / 2**24  # a float32 holds 24 bits exactly


def eval_noise(config: MAEConfig, pixel_values: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
    """(B, N) noise in [0, 1), the same on every call: row i is for the i-th image of a batch."""
    B, N = pixel_values.shape[0], grid_size[0] * grid_size[1]
    return hashed_noise(config.eval_mask_seed, B * N, pixel_values.device).view(B, N)


def cell_noise(noise: torch.Tensor, grid_size: tuple[int, int], cell: int) -> torch.Tensor:
    """(B, N) -> (B, N): all patches of a cell of `cell` x `cell` patches get the sort key of the cell's first patch."""
    h, w = grid_size
    keys = noise.reshape(-1, h, w)[:, ::cell, ::cell]
    return keys.repeat_interleave(cell, dim=1).repeat_interleave(cell, dim=2).flatten(1)


def block_noise(noise: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
    """Sort keys that remove random rectangles first ("block" in Table 1f, after BEiT, arXiv:2106.08254).

    Each image gets up to 16 rectangles of 8 to 40 % of its area, with aspect ratios of 0.3 to 3.3. Their sizes and
    places come from the image's noise, so the same noise gives the same mask here too. The rectangles are removed in
    order; inside a rectangle, and outside all of them, the noise decides.

    Args:
        noise: (B, N) from U[0, 1).
        grid_size: (h, w) patches of the images.

    Returns:
        (B, N) sort keys; the largest are removed.
    """
    h, w = grid_size
    blocks = min(16, noise.shape[1] // 4)
    if blocks == 0:
        return noise  # a rectangle needs four numbers
    area, aspect, top, left = noise[:, : 4 * blocks].reshape(-1, blocks, 4, 1, 1).unbind(2)
    area = (0.08 + 0.32 * area) * h * w
    aspect = 0.3 * (3.3 / 0.3) ** aspect
    height, width = (area * aspect).sqrt().clamp(1, h), (area / aspect).sqrt().clamp(1, w)
    top, left = top * (h - height), left * (w - width)
    rows = torch.arange(h, device=noise.device).view(1, 1, h, 1) + 0.5
    columns = torch.arange(w, device=noise.device).view(1, 1, 1, w) + 0.5
    inside = (rows >= top) & (rows < top + height) & (columns >= left) & (columns < left + width)
    order = torch.arange(blocks, 0, -1, device=noise.device, dtype=noise.dtype).view(1, blocks, 1, 1)
    # The first rectangle gets the largest number, because the largest keys are removed.
    return (inside * order).amax(dim=1).flatten(1) + noise


class ChosenPatches(NamedTuple):
    """Which patches of a batch the encoder sees; everything but the grid is None when it sees all of them."""

    grid_size: tuple[int, int]  # (h, w) patches of these images
    ids_keep: torch.Tensor | None = None  # (B, K) the kept patches, in the encoder's order
    ids_shuffle: torch.Tensor | None = None  # (B, N) all patches, the kept ones first
    ids_restore: torch.Tensor | None = None  # (B, N) index that puts a shuffled sequence back in image order
    mask: torch.Tensor | None = None  # (B, N) 1 = removed, 0 = kept, in image order


def random_masking(noise: torch.Tensor, len_keep: int, grid_size: tuple[int, int]) -> ChosenPatches:
    """Keep the patches with the smallest noise of every image (arXiv:2111.06377, Sec. 3, "Masking").

    Args:
        noise: (B, N) sort keys; the smallest are kept, and ties go to the first patch.
        len_keep: K, the number of patches to keep, in [1, N].
        grid_size: (h, w) patches of the images.
    """
    ids_shuffle = noise.argsort(dim=1, stable=True)
    ids_restore = ids_shuffle.argsort(dim=1)
    mask = (ids_restore >= len_keep).to(noise.dtype)
    return ChosenPatches(grid_size, ids_shuffle[:, :len_keep], ids_shuffle, ids_restore, mask)


def one_mask(mask: torch.Tensor | None, bool_masked_pos: torch.Tensor | None) -> torch.Tensor | None:
    """The caller's mask, from either of its two names; None if neither was passed.

    Raises:
        ValueError: if both were passed.
    """
    if mask is not None and bool_masked_pos is not None:
        raise ValueError("mask and bool_masked_pos are two names for one argument, and both were passed; pass one")
    return mask if bool_masked_pos is None else bool_masked_pos


def count_kept(mask: torch.Tensor) -> int:
    """K, the number of zeros in each row of a caller's mask (B, N).

    Raises:
        ValueError: if rows keep different numbers of patches, or none.
    """
    counts = (mask == 0).sum(dim=1)
    fewest, most = int(counts.min()), int(counts.max())
    if fewest != most:
        raise ValueError(
            f"the mask keeps {fewest} patches in one row and {most} in another; keep the same number in each"
        )
    if fewest == 0:
        raise ValueError(f"the mask keeps 0 of {mask.shape[1]} patches; set at least one entry to 0 (kept)")
    return fewest


def choose_patches(
    config: MAEConfig,
    pixel_values: torch.Tensor,
    grid_size: tuple[int, int],
    mask_ratio: float | None = None,
    noise: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> ChosenPatches:
    """Choose the patches that the encoder sees: all of them, unless a ratio, noise, mask or generator is passed.

    Args:
        config: the model's configuration.
        pixel_values: (B, C, H, W) images.
        grid_size: (h, w) patches of the images.
        mask_ratio: fraction of patches to remove, in [0, 1); `config.mask_ratio` when omitted.
        noise: (B, N) sort keys, the smallest are kept; drawn from U[0, 1) when omitted.
        mask: (B, N) the caller's own choice, 1 = removed, 0 = kept; all rows keep the same number.
        generator: random generator that draws the noise.

    Raises:
        ValueError: if mask, noise or ratio don't fit the images or can't be combined.
    """
    if mask_ratio is None and noise is None and mask is None and generator is None:
        return ChosenPatches(grid_size)
    shape = pixel_values.shape[0], grid_size[0] * grid_size[1]
    for name, given in (("noise", noise), ("mask", mask)):
        if given is not None and tuple(given.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(given.shape)}, but must be {shape} (images, patches); "
                "pass one number per patch"
            )
    if mask is not None:
        if noise is not None or mask_ratio is not None or generator is not None:
            raise ValueError("mask can't be combined with mask_ratio, noise or generator; pass one or the other")
        # Sorting by the mask puts the kept patches first, in image order.
        len_keep, noise = count_kept(mask), (mask != 0).to(torch.float32)
    else:
        len_keep = config.num_kept_patches(config.mask_ratio if mask_ratio is None else mask_ratio, grid_size)
        if noise is None:
            device = pixel_values.device if generator is None else generator.device
            noise = torch.rand(*shape, generator=generator, device=device)
        if config.mask_strategy == "block":
            noise = block_noise(noise, grid_size)
        if config.mask_cell > 1:
            noise = cell_noise(noise, grid_size, config.mask_cell)
    return random_masking(noise.to(pixel_values.device), len_keep, grid_size)

"""Augmentation of whole batches at once, on uint8; every photograph gets its own crop and flip."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def crop_and_flip(images: Tensor, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Pad with zeros, crop each photograph at its own place to its old size, mirror half of them.

    Args:
        images: uint8 [N, H, W, C].
        padding: pixels added on each side before the crop; 0 leaves the place as it is.
        flip: mirror each photograph with probability 1/2.
        generator: source of the random numbers; the number drawn depends on N alone.

    Returns:
        uint8 [N, H, W, C], a new tensor.
    """
    count, height, width, channels = images.shape
    top = torch.randint(0, 2 * padding + 1, (count, 1), generator=generator)
    left = torch.randint(0, 2 * padding + 1, (count, 1), generator=generator)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    padded = images.new_zeros(count, height + 2 * padding, width + 2 * padding, channels)
    padded[:, padding : padding + height, padding : padding + width] = images
    rows = top + torch.arange(height)
    columns = torch.arange(width).expand(count, width)
    if flip:
        columns = torch.where(mirrored, width - 1 - columns, columns)
    columns = left + columns
    pixel = (torch.arange(count)[:, None] * padded.shape[1] + rows)[:, :, None] * padded.shape[2] + columns[:, None, :]
    return padded.view(-1, channels)[pixel.view(-1)].view(count, height, width, channels)


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 [N, H, W, 3] to float32 [N, 3, H, W] in channels-last memory: (pixel / 255 - mean) / std per channel."""
    scale = 1 / (255 * torch.tensor(std, dtype=torch.float64))
    shift = torch.tensor(mean, dtype=torch.float64) * 255 * scale
    pixels = images.to(torch.float32).mul_(scale.float()).sub_(shift.float())
    return pixels.permute(0, 3, 1, 2)

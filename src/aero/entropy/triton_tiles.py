"""How large the tiles of the Triton kernels are, by head size and type: the fastest of those measured on an H100."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tiles:
    """``held`` rows stay in a program while ``step`` rows at a time pass; ``warps`` and ``stages`` are Triton's."""

    held: int
    step: int
    warps: int
    stages: int


def forward_tiles(size: int, width: int) -> Tiles:
    """Tiles of the forward kernel for head size ``size``, a power of two, and elements of ``width`` bytes."""
    if width == 4:
        return Tiles(64, 32, 4, 2) if size <= 128 else Tiles(32, 16, 4, 1)
    if size <= 64:
        return Tiles(128, 64, 8, 3)
    return Tiles(64, 64, 4, 3) if size == 128 else Tiles(64, 32, 4, 2)


def backward_tiles(size: int, width: int) -> Tiles:
    """Tiles of both sums of the backward kernel, as ``forward_tiles``."""
    if width == 4:
        return Tiles(32, 32, 4, 1) if size <= 128 else Tiles(16, 16, 4, 1)
    if size <= 64:
        return Tiles(64, 64, 4, 3)
    return Tiles(64, 64, 4, 2) if size == 128 else Tiles(64, 32, 8, 1)

"""Reconstructions: computed, scored and drawn."""

from .grid import reconstruction_grid
from .reconstruction import Reconstruction, reconstruct

__all__ = ["Reconstruction", "reconstruct", "reconstruction_grid"]

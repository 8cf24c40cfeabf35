"""Reconstructions: computed, scored and drawn."""

"""Measures how good a pretrained encoder is."""

"""Experiments that measure no claim made for batch normalization."""

"""What is wrong with the batch normalization of a model: `measure` finds it, `plot` draws it."""

from bnjax.diagnosis.measure import Finding, LayerReport

__all__ = ["Finding", "LayerReport"]

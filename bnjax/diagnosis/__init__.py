"""Faults of running statistics.

    limits     the limits beyond which a value is a problem
    plot       draws the figure
    report     findings and measurements: a table, data for JSON, and a figure
    measure    compares running statistics with the moments of a batch, and finds problems

Each module imports only from the modules above it.
"""

from bnjax.diagnosis.measure import diagnose
from bnjax.diagnosis.report import Finding, LayerReport

__all__ = ["Finding", "LayerReport", "diagnose"]

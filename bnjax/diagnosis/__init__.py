"""Faults of running statistics.

    measure    compares running statistics with the moments of a batch, and finds problems
    limits     the limits beyond which a value is a problem
    report     findings and measurements: a table, data for JSON, and a figure
    plot       draws the figure

Each module imports only from the modules below it.
"""

from bnjax.diagnosis.report import Finding, LayerReport

__all__ = ["Finding", "LayerReport"]

"""Faults in running statistics.

    limits     the limits beyond which a value is reported
    plot       draws the figure
    report     findings and measurements: a table, data for JSON, and a figure
    arguments  the layers of a model, from the trees that hold them
    damage     what running statistics do to the output in evaluation
    findings   the table of checks of a layer, and what to do
    measure    compares running statistics with the moments of a batch

Each module imports only from the modules above it.
"""

from bnjax.diagnosis.measure import diagnose
from bnjax.diagnosis.report import Finding, LayerReport

__all__ = ["Finding", "LayerReport", "diagnose"]

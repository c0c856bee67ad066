"""Shared by the tests of diagnosis."""

EPSILON = 1e-5
COLLECTED = ["batch_stats", "batch_moments"]


def summary(diagnosis):
    return [(f.severity, f.layer, f.problem, f.features) for f in diagnosis.findings]

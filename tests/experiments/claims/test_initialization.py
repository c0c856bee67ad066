"""The width of the range of scales that trains, and how much the kind of the initial weights matters."""

import numpy as np

from experiments.claims import initialization
from experiments.harness import lab, protocol, runs
from tests.support.effects import repeated

CLASSES = 10
TARGET = 0.1 * np.log(CLASSES)
SEEDS = (0, 1, 2)


def test_width_is_of_the_longest_unbroken_range():
    trained = np.array([[1, 0, 1, 1, 1, 0], [1, 1, 1, 0, 1, 1], [0, 1, 0, 1, 0, 0], [0] * 6, [1] * 6], bool)
    np.testing.assert_array_equal(initialization.width(trained, 0.5), [1, 1, 0, 0, 2.5])


def made(tmp_path, ranges, steps):
    """Metrics for which, by arm, the scales of a range of decades train, and each kind at scale 1 takes these steps."""
    record = runs.Record(tmp_path / "metrics.jsonl")
    experiment = initialization.Initialization(seeds=3, first_seed=0)
    for arm, (low, high) in ranges.items():
        for weights, step in zip(initialization.WEIGHTS, steps[arm], strict=True):
            for name, decade in zip(experiment._names(weights, arm), initialization.DECADES, strict=True):
                last = 0.5 * TARGET if low <= decade <= high else np.nan
                for seed in SEEDS:
                    record.add(name, seed, [1000], {"loss_step": step, "last_loss": last})
        for rate in initialization.GRID:
            score = 0.9 if rate == 0.1 else 0.5
            for seed in lab.TUNING_SEEDS:
                record.add(lab.tuning(arm, rate), seed, [0, 1000], {"validation_accuracy": [0.1, score]})
    return experiment, record.metrics([*SEEDS, *lab.TUNING_SEEDS], CLASSES)


def test_judge_compares_widths_and_kinds(tmp_path):
    ranges = {"plain": (0, 0.5), "batch normalization": (-3, 1)}
    steps = {"plain": (np.nan, 250, 500), "batch normalization": (50, 100, 50)}
    experiment, metrics = made(tmp_path, ranges, steps)
    finding = experiment.judge(metrics)
    for weights in initialization.WEIGHTS:
        np.testing.assert_allclose(finding.effects[f"{weights}, range of scales"], [3.5] * 3)
    # Plain LeCun never arrives, which counts as the last step: (1000 / 250) / (100 / 50).
    np.testing.assert_allclose(finding.effects["choice of the initialization"], [2.0] * 3)
    decided = protocol.decide(experiment.PARTS, repeated(finding.effects), finding.remarks)
    assert protocol.verdict(decided) == "holds"
    assert finding.table[-1] == ["decades that train", *["0.5 ± 0.0", "4.0 ± 0.0"] * 3]


def test_judge_measures_no_ratio_of_kinds_if_none_arrives(tmp_path):
    ranges = {"plain": (1, 0), "batch normalization": (0, 0)}
    experiment, metrics = made(tmp_path, ranges, {"plain": (np.nan,) * 3, "batch normalization": (50, 50, 50)})
    effects = experiment.judge(metrics).effects
    assert np.isnan(effects["choice of the initialization"]).all()
    np.testing.assert_array_equal(effects["He, range of scales"], [0, 0, 0])

"""The claim on cost: what is counted, and its effects from metrics made by hand."""

import numpy as np
import pytest

from experiments.benchmark import footprint
from experiments.claims import cost
from experiments.harness import data, lab, protocol, runs
from tests.support.effects import repeated


@pytest.fixture
def by_hand(tmp_path):
    record = runs.Record(tmp_path / "metrics.jsonl")
    for seed, times in enumerate([(10, 12, 13), (20, 30, 20)]):
        for arm, time, memory, parameters in zip(cost.ARMS, times, (4, 6, 2), (1000, 1010, 1010), strict=True):
            record.add(arm, seed, [0], {"time": time, "memory": memory, "parameters": parameters})
    return record.metrics([0, 1], 10)


def test_effects_are_ratios_to_the_plain_network_in_the_same_round(by_hand):
    finding = cost.Cost(seeds=2).judge(by_hand)
    np.testing.assert_allclose(finding.effects["time"], [1.2, 1.5])
    np.testing.assert_allclose(finding.effects["memory"], [1.5, 1.5])
    np.testing.assert_allclose(finding.effects["parameters"], [1.01, 1.01])
    decided = protocol.decide(cost.PARTS, repeated(finding.effects))
    assert [part.verdict for part in decided] == ["holds", "holds", "refuted"]
    assert "take 1.35 ± 0.21 of the time and save 1.50 ± 0.00 of the bytes (0.50 ± 0.00 with" in finding.measured
    assert finding.table[1] == ["plain", "15.0 ± 7.1", "4.00 ± 0.00", "1000 ± 0"]


def test_a_round_has_its_own_variables_and_order_and_what_is_counted_is_known(tmp_path, monkeypatch):
    orders, variables = [], []

    def times(calls, rounds):
        orders.append([*calls])
        variables.append(np.asarray(calls[cost.NORMALIZED].args[0]["Block_0"]["Conv_0"]["kernel"]))
        return dict.fromkeys(calls, 0.002 * rounds)

    monkeypatch.setattr(footprint, "times", times)
    experiment, record = cost.Cost(batch_size=2, pixels=4, features=8, rounds=3), runs.Record(tmp_path / "m.jsonl")
    experiment.measure(lab.Lab(data.digits(), record, range(6)))
    assert {*map(frozenset, orders)} == {frozenset(cost.ARMS)}
    assert len({*map(tuple, orders)}) > 1
    assert len(np.unique(np.stack(variables), axis=0)) == 6
    metrics = record.metrics(range(6), 10)
    kernels = footprint.BLOCKS * 9 * 8 * 8 + 8 * 10 + 10
    for arm, vectors in ((cost.PLAIN, 1), (cost.NORMALIZED, 4), (cost.SAVING, 4)):  # bias; scale, bias, mean, var
        series = metrics[arm]
        assert set(series["parameters"]) == {kernels + footprint.BLOCKS * vectors * 8}
        np.testing.assert_allclose(series["time"], 6)
    # Without normalization one activation is saved for each block, and with it two.
    activation = 2 * 4 * 4 * 8 * 4 / 1e6
    added = metrics[cost.NORMALIZED]["memory"] - metrics[cost.PLAIN]["memory"]
    assert (added > 0.9 * footprint.BLOCKS * activation).all()
    assert (metrics[cost.SAVING]["memory"] < metrics[cost.PLAIN]["memory"]).all()
    experiment.draw(tmp_path / "figure.png", metrics, experiment.judge(metrics).title)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")

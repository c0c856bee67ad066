"""The claim on devices: its arms against laws, and its effects from metrics made by hand."""

from functools import partial

import jax
import numpy as np
import pytest

from experiments.claims import devices
from experiments.harness import data, lab, protocol, runs, runtime
from experiments.models import networks
from tests.support import reference
from tests.support.effects import repeated


def test_own_statistics_are_those_of_each_device(rng):
    x = rng.standard_normal((8, 4)).astype(np.float32) * 3 + np.arange(8, dtype=np.float32)[:, None]
    layers, shape = (networks.Layer(3), networks.Layer(2)), (4,)
    params, state = networks.init(jax.random.key(0), 4, layers, networks.he, True)
    apply = partial(devices._own_statistics, partial(networks.apply, layers=layers, shape=shape))
    mesh = runtime.Runtime(devices=4).mesh()
    rows = jax.P("data")
    call = partial(apply, params, state, train=True, axis_name="data")
    logits, new = jax.shard_map(
        lambda x, mask: call(x, mask=mask), mesh=mesh, in_specs=(rows, rows), out_specs=(rows, jax.P())
    )(x, np.ones((8, 1), bool))
    kernels = [np.asarray(layer["kernel"], np.float64) for layer in params]
    parts = [reference.moments(part @ kernels[0]) for part in np.split(x, 4)]
    for part, got, (_, mean, var) in zip(np.split(x, 4), np.split(logits, 4), parts, strict=True):
        hidden = np.maximum(reference.normalize(part @ kernels[0], mean, var, 1, 0), 0)
        np.testing.assert_allclose(got, hidden @ kernels[1], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(new[0].mean, 0.01 * np.mean([mean for _, mean, _ in parts], 0), rtol=1e-4, atol=1e-5)


@pytest.fixture
def by_hand(tmp_path):
    """Two seeds with distances of 4e-7, 0 and 0.5, 2."""
    record = runs.Record(tmp_path / "metrics.jsonl")
    distances = {devices.SYNCHRONIZED: [[1e-7, 4e-7], [0, 0]], devices.OWN: [[0.1, 0.5], [2, 1]]}
    for arm in devices.ARMS:
        for seed, distance in enumerate(distances.get(arm, [[0, 0]] * 2)):
            record.add(arm, seed, [1, 2], {"loss": [2.0, 1.0], "distance": distance, "test_accuracy": 0.9})
    return record.metrics([0, 1], 10)


def test_effects_are_the_greatest_distances(by_hand):
    finding = devices.Devices(seeds=2).judge(by_hand)
    least = 2.0**-23  # the spacing of float32 at 1, for a distance of 0
    np.testing.assert_allclose(finding.effects["synchronized"], [4e-7, least], rtol=1e-6)
    np.testing.assert_allclose(finding.effects["each its own"], [0.5 / 4e-7, 2 / least], rtol=1e-6)
    synchronized, own = protocol.decide(devices.Devices.PARTS, finding.effects)
    np.testing.assert_allclose(synchronized.value, np.sqrt(4e-7 * least), rtol=1e-6)
    assert (synchronized.side, own.side) == ("below", "above")
    assert "at most 4.0e-07 with synchronized statistics, and at least 0.5 with" in finding.measured


def test_a_run_that_diverged_cannot_be_judged(by_hand):
    by_hand[devices.OWN].values["distance"][1, 0] = np.nan
    finding = devices.Devices(seeds=2).judge(by_hand)
    assert np.isnan(finding.effects["each its own"]).tolist() == [False, True]
    assert [each.remark for each in protocol.decide(devices.Devices.PARTS, repeated(finding.effects))] == [
        "",
        "could not be measured in 5 of 10 seeds",
    ]


def test_distances_are_recorded_of_every_step_and_are_those_of_the_losses(tmp_path):
    experiment, record = devices.Devices(seeds=2, steps=4, hidden=(8,)), runs.Record(tmp_path / "metrics.jsonl")
    laboratory = lab.Lab(data.digits(), record, [3, 5])
    experiment.measure(laboratory)
    metrics = record.metrics([3, 5], 10)
    assert [*metrics] == [*devices.ARMS]
    loss = {arm: metrics[arm]["loss"] for arm in devices.ARMS}
    for arm in devices.ARMS:
        assert metrics[arm].steps.tolist() == [1, 2, 3, 4]
        wanted = np.abs(loss[arm] / loss[devices.ONE] - 1)
        np.testing.assert_allclose(metrics[arm]["distance"], wanted, rtol=1e-2, atol=2e-5)  # losses have 5 digits
    assert metrics[devices.SYNCHRONIZED]["distance"].max() < 1e-5
    assert metrics[devices.OWN]["distance"].max(1).min() > 1e-2
    experiment.draw(tmp_path / "figure.png", metrics, experiment.judge(metrics).title)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")

"""Batch size: the normalizations against their definitions, and the effects of hand-made metrics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnjax
from experiments.claims import batch_size
from experiments.harness import data, lab, protocol, runs
from experiments.models import normalizers

STUDY = batch_size.BatchSize(seeds=2)


@pytest.fixture
def layer(rng):
    """Parameters and a state of 16 channels, and a batch of 8 images."""
    params, state = bnjax.bn_init(16)
    scale, bias = (jnp.asarray(rng.uniform(0.5, 2, 16), jnp.float32) for _ in range(2))
    x = rng.normal(1, 2, (8, 3, 3, 16)).astype(np.float32)
    return params._replace(scale=scale, bias=bias), state, jnp.asarray(x)


def test_group_normalization_matches_numpy_in_training_and_evaluation(layer):
    params, state, x = layer
    values, scale, bias = np.float64(x), np.float64(params.scale), np.float64(params.bias)
    expected = np.empty_like(values)
    for image in range(8):
        for first in (0, 8):
            part = values[image, :, :, first : first + 8]
            expected[image, :, :, first : first + 8] = (part - part.mean()) / np.sqrt(part.var() + 1e-5)
    for train in (True, False):
        y, new = normalizers.group(params, state, x, train, momentum=0.9)
        np.testing.assert_allclose(y, expected * scale + bias, rtol=1e-4, atol=1e-5)
        assert new is state


def test_synchronized_devices_have_the_statistics_of_the_whole_batch(layer):
    whole, whole_state = normalizers.batch(*layer, True, momentum=0.9)
    parts, parts_state = normalizers.synchronized(*layer, True, momentum=0.9, devices=4)
    np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(parts_state.var, whole_state.var, rtol=1e-5)
    np.testing.assert_array_equal(parts_state.count, 1)


def test_renormalization_is_batch_normalization_at_first_and_population_normalization_later(layer):
    params, state, x = layer
    y, _ = normalizers.renormalized(params, state, x, True, momentum=0.9, steps=100)
    np.testing.assert_allclose(y, normalizers.batch(params, state, x, True, momentum=0.9)[0], rtol=1e-4, atol=1e-5)
    later = state._replace(count=jnp.full_like(state.count, 100), mean=state.mean + 0.5, var=2 * state.var)
    y, _ = normalizers.renormalized(params, later, x, True, momentum=0.9, steps=100)
    # Ratios of 1.4 and differences of about 0.5 are within the open bounds of 3 and 5.
    np.testing.assert_allclose(y, bnjax.bn_apply(params, later, x, False)[0], rtol=1e-4, atol=1e-4)


def test_the_chosen_arm_is_the_one_that_each_run_of_a_vmap_has(layer):
    params, state, x = layer
    arms = {name: batch_size.ARMS[name] for name in ("plain", "group normalization", "batch normalization")}
    start = normalizers.with_arms(lambda key: (params, [state]), [*arms])

    def two_steps(arm):
        params, (state,) = start(None, arm)
        _, state = normalizers.chosen(arms)(params, state, x, True, momentum=0.9)
        return normalizers.chosen(arms)(params, state, x + 1, False, momentum=0.9)[0]

    found = jax.vmap(two_steps)(jnp.arange(3))
    for y, normalize in zip(found, arms.values(), strict=True):
        _, new = normalize(params, state, x, True, momentum=0.9)
        np.testing.assert_allclose(y, normalize(params, new, x + 1, False, momentum=0.9)[0], rtol=1e-4, atol=1e-5)


def test_rates_are_half_a_decade_higher_for_four_times_the_images():
    assert batch_size.grid(2) == (0.01, 0.0316, 0.1, 0.316, 1.0, 3.16)
    assert batch_size.grid(128) == (0.316, 1.0, 3.16, 10.0, 31.6, 100.0)


def test_effects_are_the_ratios_of_the_errors_of_each_seed(tmp_path):
    record = runs.Record(tmp_path / "metrics.jsonl")
    for arm, sizes in STUDY._methods().items():
        for size, step in sizes.items():
            grid = batch_size.grid(step)
            for i, rate in enumerate(grid):
                for seed in lab.TUNING_SEEDS:
                    accuracy = 0.9 - 0.1 * abs(i - 2)
                    record.add(
                        lab.tuning(batch_size.name(arm, size), rate),
                        seed,
                        [0, 9],
                        {"validation_accuracy": [0, accuracy]},
                    )
    metrics = record.metrics(lab.TUNING_SEEDS, 10)
    wrong = {batch_size.BN: 0.08, batch_size.GN: 0.06, "renormalized": 0.04, "synchronized": 0.02, "plain": 0.1}
    for arm, sizes in STUDY._methods().items():
        for size in sizes:
            for rule, rate in STUDY._rates(metrics, arm, size).items():
                for seed in (1000, 1001):
                    error = (
                        wrong.get(arm, 0.01) * (1 if size == 2 else 0.5) * (1 if rule == "tuned" or size == 32 else 3)
                    )
                    error *= seed - 999
                    values = {"test_error": error, "test_recalibrated_error": error}
                    record.add(lab.at(batch_size.name(arm, size), rate), seed, [0, 9], values)
    finding = STUDY.judge(record.metrics([*lab.TUNING_SEEDS, 1000, 1001], 10))
    expected = {
        "small batches, tuned": 2,
        "small batches, scaled": 6,
        "more than group normalization, tuned": 1,
        "more than group normalization, scaled": 1,
        "remedy, group normalization": 0.08 / 0.06,
        "remedy, renormalized": 2,
        "remedy, synchronized": 4,
        "remedy for large batches, ghost": 8,
    }
    assert finding.effects.keys() == expected.keys()
    for part, value in expected.items():
        np.testing.assert_allclose(finding.effects[part], [value] * 2, rtol=1e-4, err_msg=part)
    assert not any(finding.remarks.values())
    assert len(protocol.decide(STUDY.PARTS, finding.effects, finding.remarks)) == 8


def test_the_linearly_scaled_rate_is_in_proportion_to_the_images(tmp_path):
    record = runs.Record(tmp_path / "metrics.jsonl")
    for size, best in (2, 0.1), (32, 1.0):
        for rate in batch_size.grid(size):
            values = {"validation_accuracy": [0, float(rate == best)]}
            record.add(lab.tuning(batch_size.name("plain", size), rate), 900, [0, 9], values)
    rates = STUDY._rates(record.metrics([900], 10), "plain", 2)
    assert rates == {"scaled": 0.0625, "tuned": 0.1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": (2, 128)}, r"sizes=\(2, 128\): expected 2, 32 and 128 among them"),
        ({"train_images": 1000}, "train_images=1000: expected multiples of all batch sizes"),
    ],
)
def test_sizes_that_cannot_be_judged_are_rejected(changes, message):
    with pytest.raises(data.InputError, match=message):
        batch_size.BatchSize(**changes)


def test_full_batches_of_all_training_images():
    """Of the 1797 digits 1078 are for training, and 1024 of them fill batches of 128."""
    assert batch_size.BatchSize(train_images=None).training(data.digits()) == 1024
    assert batch_size.BatchSize(train_images=256).training(data.digits()) == 256

"""What the claims are measured with: the record of runs, curves, the choice of rates, and runs over devices."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.harness import curves, data, lab, runs, scores, stream, train
from experiments.harness.runtime import Runtime
from experiments.models import networks

DIGITS = data.digits()
SMALL = networks.mlp(DIGITS, (6,), True)


def evaluations(number, steps=(0, 10, 20)):
    """Of `number` runs, with values that name the run and the step."""
    names = ("validation_accuracy", "test_accuracy", "norms")
    for step in steps:
        values = {name: np.array([i + step / 100 for i in range(number)]) for name in names}
        values["norms"] = np.stack([values["norms"], 2 * values["norms"]], 1)
        yield train.Evaluation(step, step / steps[-1], np.full(number, np.nan if step == 0 else step), values)


def test_record_has_a_line_for_each_run_and_test_metrics_of_the_end_alone(tmp_path):
    record = runs.Record(tmp_path / "deep" / "metrics.jsonl")
    record.add_all(["a", "b"], [7, 9], [*evaluations(4)])
    lines = [json.loads(line) for line in record.path.read_text().splitlines()]
    assert [(line["network"], line["seed"]) for line in lines] == [("a", 7), ("a", 9), ("b", 7), ("b", 9)]
    assert lines[2] == {
        "network": "b",
        "seed": 7,
        "steps": [0, 10, 20],
        "loss": [None, 10, 20],
        "validation_accuracy": [2, 2.1, 2.2],
        "test_accuracy": 2.2,
        "norms": [[2, 4], [2.1, 4.2], [2.2, 4.4]],
    }


def test_record_gives_metrics_by_network_in_the_order_of_the_seeds(tmp_path):
    record = runs.Record(tmp_path / "metrics.jsonl")
    record.add_all(["a", "b"], [7, 9], [*evaluations(4)])
    record.add("other", 1, [0], {"time": 1.23456789})
    metrics = runs.Record(record.path).metrics([9, 8, 7], 10)
    assert [*metrics] == ["a", "b"]  # other has none of these seeds
    assert (metrics.classes, metrics["b"].seeds, metrics["b"].steps.tolist()) == (10, (9, 7), [0, 10, 20])
    np.testing.assert_array_equal(metrics["b"]["loss"], [[np.nan, 10, 20]] * 2)
    np.testing.assert_array_equal(metrics["b"]["test_accuracy"], [3.2, 2.2])
    assert metrics["b"]["norms"].shape == (2, 3, 2)
    assert record.metrics([1], 10)["other"]["time"] == 1.2346


@pytest.mark.parametrize("cut", [1, 20, 10**6])
def test_record_goes_on_after_a_line_that_was_cut(cut, tmp_path):
    record = runs.Record(tmp_path / "metrics.jsonl")
    record.add_all(["a", "b"], [7, 9], [*evaluations(4)])
    whole = record.path.read_bytes()
    *kept, last = whole.splitlines(keepends=True)
    record.path.write_bytes(b"".join(kept) + last[: max(len(last) - cut, 0)])
    again = runs.Record(record.path)
    assert again.missing(["a", "b"], [7, 9]) == [9]
    assert again.missing(["a"], [7, 8, 9]) == [8]
    assert record.path.read_bytes() == b"".join(kept)
    again.add("b", 9, [0, 10, 20], {name: value for name, value in record.runs["b"][9].items() if name in NAMES})
    assert [*map(json.loads, record.path.read_bytes().splitlines())] == [*map(json.loads, whole.splitlines())]


NAMES = ("loss", "validation_accuracy", "test_accuracy", "norms")


def test_smoothed_is_the_mean_of_three():
    values = np.array([[1.0, 2, 6, 1, 5], [0, np.nan, 0, 0, 3]])
    np.testing.assert_allclose(curves.smoothed(values[0]), [1, 1.5, 3, 3, 4])
    np.testing.assert_allclose(curves.smoothed(values)[1], [0, np.nan, np.nan, np.nan, 1])
    np.testing.assert_array_equal(values[0], [1, 2, 6, 1, 5])


def test_reached_is_the_first_step_on_the_side_of_the_target():
    steps, values = np.array([0, 10, 20]), np.array([[0.1, 0.9, 1.0], [np.nan, 0.2, 0.9], [0.5, 0.6, np.nan]])
    np.testing.assert_array_equal(curves.reached(steps, values, 0.9), [10, 20, np.nan])
    np.testing.assert_array_equal(curves.reached(steps, values, 0.2, "below"), [0, 10, np.nan])


def test_times_as_fast_takes_the_last_step_for_what_never_arrives():
    slow, quick = np.array([100, np.nan, 50, np.nan]), np.array([50, 50, np.nan, np.nan])
    np.testing.assert_array_equal(curves.times_as_fast(slow, quick, 200), [2, 4, 0.25, np.nan])


def test_steps_to_the_targets_of_loss_and_smoothed_accuracy():
    target = 0.1 * np.log(4)
    values = {"loss": [[np.nan, 2, target, 0]], "validation_accuracy": [[0.1, 1.0, 1.0, 1.0]]}
    series = runs.Series((0,), np.array([0, 5, 10, 15]), {name: np.array(value) for name, value in values.items()})
    found = curves.steps_to(series, 4)
    np.testing.assert_allclose(found["loss"], 10)
    np.testing.assert_allclose(found["accuracy"], 10 + 5 * (0.9 - 0.7) / (1 - 0.7))  # of 0.1, 0.55, 0.7, 1


def test_steps_to_a_target_are_interpolated_between_evaluations():
    losses = 0.1 * np.log(4) * np.exp([[2, 1, -1, -2], [np.nan, -1, 0.5, 0.5], [2, 1, 1, 1], [-3, -3, -3, -3]])
    values = {"loss": losses, "validation_accuracy": np.zeros((4, 4))}
    series = runs.Series((0, 1, 2, 3), np.array([0, 10, 20, 30]), values)
    np.testing.assert_allclose(curves.steps_to(series, 4)["loss"], [15, 10, np.nan, 0])
    values["loss"] = losses * 3
    np.testing.assert_allclose(curves.steps_to(series, 4, loss=0.3)["loss"], [15, 10, np.nan, 0])


def test_half_decades_are_powers_of_the_root_of_10():
    assert lab.half_decades(0.03, 3) == (0.0316, 0.1, 0.316, 1, 3.16)


def tuned(**accuracies):
    """Metrics of tuning runs: the validation accuracies of two seeds by rate, and a competing arm."""
    series = {
        lab.tuning("arm", float(rate.removeprefix("at_"))): runs.Series(
            (900, 901), np.arange(4), {"validation_accuracy": np.array(values, float)}
        )
        for rate, values in accuracies.items()
    }
    return runs.Metrics({**series, lab.tuning("another arm", 7): series[lab.tuning("arm", 1)]}, 10)


def test_chosen_takes_the_best_curve_or_the_best_end():
    quick, slow, worse = [[0.1, 0.8, 0.8, 0.8]] * 2, [[0.1, 0.1, 0.9, 0.9]] * 2, [[0.1, 0.2, 0.2, 0.3]] * 2
    metrics = tuned(at_0=worse, at_1=slow, at_2=quick, at_3=worse)
    assert lab.chosen(metrics, "arm") == (2, "")
    late = tuned(at_0=worse, at_1=[[0.1, 0.1, 0.1, 3.0]] * 2, at_2=[[1, 1, 1, 0.5]] * 2, at_3=worse)
    assert lab.chosen(late, "arm", by="end").rate == 1
    assert lab.chosen(tuned(at_0=worse, at_1=quick, at_2=quick, at_3=worse), "arm").rate == 1  # the lower of equals


def test_chosen_names_an_edge_and_counts_a_diverged_network_as_0():
    good, gone = [[0.1, 0.9, 0.9, 0.9]] * 2, [[0.1, 1.0, 1.0, 1.0], [0.1, np.nan, np.nan, np.nan]]
    found = lab.chosen(tuned(at_1=good, at_2=gone), "arm")
    assert found == (1, "the best learning rate of arm, 1, is at the edge of its grid")
    assert lab.chosen(tuned(at_1=good), "arm").edge == ""  # one rate has been fixed, and is not a grid


OPTIONS = {"steps": 8, "batch_size": 50, "eval_every": 4}


def test_lab_trains_what_is_missing_and_tunes_with_seeds_of_its_own(tmp_path, monkeypatch):
    asked, fit = [], train.fit

    def remembered(*args, seeds, settings, **options):
        asked.append((list(seeds), [setting["rate"] for setting in settings], options["probe"] is not None))
        return fit(*args, seeds=seeds, settings=settings, **options)

    monkeypatch.setattr(train, "fit", remembered)
    record = runs.Record(tmp_path / "metrics.jsonl")
    options = {**OPTIONS, "probe": scores.probe_training(SMALL.apply)}
    for seeds in ([3], [3, 5], [3, 5]):
        laboratory = lab.Lab(DIGITS, record, seeds, tuning_seeds=(900,))
        best = laboratory.tune("arm", SMALL, (0.01, 0.1, 1.0), **options)
        laboratory.train("arm", SMALL, (best.rate, best.rate), **options)
    rates = [0.01, 0.1, 1.0]
    assert asked == [([900], rates, False), ([3], [best.rate], True), ([5], [best.rate], True)]
    assert {*record.runs} == {*(f"tuning arm@{rate:g}" for rate in rates), f"arm@{best.rate:g}"}
    metrics = record.metrics([3, 5], 10)[lab.at("arm", best.rate)]
    assert metrics["train_accuracy"].shape == (2, 3)
    assert metrics["test_accuracy"].shape == (2,)
    tried = record.metrics([900], 10)[lab.tuning("arm", 0.1)]
    assert not any(name.startswith("test_") for name in tried.values)  # a choice has no use for test images


def plain_loop(splits, i, seed, rate, steps, moving):
    """Losses of a run's steps, one after the other, on only the images of its seed."""
    params, state = SMALL.init(jax.random.key(seed))

    @jax.jit
    def gradient(params, state, x, y):
        def loss(params):
            logits, new = SMALL.apply(params, state, x, True)
            return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(y)), y]), new

        return jax.value_and_grad(loss, has_aux=True)(params)

    losses = []
    for step in range(steps):
        indices, weights = (part[0] for part in data.batches(splits.train.shape[1], 50, seed, step, 1))
        chosen = splits.train[i][indices[weights > 0]]
        x, y = splits.images[chosen], splits.labels[i][chosen]
        if moving:
            x = stream.moved(x, stream.motions(seed, step, 1, 50)[0][: len(x)])
        (value, state), gradients = gradient(params, state, x.reshape(len(x), -1), y)
        params = jax.tree.map(lambda p, g: p - rate * g, params, gradients)
        losses.append(value)
    test = splits.test[i]
    logits, _ = SMALL.apply(params, state, splits.images[test].reshape(len(test), -1), False)
    return losses, np.mean(logits.argmax(-1) == splits.labels[i][test])


@pytest.mark.parametrize("moving", [False, True])
def test_fit_divided_over_devices_equals_one_device_and_a_plain_loop(moving):
    """Three runs on two devices, one of which repeats a run; 120 images, so that every third batch has 20."""
    seeds, rates = [4, 11, 6], (0.1,)
    splits = data.splits(DIGITS, seeds, train=120, noise=0.2)
    optimizer, settings = lambda rate: optax.sgd(rate), [{"rate": rate} for rate in rates]
    options = {"steps": 7, "batch_size": 50, "eval_every": 7, "settings": settings, "moving": moving}
    init = lambda key, rate: SMALL.init(key)  # noqa: E731
    call = partial(train.fit, init, SMALL.apply, optimizer, splits, seeds=seeds, **options)
    divided, one = [*call()][-1], [*call(runtime=Runtime(devices=1))][-1]
    assert divided.loss.shape == (3,)
    np.testing.assert_allclose(divided.loss, one.loss, rtol=1e-4)
    for name in ("test_loss", "validation_loss"):
        np.testing.assert_allclose(divided.values[name], one.values[name], rtol=1e-3)
    for i, seed in enumerate(seeds):
        losses, accuracy = plain_loop(splits, i, seed, rates[0], 7, moving)
        np.testing.assert_allclose(divided.loss[i], np.mean(losses), rtol=1e-4)
        np.testing.assert_allclose(divided.values["test_accuracy"][i], accuracy, atol=1.1 / 359)


def test_fit_takes_batches_from_the_training_part_of_the_seed_alone():
    """All other images and labels are poison."""
    seeds = [4, 11]
    splits = data.splits(DIGITS, seeds, train=60)
    clean = [*train.fit(*SMALL, lambda: optax.sgd(0.1), splits, seeds=seeds, **OPTIONS)][-1]
    for i in range(2):
        images = splits.images.copy()
        images[np.setdiff1d(np.arange(len(images)), splits.train[i])] = np.nan
        poisoned = splits._replace(images=images)
        found = [*train.fit(*SMALL, lambda: optax.sgd(0.1), poisoned, seeds=seeds, **OPTIONS)][-1]
        np.testing.assert_allclose(found.loss[i], clean.loss[i], rtol=1e-5)
        assert np.isnan(found.loss[1 - i])
        assert np.isnan(found.values["test_accuracy"][i])


def test_settings_in_one_program_are_the_runs_that_each_would_be_alone():
    rates, options = (0.1, 0.5), {**OPTIONS, "seeds": [0, 1]}
    splits = data.splits(DIGITS, [0, 1])
    init = lambda key, rate: SMALL.init(key)  # noqa: E731
    settings = [{"rate": rate} for rate in rates]
    together = [*train.fit(init, SMALL.apply, lambda rate: optax.sgd(rate), splits, settings=settings, **options)]
    for i, rate in enumerate(rates):
        alone = [*train.fit(*SMALL, partial(optax.sgd, rate), splits, **options)]
        for both, one in zip(together[1:], alone[1:], strict=True):
            # To the last bit, because a CPU takes one run after the other.
            np.testing.assert_array_equal(both.loss[2 * i : 2 * i + 2], one.loss)
    assert [evaluation.progress for evaluation in together] == [0, 0.5, 1]


def test_a_probe_sees_the_first_training_images_of_its_seed():
    seeds = [4, 11]
    splits = data.splits(DIGITS, seeds, train=30)
    probe = lambda params, state, view: {"sum": view.images.sum(), "labels": view.labels.astype(jnp.float32)}  # noqa: E731
    first = next(
        iter(
            train.fit(*SMALL, lambda: optax.sgd(0.1), splits, seeds=seeds, probe=probe, **OPTIONS | {"batch_size": 30})
        )
    )
    for i in range(2):
        np.testing.assert_allclose(first.values["sum"][i], splits.images[splits.train[i]].sum(), rtol=1e-5)
        np.testing.assert_array_equal(first.values["labels"][i], splits.labels[i][splits.train[i]])

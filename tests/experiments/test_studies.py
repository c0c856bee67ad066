"""The experiments on claims: all of them in smoke, what their thresholds ask for, and what they are made of."""

import base64
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.__main__ import STUDIES, main
from experiments.claims import (
    activations,
    devices,
    gradients,
    initialization,
    learning_rate,
    noise,
    placement,
    recurrent,
    regularization,
    smoothness,
)
from experiments.harness import data, records, report, runtime, study, train
from experiments.models import networks
from tests.support import reference
from tests.support.browser import open_in_browser
from tests.support.page import Page

IDS = [
    "convergence",
    "activations",
    "learning-rate",
    "initialization",
    "gradients",
    "smoothness",
    "regularization",
    "noise",
    "batch-size",
    "recurrent",
    "placement",
    "cost",
    "devices",
]
RESULTS = Path(__file__).parents[2] / "experiments" / "results"


def run(*words):
    """Run the command line as users have it: with JAX's own promotion of dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        assert main([str(word) for word in words]) == 0


def assert_report_has(folder, verdicts):
    """Every verdict, and every figure as it lies beside."""
    page = Page((folder / "report.html").read_text())
    for verdict, text in zip(verdicts, page.text["section"], strict=True):
        for name in ("id", "claim", "source", "measured", "threshold", "verdict"):
            assert verdict[name]
            assert verdict[name] in text
    figures = [base64.b64decode(picture["src"].removeprefix("data:image/png;base64,")) for picture in page.pictures]
    assert figures == [(folder / name / f"{name}.png").read_bytes() for name in IDS]


@pytest.mark.slow
def test_all_in_smoke_write_report_and_verdicts_and_go_on_where_they_were_stopped(tmp_path, monkeypatch):
    measured, write_run = [], records.write_run
    monkeypatch.setattr(
        records, "write_run", lambda folder, *args: measured.append(folder.name) or write_run(folder, *args)
    )
    run("all", "--preset", "smoke", "--out", tmp_path)
    verdicts = json.loads((tmp_path / "verdicts.json").read_text())
    assert [verdict["id"] for verdict in verdicts] == IDS == measured
    assert {verdict["seeds"] for verdict in verdicts} == {2}
    assert {verdict["verdict"] for verdict in verdicts} <= {*report.VERDICTS}
    assert_report_has(tmp_path, verdicts)
    # As if killed: one experiment stands in the middle, another has not begun, and there is no report.
    begun = json.loads((tmp_path / "devices" / "config.json").read_text())
    del begun["seconds"]
    (tmp_path / "devices" / "config.json").write_text(json.dumps(begun))
    (tmp_path / "placement" / "config.json").unlink()
    metrics = tmp_path / "initialization" / "metrics.jsonl"  # damaged: cut within a line
    metrics.write_text(metrics.read_text()[:-20])
    for name in ("report.html", "verdicts.json"):
        (tmp_path / name).unlink()
    measured.clear()
    run("all", "--preset", "smoke", "--out", tmp_path)
    assert measured == ["initialization", "placement", "devices"]
    assert json.loads((tmp_path / "verdicts.json").read_text()) == verdicts  # seeds fix the rest


def test_a_preset_sets_the_flags_that_are_not_given(tmp_path, capsys):
    run("devices", "--preset", "smoke", "--steps", "3", "--out", tmp_path)
    config = records.read_config(tmp_path / "devices")["config"]
    assert (config["preset"], config["steps"], config["hidden"], config["seeds"]) == ("smoke", 3, [30], 2)
    assert "verdict    " in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["devices", "--preset", "large"])
    assert "smoke" in capsys.readouterr().err


def test_every_study_has_five_seeds_or_more_for_a_verdict():
    assert [each.NAME for each in STUDIES] == IDS
    for each in STUDIES:
        assert each.of("default").seeds >= 5
        assert each.of("full").seeds >= 5


def test_committed_verdicts_follow_from_the_committed_metrics():
    assert len([*RESULTS.rglob("verdicts.json")]) == 1
    verdicts = json.loads((RESULTS / "verdicts.json").read_text())
    assert [verdict["id"] for verdict in verdicts] == IDS
    for verdict, kind in zip(verdicts, STUDIES, strict=True):
        config = records.read_config(RESULTS / kind.NAME)
        assert config["config"]["preset"] == "default"
        assert verdict["seeds"] == config["config"]["seeds"] >= 5
        finding = kind.of("default").judge(records.read_metrics(RESULTS / kind.NAME))
        assert verdict["measured"] == finding.measured
        assert report.VERDICTS.index(verdict["verdict"]) == 2 - any(finding.met) - all(finding.met)
        assert [verdict[name] for name in ("claim", "source", "threshold")] == [kind.CLAIM, kind.SOURCE, kind.THRESHOLD]
    assert_report_has(RESULTS, verdicts)


@pytest.mark.slow
def test_the_committed_report_is_drawn_without_a_message():
    messages, drawn = open_in_browser(RESULTS / "report.html")
    assert not messages
    assert drawn == [True] * len(IDS)


def test_clearly_asks_for_the_95_percent_limit_of_the_mean():
    values = np.array([1.0, 2.0, 3.0, 4.0, 5.0])  # mean 3, standard error sqrt(2.5 / 5); t(0.975, 4) is 2.776
    limit = 3 - 2.776 * np.sqrt(0.5)
    assert study.clearly(values, limit - 1e-3)
    assert not study.clearly(values, limit + 1e-3)
    assert not study.clearly(np.array([1.0, np.nan, 3.0]), -100)
    assert not study.clearly(np.array([1.0]), 0.5)


def test_what_never_arrives_or_diverges_loses():
    quick, never = np.array([20.0, 30.0]), np.array([np.nan, np.nan])
    assert study.fewer(quick, never, last=1000)
    assert not study.fewer(never, quick, last=1000)
    assert not study.fewer(quick, never, last=1000, times=50)
    assert study.clearly(np.array([0.9, 0.91]) - study.lower(never))


def test_placement_counts_what_never_reaches_the_target_as_the_last_step():
    best, slow = [[0.1, 0.9, 0.9]] * 2, [[0.1, 0.2, 0.3]] * 2
    accuracy = {"before": best, "after": slow, "plain": [[0.1, 0.2, 0.5]] * 2}
    metrics = {f"{n}, {p}": series(test_accuracy=a) for n in placement.NETWORKS for p, a in accuracy.items()}
    finding = placement.Placement(seeds=2, steps=1000).judge(metrics)
    assert finding.met == (True,) * 4
    assert finding.title.endswith("in 256-128 before is better, in 64 before is better")


def test_settings_in_one_vmap_are_the_runs_that_each_would_be_alone():
    digits = data.digits()
    init, apply = networks.mlp(digits, (8,), True)
    options = {"seeds": 2, "steps": 20, "batch_size": 50, "eval_every": 10}
    rates = [{"learning_rate": 0.1}, {"learning_rate": 0.5}]
    together = [*train.fit(lambda key, learning_rate: init(key), apply, optax.sgd, digits, settings=rates, **options)]
    for i, rate in enumerate(rates):
        alone = [*train.fit(init, apply, partial(optax.sgd, **rate), digits, **options)]
        for both, one in zip(together[1:], alone[1:], strict=True):
            np.testing.assert_allclose(both.loss[2 * i : 2 * i + 2], one.loss, rtol=1e-4)
    assert [evaluation.progress for evaluation in together] == [0, 0.5, 1]


def series(**values):
    """The series of a network, from arrays of shape (seeds, evaluations, ...)."""
    values = {name: np.asarray(value, float) for name, value in values.items()}
    return records.Series(np.arange(next(iter(values.values())).shape[1]) * 10, values)


def test_a_rate_at_which_a_run_diverges_does_not_count_as_reached():
    experiment = learning_rate.LearningRate(seeds=2, multiples=(1.0, 10.0))
    fast, slow = [[0.1, 0.9, 0.9, 0.9]] * 2, [[0.1, 0.2, 0.5, 0.8]] * 2
    gone = [[0.1, 0.9, 0.9, 0.9], [0.1, 0.4, np.nan, np.nan]]
    metrics = {
        "ReLU, plain, 1x": slow,
        "ReLU, plain, 10x": gone,
        "ReLU, BN, 1x": slow,
        "ReLU, BN, 10x": fast,
        "sigmoid, plain, 1x": slow,
        "sigmoid, plain, 10x": gone,
        "sigmoid, BN, 1x": fast,
        "sigmoid, BN, 10x": slow,
    }
    finding = experiment.judge({name: series(test_accuracy=values) for name, values in metrics.items()})
    assert finding.measured.startswith("the highest rate at which all runs reach the target is 10x with batch")
    assert "they take 10 ± 0 and 30 ± 0 steps" in finding.measured
    assert finding.met == (True, True, True)
    row = dict(zip(*finding.table[:3:2], strict=True))
    assert (row["network"], row["diverged"]) == ("ReLU, plain, 10x", "1 of 2")
    assert row["steps to target"] == "10 (1 of 2)"


def test_the_range_that_trains_is_unbroken():
    experiment = initialization.Initialization(seeds=2, scales=6)
    broken = [[0.95, 0.1, 0.95, 0.95, 0.95, 0.1], [0.95, 0.95, 0.95, np.nan, 0.95, 0.1]]  # 2 decades each
    whole = np.full((2, 6), 0.95)
    metrics = {}
    for network, runs in (("plain", broken), ("batch normalization", whole)):
        for i, name in enumerate(experiment._names(network)):
            metrics[name] = series(test_accuracy=[[0.1, run[i]] for run in runs])
    finding = experiment.judge(metrics)
    assert "5.0 ± 0.0 decades train in 1200 steps with batch normalization, 2.0 ± 0.0 without" in finding.measured
    assert finding.met == (True, True)
    assert finding.table[4] == ["10^0", "0.950 (1 of 2)", "0.950 ± 0.000"]


def test_slopes_of_gradients_that_change_by_a_factor_a_layer():
    layers = np.arange(49)
    norms = np.stack([10 ** (-0.3 * layers), 2 * 10 ** (0.05 * layers), np.where(layers < 9, 0, 1)])[None]
    np.testing.assert_allclose(gradients._slopes(norms), [[-0.3, 0.05, np.nan]], rtol=1e-9)


def probed(monkeypatch, experiment):
    """The functions that the study would train and probe, of each of its networks."""
    found = []

    def fit(self, init, apply, dataset, **options):
        found.append((init, apply, options))

    monkeypatch.setattr(study.Study, "fit", fit)
    experiment.runs(data.digits())
    return found


@pytest.mark.parametrize("kind", [each for each in STUDIES if each.NAME != "cost"], ids=lambda kind: kind.NAME)
def test_every_network_of_a_study_has_a_logit_for_each_class_and_is_probed(kind, monkeypatch):
    """Traced, not compiled: in every setting, in training with a mask and in evaluation."""
    networks = probed(monkeypatch, kind.of("smoke"))
    assert len(networks) >= 2
    x, mask = np.zeros((4, 64), np.float32), np.ones((4, 1), bool)
    with jax.numpy_dtype_promotion("standard"):
        for init, apply, options in networks:
            for setting in options.get("settings", [{}]):
                params, state = jax.eval_shape(partial(init, **setting), jax.random.key(0))
                for call in (partial(apply, train=True, mask=mask), partial(apply, train=False)):
                    logits, new = jax.eval_shape(call, params, state, x)
                    assert logits.shape == (4, 10)
                    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, state)
                if options.get("probe"):
                    known = jax.eval_shape(options["probe"], params, state)
                    assert known
                    assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(known))


def test_gradients_are_those_of_the_output_of_each_layer(monkeypatch):
    """Of the plain network, by the chain rule in float64."""
    (init, _, options), *_ = probed(monkeypatch, gradients.Gradients(depth=3, width=5))
    params, state = init(jax.random.key(0))
    norms = jax.jit(options["probe"])(params, state)["gradient_norm"]
    digits = data.digits()
    x, labels = np.float64(data.flat(digits.train_images)[:500]), digits.train_labels[:500]
    kernels = [np.float64(layer["kernel"]) for layer in params]
    outputs = [x]
    for kernel in kernels[:-1]:
        outputs.append(np.maximum(outputs[-1] @ kernel, 0))
    logits = outputs[-1] @ kernels[-1]
    softmax = np.exp(logits - logits.max(1, keepdims=True))
    cotangent = (softmax / softmax.sum(1, keepdims=True) - np.eye(10)[labels]) / 500
    want = []
    for kernel, output in zip(kernels[::-1], [logits, *outputs[:0:-1]], strict=True):
        cotangent = (cotangent if output is logits else cotangent * (output > 0)) @ kernel.T
        want.append(np.linalg.norm(cotangent))
    np.testing.assert_allclose(norms, want[2::-1], rtol=1e-4)


def test_smoothness_follows_the_gradient_downhill(monkeypatch):
    experiment = smoothness.Smoothness(hidden=(5,), learning_rate=0.01)
    (init, apply, options), *_ = probed(monkeypatch, experiment)
    params, state = init(jax.random.key(0))
    got = jax.jit(options["probe"])(params, state)
    digits = data.digits()
    x, labels = data.flat(digits.train_images)[:60], digits.train_labels[:60]

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        logits, _ = apply(params, state, x, True)
        return -jnp.mean(jax.nn.log_softmax(logits)[np.arange(60), labels])

    _, gradient = loss(params)
    there = [
        jax.tree.map(lambda p, g, h=h: np.asarray(p) - np.float32(0.01 * h) * np.asarray(g), params, gradient)
        for h in (0.5, 1, 2, 4)
    ]
    losses = [float(loss(each)[0]) for each in there]
    assert losses == sorted(losses, reverse=True)  # such short steps lead downhill
    np.testing.assert_allclose(got["loss_range"], losses[0] - losses[-1], rtol=1e-3)
    distances = [
        np.sqrt(sum(np.sum(np.square(np.float64(a) - b)) for a, b in zip(*map(jax.tree.leaves, pair), strict=True)))
        for pair in ((loss(each)[1], gradient) for each in there)
    ]
    np.testing.assert_allclose(got["gradient_distance"], max(distances), rtol=1e-3)
    norm = np.sqrt(sum(np.sum(np.square(np.float64(leaf))) for leaf in jax.tree.leaves(gradient)))
    np.testing.assert_allclose(got["relative_distance"], max(distances) / norm, rtol=1e-3)


def test_activations_are_percentiles_of_the_last_hidden_layer(monkeypatch):
    _, (init, _, options) = probed(monkeypatch, activations.Activations(hidden=(6, 4), units=3))
    params, state = init(jax.random.key(0))
    got = jax.jit(options["probe"])(params, state)["percentiles"]
    x = np.float64(data.flat(data.digits().test_images))
    for layer in params[:2]:
        x = x @ np.float64(layer["kernel"])
        _, mean, var = reference.moments(x)
        x = normalized = reference.normalize(x, mean, var, 1, 0)
        x = 1 / (1 + np.exp(-x))
    np.testing.assert_allclose(got, np.percentile(normalized[:, :3], (15, 50, 85), axis=0), rtol=1e-3, atol=1e-3)


def test_penalties_are_the_gradients_of_their_formula():
    params = [{"kernel": jnp.array([[1.5, -2.0]]), "bias": jnp.array([3.0, 4.0])}]
    optimizer = regularization.l1_and_l2(0.5, jnp.float32(0.1), jnp.float32(0.01))
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    penalty = jax.grad(lambda p: 0.1 * jnp.abs(p[0]["kernel"]).sum() + 0.01 * (p[0]["kernel"] ** 2).sum() / 2)(params)
    np.testing.assert_allclose(updates[0]["kernel"], -0.5 * penalty[0]["kernel"], rtol=1e-6)
    np.testing.assert_array_equal(updates[0]["bias"], [0, 0])


def test_noise_after_batch_normalization_is_of_the_stated_size_and_only_in_training(rng):
    x = rng.standard_normal((4000, 3)).astype(np.float32)
    params, state = noise_free = networks.mlp_init(jax.random.key(0), (3, 3, 2), 1.0, True)
    params, state = params[0]["bn"], smoothness.noisy_init(jax.random.key(1), lambda key: noise_free)[1][0]
    y, new = smoothness.noisy_bn_apply(params, state, x, True)
    assert (np.abs(y.mean(0)) < 0.51).all()
    assert (np.abs(y.mean(0)) > 1e-4).any()
    # s about a deviation in [1, 1.25] with 0.1, m about its mean with a width of 0.2.
    spread = np.sqrt(np.array([1, 1.25]) ** 2 + 0.1**2 + 0.2**2 / 12)
    assert (y.std(0) > 0.97 * spread[0]).all()
    assert (y.std(0) < 1.03 * spread[1]).all()
    again, _ = smoothness.noisy_bn_apply(params, new, x, True)
    assert np.abs(again.mean(0) - y.mean(0)).max() > 1e-3  # drawn anew
    evaluated, _ = smoothness.noisy_bn_apply(params, state, x, False)
    np.testing.assert_allclose(evaluated, reference.normalize(x, 0, 1, 1, 0), rtol=1e-5, atol=1e-5)


def test_population_statistics_normalize_the_batch(rng):
    population = rng.standard_normal((50, 4)).astype(np.float32) * 3 + 1
    params, state = networks.mlp_init(jax.random.key(0), (4, 3, 2), 1.0, True)
    apply = partial(networks.mlp_apply, activation=jax.nn.relu)
    logits, new = noise._with_population(apply, population, params, state, population[:5] + 1, True)
    kernels = [np.asarray(layer["kernel"], np.float64) for layer in params]
    _, mean, var = reference.moments(population @ kernels[0])
    hidden = np.maximum(reference.normalize((population[:5] + 1) @ kernels[0], mean, var, 1, 0), 0)
    np.testing.assert_allclose(logits, hidden @ kernels[1], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(new[0].mean, 0.01 * mean, rtol=1e-4, atol=1e-5)


def test_own_statistics_are_those_of_each_device(rng):
    x = rng.standard_normal((8, 4)).astype(np.float32) * 3 + np.arange(8, dtype=np.float32)[:, None]
    params, state = networks.mlp_init(jax.random.key(0), (4, 3, 2), 1.0, True)
    apply = partial(devices._own_statistics, partial(networks.mlp_apply, activation=jax.nn.relu))
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


def test_the_plain_lstm_matches_its_equations(rng):
    """In float64: the equations of the BN-LSTM with nothing normalized."""
    x = rng.uniform(size=(3, 6)).astype(np.float32)
    params, state = recurrent._init(jax.random.key(0), classes=2, features=4, name="LSTM", pixels=6)
    logits, _ = recurrent._apply(params, state, x, True, name="LSTM", pixels=6, momentum=0.9)
    lstm = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["lstm"])
    np.testing.assert_array_equal(lstm.bias, [1] * 4 + [0] * 12)
    output, cell = np.float64(0.1 * jax.random.normal(jax.random.key(0), (3, 4))), np.zeros((3, 4))
    for t in range(6):
        gates = x[:, t : t + 1] @ lstm.input_kernel + output @ lstm.recurrent_kernel + lstm.bias
        f, i, o = (1 / (1 + np.exp(-gate)) for gate in np.split(gates, 4, 1)[:3])
        cell = f * cell + i * np.tanh(np.split(gates, 4, 1)[3])
        output = o * np.tanh(cell)
    np.testing.assert_allclose(logits, output @ np.asarray(params["kernel"], np.float64), rtol=1e-4, atol=1e-5)

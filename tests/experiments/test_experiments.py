"""The experiments' command line, training loop and files."""

import contextlib
import io
import json
from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.__main__ import main
from experiments.benchmark import bench, contenders
from experiments.demos import training
from experiments.harness import data, records, runs, scores, train
from experiments.harness.runtime import Runtime
from experiments.models import networks
from tests.support import reference

INIT, APPLY = networks.mlp(data.digits(), (8,), True, networks.constant(0.5), activation=jax.nn.sigmoid)


def fit(seeds, steps=40, eval_every=20):
    return list(
        train.fit(
            INIT,
            APPLY,
            partial(optax.sgd, 0.5),
            data.digits(),
            seeds=seeds,
            steps=steps,
            batch_size=60,
            eval_every=eval_every,
            runtime=Runtime(devices=1),
        )
    )


def test_spread_of_numbers_that_are_equal_is_zero():
    assert records.spread(np.full(10, 31.6), ".3g") == "31.6 ± 0"  # std of these is 3.7e-15
    assert records.spread(np.array([1.0, 2.0, np.nan]), ".2f") == "1.50 ± 0.71 (2 of 3)"
    assert records.spread(np.array([np.nan]), ".2f", "never") == "never"


def test_mlp_matches_the_oracle_in_training_and_evaluation(rng):
    params, state = INIT(jax.random.key(0))
    assert [set(layer) for layer in params] == [{"kernel", "bn"}, {"kernel", "bias"}]
    x = rng.standard_normal((20, 64)).astype(np.float32)
    kernels = [np.asarray(layer["kernel"], np.float64) for layer in params]
    start = np.ones(8), np.zeros(8), np.zeros(8), np.ones(8)
    hidden, mean, var = reference.train(x @ kernels[0], *start, momentum=0.9)
    logits, (new,) = APPLY(params, state, x, True)
    np.testing.assert_allclose(logits, 1 / (1 + np.exp(-hidden)) @ kernels[1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(new.var, var, rtol=1e-5)
    logits, _ = APPLY(params, [new], x, False)
    hidden = reference.normalize(x @ kernels[0], mean, var, np.ones(8), np.zeros(8))
    np.testing.assert_allclose(logits, 1 / (1 + np.exp(-hidden)) @ kernels[1], rtol=1e-4, atol=1e-5)


def test_fit_matches_a_plain_loop():
    digits, steps = data.digits(), 25  # the 24th batch is the last of its epoch and has 57 images
    params, state = INIT(jax.random.key(1))

    def loss(params, state, x, y):
        logits, state = APPLY(params, state, x, True)
        return -jnp.mean(jax.nn.log_softmax(logits)[np.arange(len(y)), y]), state

    gradient_of = jax.jit(jax.value_and_grad(loss, has_aux=True))
    losses = []
    for indices, weights in zip(*data.batches(len(digits.train_images), 60, 1, 0, steps), strict=True):
        indices = indices[weights > 0]
        x, y = digits.train_images[indices].reshape(-1, 64), digits.train_labels[indices]
        (value, state), gradient = gradient_of(params, state, x, y)
        params = jax.tree.map(lambda p, g: p - 0.5 * g, params, gradient)
        losses.append(value)
    logits, _ = APPLY(params, state, digits.test_images.reshape(-1, 64), False)
    last = fit(seeds=2, steps=steps, eval_every=steps)[-1]
    np.testing.assert_allclose(last.loss[1], np.mean(losses), rtol=1e-4)
    # Rounding may move an image or two of the 360 over a boundary.
    np.testing.assert_allclose(
        last.values["test_accuracy"][1], np.mean(logits.argmax(-1) == digits.test_labels), atol=2.1 / 360
    )


@pytest.mark.parametrize(
    ("batch_size", "devices", "padded"),
    [(60, None, True), (61, 1, True), (479, None, False), (479, 1, False), (479, 2, True)],
)
def test_a_network_gets_a_mask_only_if_some_batch_is_padded(batch_size, devices, padded):
    dataset = data.digits()
    assert len(dataset.train_images) == 3 * 479
    masks = set()

    def apply(params, state, x, train, *, mask=None, axis_name=None):
        if train:
            masks.add(mask is not None)
        return APPLY(params, state, x, train, mask=mask, axis_name=axis_name)

    runtime = Runtime(devices=devices) if devices else None
    options = {"seeds": 1, "steps": 1, "batch_size": batch_size, "eval_every": 1, "runtime": runtime}
    *_, last = train.fit(INIT, apply, partial(optax.sgd, 0.5), dataset, **options)
    assert masks == {padded}
    assert np.isfinite(last.loss).all()


def test_fit_evaluates_at_every_interval_and_at_the_end():
    evaluations = fit(seeds=1, steps=50)
    assert [e.step for e in evaluations] == [0, 20, 40, 50]
    assert np.isnan(evaluations[0].loss).all()
    chance = 1 / 10
    assert evaluations[-1].values["test_accuracy"][0] > 2 * chance
    assert evaluations[-1].loss[0] < evaluations[1].loss[0]


@pytest.fixture(scope="module")
def demonstration(tmp_path_factory):
    """What a small run printed, and its folder."""
    out, printed = tmp_path_factory.mktemp("results"), io.StringIO()
    flags = {"steps": 60, "seeds": 2, "eval-every": 20, "hidden": 16, "batch-size": 50, "devices": 1, "out": out}
    with contextlib.redirect_stdout(printed):
        assert main(["train", *(str(word) for name, value in flags.items() for word in (f"--{name}", value))]) == 0
    return printed.getvalue(), out / "train"


def test_train_writes_its_configuration_metrics_and_figure(demonstration):
    _, folder = demonstration
    config = records.read_config(folder)
    assert config["config"]["steps"] == 60
    assert config["config"]["hidden"] == [16]
    assert config["dataset"] == "scikit-learn digits"
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 2 * 2 * 4  # networks, seeds, evaluations
    assert {m["network"] for m in metrics} == {"plain", "batch normalization"}
    assert all((m["loss"] is None) == (m["step"] == 0) for m in metrics)
    assert (folder / "train.png").read_bytes().startswith(b"\x89PNG")


def test_train_prints_what_the_metrics_say(demonstration):
    printed, folder = demonstration
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [m["test_accuracy"] for m in metrics if m["network"] == "plain" and m["step"] == 60]
    row = next(line for line in printed.splitlines() if line.startswith("plain"))
    assert row.endswith(f"{np.mean(last):.4f} ± {np.std(last, ddof=1):.4f}")


def test_train_says_what_diverged_and_what_was_never_reached():
    steps, accuracy = (
        np.arange(4) * 10,
        {
            "plain": [[0.1, 0.5, 0.8, 0.7], [0.1, 0.3, 0.4, 0.6]],
            "batch normalization": [[0.9, 0.95, 0.97, 0.98], [0.1, np.nan, np.nan, np.nan]],
        },
    )
    metrics = {
        name: runs.Series((0, 1), steps, {"loss": np.ones((2, 4)), "test_accuracy": np.array(values)})
        for name, values in accuracy.items()
    }
    assert training.rows(metrics)[1:] == [
        ["plain", "never", "1.0000 ± 0.0000", "0.6500 ± 0.0707"],
        ["batch normalization", "0 (1 of 2)", "1.0000 ± 0.0000", "0.9800 (1 of 2)"],
    ]


def test_the_test_error_has_half_a_mistake_more_and_counts_the_first_class_for_a_diverged_network():
    def apply(params, state, images, train):
        return images, state

    right = jnp.eye(4)
    assert scores.error(apply, None, None, right, jnp.arange(4)) == pytest.approx(0.1)
    assert scores.error(apply, None, None, right * jnp.nan, jnp.arange(4)) == pytest.approx(0.7)


def test_a_diverged_network_has_no_accuracy():
    evaluation = list(
        train.fit(
            INIT,
            APPLY,
            partial(optax.sgd, 1e38),
            data.digits(),
            seeds=1,
            steps=5,
            batch_size=60,
            eval_every=5,
        )
    )[-1]
    (record,) = records.records("plain", evaluation)
    assert record["test_accuracy"] is None


BAD_FLAGS = {
    "seeds": "0",
    "eval-every": "0",
    "steps": "-1",
    "hidden": "-3",
    "momentum": "2",
    "learning-rate": "nan",
    "batch-size": "5000",
    "devices": "9",
    "checkpoint-every": "0",
    "checkpoint-keep": "-1",
    "process-timeout": "0",
    "num-processes": "2",
    "process-id": "0",
    "coordinator": "somewhere",
}


@pytest.mark.parametrize("flag", BAD_FLAGS)
def test_a_bad_flag_is_refused_before_anything_is_written(flag, tmp_path, capsys):
    try:
        status = main(["train", f"--{flag}", BAD_FLAGS[flag], "--out", str(tmp_path)])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    output = "".join(capsys.readouterr())
    assert f"{flag.replace('-', '_')}={BAD_FLAGS[flag]}" in output
    assert "expected" in output
    assert not list(tmp_path.iterdir())


def test_bad_input_is_one_line_on_stderr(tmp_path, capsys):
    assert main(["train", "--data-dir", str(tmp_path), "--out", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "train-images-idx3-ubyte: no such file" in message
    assert message.count("\n") == 1


CASES = [
    pytest.param((["bn"], ["last"]), id="few"),
    pytest.param((["bn", "bn_add_relu"], ["first", "last"]), id="many", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", params=CASES)
def bench_run(request, tmp_path_factory):
    """What a small run measured, what it printed, its folder, and the number of its blocks and layouts."""
    blocks, layouts = request.param
    folder, printed = tmp_path_factory.mktemp("bench"), io.StringIO()
    parts = ["libraries", "growth", "small", "vmap", "variants"]
    arguments = ["--parts", *parts, "--shapes", "8x2x2x4", "16x8", "--dtypes", "float32", "--layouts", *layouts]
    arguments += ["--blocks", *blocks, "--megabytes", "1", "--ghost-size", "2", "--rounds", "3"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(bench, "keep_memory", lambda: False)  # this process is for other tests too
        patch.setattr(bench, "REST", 0)
        patch.setattr(contenders, "installed", lambda: ["bnjax", "Flax Linen", "Flax NNX"])
        assert main(["bench", *arguments, "--out", str(folder)]) == 0
    return bench.read(folder / "bench"), printed.getvalue(), folder / "bench", len(blocks) * len(layouts)


def test_bench_times_every_case_in_every_library(bench_run):
    times, _, folder, kinds = bench_run
    assert len(times["libraries"]) == kinds * 2 * 2  # shapes and directions
    names = {"copy by XLA", "copy by threads", "bnjax", "Flax Linen", "Flax NNX"}
    for entry in times["libraries"] + times["small"]:
        assert set(entry["seconds"]) == names
    assert {len(seconds) for entry in times["libraries"] for seconds in entry["seconds"].values()} == {3}
    for figure in "libraries.png", "growth.png":
        assert (folder / figure).read_bytes().startswith(b"\x89PNG")


def test_bench_prints_the_ratios_of_the_least_times_that_it_writes(bench_run):
    times, printed, *_ = bench_run
    lines = [line.split() for line in printed.splitlines()]
    (row,) = (line for line in lines if line[:4] == ["bn", "backward", "float32", "last"])
    entries = [e for e in times["libraries"] if (e["block"], e["direction"], e["layout"]) == ("bn", "backward", "last")]
    least = [{name: min(seconds) for name, seconds in e["seconds"].items()} for e in entries]
    linen = np.sqrt(np.prod([m["Flax Linen"] / m["bnjax"] for m in least]))
    limit = np.sqrt(np.prod([m["bnjax"] / (4 * min(m["copy by XLA"], m["copy by threads"])) for m in least]))
    np.testing.assert_allclose([float(row[4]), float(row[6])], [linen, limit], atol=0.0051)
    variants = {name: min(seconds) for name, seconds in times["variants"][1]["seconds"].items()}
    row = next(line for line in lines if line[:1] == ["16x8"])
    np.testing.assert_allclose(
        np.array(row[1:], float), np.array([*variants.values()]) / variants["bn_apply"], atol=0.0051
    )


def test_a_disturbed_call_is_one_whose_median_is_far_above_its_least_time():
    entry = {"seconds": {"calm": [1.0, 1.2, 1.4], "disturbed": [1.0, 1.6, 1.6], "once": [1.0, 1.0, 9.0]}}
    assert bench.disturbed(entry) == ["disturbed"]
    assert bench.least(entry) == {"calm": 1.0, "disturbed": 1.0, "once": 1.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "8192"], "shapes=8192: expected sizes joined by x"),
        (["--shapes", "8xfour"], "shapes=8xfour: expected sizes joined by x"),
        (["--shapes", "8x0"], "shapes=8x0: expected sizes joined by x"),
        (["--libraries", "bnjax", "Torch"], "expected bnjax and some of"),
        (["--libraries", "PyTorch"], "expected bnjax and some of"),
    ],
)
def test_bench_rejects(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["bench", *arguments])
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", ["bnjax", "Flax Linen", "Flax NNX"])
@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("block", get_args(contenders.Block))
def test_contenders_compute_the_same(name, layout, block):
    """Output and gradient in x, in float64 from the formula; another library's wrong axis would be a wrong time."""
    case = contenders.Case((8, 2, 3, 4), block, "backward", "float32", layout)
    y, _, (_, dx, *_) = contenders.CONTENDERS[name][1](case)()
    x, other, cotangent = (a.astype(np.float64) for a in case.arrays())
    axis = case.axis % 4
    _, mean, var = reference.moments(x, axis)
    want = reference.normalize(x, mean, var, np.ones(4), np.zeros(4), axis, 1e-5)
    if block != "bn":
        want = want + other * (block == "bn_add_relu")
        cotangent = cotangent * (want > 0)
        want = np.maximum(want, 0)
    np.testing.assert_allclose(y, want, atol=1e-5)
    np.testing.assert_allclose(dx, reference.gradients(x, cotangent, np.ones(4), axis, 1e-5)[0], atol=1e-5)


def test_averaging_prints_what_it_writes(tmp_path, capsys):
    with jax.numpy_dtype_promotion("standard"):  # optax.ema promotes
        main(["averaging", "--depth", "2", "--width", "8", "--steps", "20", "--seeds", "2", "--out", str(tmp_path)])
    runs = json.loads((tmp_path / "averaging" / "evaluations.json").read_text())
    assert records.read_config(tmp_path / "averaging")["config"]["depth"] == 2
    printed = capsys.readouterr().out
    for way in ("last", "averaged, running statistics", "averaged, recalibrated statistics"):
        accuracy, loss = np.array([evaluations[way] for evaluations in runs]).T
        row = next(line for line in printed.splitlines() if line.startswith(f"{way}  "))
        for values in (accuracy, loss):
            assert f"{values.mean():.4f} ± {values.std(ddof=1):.4f}" in row

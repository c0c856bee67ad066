"""Diagnosis of single layers, and its table, data and plot."""

import json
import re
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnjax
import bnjax.linen
import bnjax.nnx
from bnjax.diagnosis.limits import INITIAL
from bnjax.diagnosis.measure import diagnose
from tests.support.diagnosis import COLLECTED, EPSILON, summary

pytestmark = pytest.mark.usefixtures("flax_promotion")


def test_the_effective_batch_is_that_of_kish(rng):
    x, weights = rng.normal(size=(40, 3)).astype(np.float32), rng.random((40, 3)).astype(np.float32)
    layer = bnjax.linen.BatchNorm(use_running_average=False, momentum=0.0)
    variables = layer.init(jax.random.key(0), x)
    _, left = layer.apply(variables, x, mask=weights, mutable=COLLECTED)
    diagnosis = diagnose(variables["params"], left["batch_stats"], left["batch_moments"])
    expected = weights.sum(0, dtype=np.float64) ** 2 / (weights.astype(np.float64) ** 2).sum(0)
    report = diagnosis.layers["the model itself"]
    np.testing.assert_allclose(report.batch_size, expected, rtol=1e-5)
    np.testing.assert_allclose(report.effective_batch, expected.min(), rtol=1e-5)
    assert diagnosis.findings == []


@pytest.mark.parametrize(("weight", "most"), [(2, 3 * np.exp(3 * 2**0.5)), (9, 3 * np.exp(1.5)), (1e9, 3)])
def test_the_smaller_the_batch_the_more_its_variance_may_be_off(weight, most):
    params, state = bnjax.bn_init(4)
    state = state._replace(mean=state.mean + 1, count=state.count + 1)
    for ratio, expected in (0.99 * most, []), (1.01 * most, ["variance differs"]):
        moments = bnjax.Moments(np.full(4, weight), np.ones(4), np.full(4, 1 / ratio))
        problems = [f.problem for f in diagnose(params, state, moments).findings if f.problem != "small batch"]
        assert problems == expected


def test_masks_that_leave_features_out_show_in_the_counts(rng):
    params, state = bnjax.bn_init(4)
    for step in range(20):
        x = rng.normal(2, 3, (32, 4)).astype(np.float32)
        mask = np.array([[True, step % 2 == 0, step % 4 == 0, False]])
        _, state = bnjax.bn_apply(params, state, x, True, momentum=0.5, mask=mask)
    diagnosis = diagnose({"a": params}, {"a": state})
    assert diagnosis.layers["a"].count == (0, 20)
    assert summary(diagnosis) == [
        ("warning", "a", "never updated", (1, 4)),
        ("warning", "a", "few updates", (1, 4)),  # 5 of 20, while 10 are half of them
    ]
    assert diagnosis.findings[1].value == 5


def test_a_domain_that_never_came_is_named(rng):
    x = rng.normal(2, 3, (64, 4)).astype(np.float32)
    params, state = bnjax.indexed_bn_init(4, 3)
    for index in 0, 2:
        _, state = bnjax.indexed_bn_apply(params, state, x, True, index=index, momentum=0.0)
    diagnosis = diagnose(params, state)
    assert summary(diagnosis) == [("warning", "the model itself", "never updated", (4, 12))]
    assert "domains" in diagnosis.findings[0].advice


def test_five_updates_with_a_long_memory_leave_most_of_the_initial_values(rng):
    params, state = bnjax.bn_init(3)
    for _ in range(5):
        x = rng.normal(6, 3, (64, 3)).astype(np.float32)
        _, state = bnjax.bn_apply(params, state, x, True, momentum=0.99)
    (finding,) = diagnose(params, state, momentum=0.99).findings
    assert finding[:4] == ("error", "the model itself", "initial values", (3, 3))
    np.testing.assert_allclose(finding.value, 0.99**5)
    assert "debiased" in finding.advice
    both = diagnose(params, state, bnjax.batch_moments(x), momentum=0.99)
    assert next(f.problem for f in both.findings) == "initial values"  # 9.5 times its limit
    assert "mean shifted" in [f.problem for f in both.findings]
    for count, severity in (60, "error"), (200, "warning"), (300, None):
        later = state._replace(count=jnp.full(3, count))
        found = [f.severity for f in diagnose(params, later, momentum=0.99).findings]
        assert found == ([severity] if 0.99**count > INITIAL else [])
    assert diagnose(params, state).findings == []  # momentum is not known


def test_statistics_that_came_without_a_count_are_noted():
    params, state = bnjax.interop.from_keras([np.ones(2), np.zeros(2), np.full(2, 3.0), np.full(2, 2.0)])
    assert summary(diagnose(params, state)) == [("note", "the model itself", "not counted", (2, 2))]


def test_within_a_severity_the_largest_multiple_of_its_limit_leads(rng):
    x = rng.normal(0, 1, (100, 4)).astype(np.float32)
    params, state = bnjax.bn_init(4)
    _, state = bnjax.bn_apply(params, state, x, True, momentum=0.0)
    shifts = {"small": 2, "large": 30, "medium": 10}
    moments = {name: bnjax.batch_moments(x + shift) for name, shift in shifts.items()}
    diagnosis = diagnose(dict.fromkeys(shifts, params), dict.fromkeys(shifts, state), moments)
    assert [f.layer for f in diagnosis.findings] == ["large", "medium", "small"]


@pytest.mark.parametrize("dtype", ["bfloat16", "complex64", "float64"])
def test_every_dtype_is_examined(dtype, rng):
    x = rng.normal(2, 3, (200, 3)) + 1j * rng.normal(-1, 3, (200, 3))
    x = x if dtype == "complex64" else x.real
    mean, var = x.mean(0), x.var(0)
    with jax.enable_x64(dtype == "float64"):
        real = "float32" if dtype == "complex64" else dtype
        state = bnjax.BNState(jnp.asarray(mean, dtype), jnp.asarray(var, real), jnp.ones(3, jnp.int32))
        params = bnjax.BNParams(jnp.ones(3, dtype), None)
        moments = bnjax.Moments(jnp.full(3, 200.0), jnp.asarray(mean, dtype), jnp.asarray(var, real))
        narrow = ["half precision"] if dtype == "bfloat16" else []
        assert [f.problem for f in diagnose(params, state, moments).findings] == narrow
        moved = moments._replace(mean=jnp.asarray(mean + 30, dtype))
        diagnosis = diagnose(params, state, moved)
    assert [f.problem for f in diagnosis.findings] == ["mean shifted", *narrow]
    expected = 30 / np.sqrt(var + EPSILON)
    np.testing.assert_allclose(diagnosis.layers["the model itself"].shift, expected, rtol=0.02)
    stored = json.loads(json.dumps(diagnosis.as_dict()))["layers"]["the model itself"]["mean"]
    assert np.shape(stored) == ((3, 2) if dtype == "complex64" else (3,))


def test_conditional_parameters_and_stacked_layers_are_examined(rng):
    x = rng.normal(2, 3, (64, 4)).astype(np.float32)
    layer = bnjax.linen.ConditionalBatchNorm(num_classes=3, use_running_average=False, momentum=0.0)
    label = jnp.arange(64) % 3
    variables = layer.init(jax.random.key(0), x, label=label)
    _, left = layer.apply(variables, x, label=label, mutable=COLLECTED)
    variables["params"]["scale"] = variables["params"]["scale"].at[1, :2].set(0)
    diagnosis = diagnose(variables["params"], left["batch_stats"], left["batch_moments"])
    assert summary(diagnosis) == [("note", "the model itself", "zero scale", (2, 12))]

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return bnjax.linen.BatchNorm(use_running_average=False, momentum=0.0)(nn.Dense(4)(x)), None

    axes = {"params": 0, "batch_stats": 0, "batch_moments": 0}
    stack = nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=3)()
    variables = stack.init(jax.random.key(0), x, None)
    _, left = stack.apply(variables, x, None, mutable=COLLECTED)
    assert diagnose(variables["params"], left["batch_stats"], left["batch_moments"]).findings == []
    shifted = jax.tree.map(np.array, left["batch_stats"])
    shifted["BatchNorm_0"]["mean"][1] += 50
    diagnosis = diagnose(variables["params"], shifted, left["batch_moments"])
    assert summary(diagnosis) == [("error", "BatchNorm_0", "mean shifted", (4, 12))]
    assert {layer for layer, _ in diagnosis.findings[0].indices} == {1}


def test_layers_and_features_without_moments_are_examined_by_themselves(rng):
    x = rng.normal(2, 3, (64, 4)).astype(np.float32)
    layer = bnjax.linen.IndexedBatchNorm(num_indices=2, use_running_average=False, momentum=0.0)
    model = nn.Sequential([bnjax.linen.BatchNorm(use_running_average=True), nn.BatchNorm(use_running_average=False)])
    variables = model.init(jax.random.key(0), x)
    _, left = model.apply(variables, x, mutable=COLLECTED)
    diagnosis = diagnose(variables["params"], left["batch_stats"], left["batch_moments"])
    assert [report.shift for report in diagnosis.layers.values()] == [None, None]  # frozen; Flax's collects nothing
    assert summary(diagnosis) == [("error", "layers_0", "never updated", (4, 4))]

    variables = layer.init(jax.random.key(0), x, index=0)
    stats = variables["batch_stats"]
    for index in 0, 1:
        _, left = layer.apply({**variables, "batch_stats": stats}, x, index=index, mutable=COLLECTED)
        stats = left["batch_stats"]
    diagnosis = diagnose(variables["params"], stats, left["batch_moments"])
    assert diagnosis.findings == []
    report = diagnosis.layers["the model itself"]
    for values in report.shift, report.var_ratio, report.batch_size:
        np.testing.assert_array_equal(np.isnan(values), [[True] * 4, [False] * 4])
    assert json.loads(json.dumps(diagnosis.as_dict()))["layers"]["the model itself"]["shift"][0] == [None] * 4
    empty = diagnose(*bnjax.bn_init(0), bnjax.batch_moments(jnp.zeros((3, 0))), momentum=0.9)
    assert empty.findings == []


@pytest.fixture
def broken(rng):
    """Three layers: a healthy one, one far from its batch and with a long name, and one that holds NaN."""
    names = ["block_2", "block_10/" + "a_block_with_a_very_long_name_7/" * 4 + "BatchNorm_0", "block_11"]
    x = rng.normal(2, 3, (100, 6)).astype(np.float32)
    params, state = bnjax.bn_init(6)
    _, state = bnjax.bn_apply(params, state, x, True, momentum=0.0)
    states = {
        names[0]: state,
        names[1]: state._replace(mean=state.mean + jnp.where(jnp.arange(6) < 2, 9.0, 0.0)),
        names[2]: state._replace(var=state.var.at[4].set(jnp.nan)),
    }
    return names, [dict.fromkeys(names, params), states, dict.fromkeys(names, bnjax.batch_moments(x))], x


def test_the_table_has_a_line_for_each_finding_and_one_with_its_advice(broken):
    names, trees, x = broken
    diagnosis = diagnose(*trees)
    lines = str(diagnosis).splitlines()
    assert lines[0] == "findings: 2; layers: 3, compared with a batch: 3 (of effectively 100); features: 18"
    assert re.fullmatch(r"severity  layer +problem +features  value +damage", lines[1])
    assert re.fullmatch(r"error     block_11 +non-finite statistics  1 of 6", lines[2])
    assert lines[3] == "    feature 4"
    value = 9 / np.sqrt(x.astype(np.float64).var(0)[:2].min() + EPSILON)
    pattern = rf"warning   (\S+_10/\S+…\S*_7/\S+_0) +mean shifted +2 of 6 +{value:.3g} std +{value:.3g} std"
    match = re.fullmatch(pattern, lines[5])
    assert match is not None
    assert len(match[1]) <= 48
    worst, other = np.argsort(x.astype(np.float64).var(0)[:2])
    assert lines[6] == f"    features {worst}, {other}"
    assert [lines[4], lines[7]] == [f"    {finding.advice}" for finding in diagnosis.findings]
    assert len(lines) == 8
    assert max(map(len, lines)) <= 120
    starts = {line.index(word) for line, word in zip(lines[1::], ("problem", "non-finite s"), strict=False)}
    assert len(starts) == 1  # columns line up
    assert bool(diagnosis)
    assert diagnosis.findings[1].layer == names[1]


def test_every_line_of_advice_fits():
    from bnjax.diagnosis.findings import ADVICE

    assert max(len(advice) for advice in ADVICE.values()) <= 116


def test_as_dict_is_json(broken):
    names, trees, _ = broken
    diagnosis = diagnose(*trees)
    stored = json.loads(json.dumps(diagnosis.as_dict(), allow_nan=False))
    assert stored["epsilon"] == EPSILON
    assert [f["problem"] for f in stored["findings"]] == ["non-finite statistics", "mean shifted"]
    assert stored["findings"][1]["features"] == [2, 6]
    assert stored["findings"][1]["value"] == diagnosis.findings[1].value
    assert (stored["findings"][0]["damage"], stored["findings"][0]["indices"]) == (None, [4])
    layer = stored["layers"]["block_11"]
    assert layer["var"][4] is None
    assert layer["nonfinite"] == [False] * 4 + [True, False]
    assert layer["count"] == [1, 1]
    np.testing.assert_allclose(stored["layers"][names[1]]["shift"], diagnosis.layers[names[1]].shift)


@pytest.mark.parametrize("compared", [True, False])
def test_the_plot_shows_each_layer_in_both_panels(compared, broken, tmp_path):
    names, trees, _ = broken
    diagnosis = diagnose(*trees[: 3 if compared else 2])
    path = tmp_path / "diagnosis.png"
    figure = diagnosis.plot(path)
    assert path.read_bytes()[:4] == b"\x89PNG"
    left, right = figure.axes
    labels = [label.get_text() for label in left.get_yticklabels()]
    assert labels[::2] == ["block_2", "block_11"]
    assert len(labels[1]) <= 40
    assert labels[1].endswith("_0")
    assert right.get_xscale() == "log"
    assert ("standard deviations" in left.get_xlabel(), "variance" in right.get_xlabel()) == (True, True)
    legend = {text.get_text() for text in figure.legends[0].get_texts()}
    if compared:
        assert legend == {"error", "warning", "no finding", "within limits"}
        assert [round(bar.get_x() + bar.get_width(), 6) for bar in left.patches[:3]] == [0.5 + 3 / 10] * 3
        medians = [np.nanmedian(diagnosis.layers[name].var_ratio) for name in names]
    else:
        assert legend == {"error", "no finding", "epsilon"}
        medians = [np.nanmedian(diagnosis.layers[name].var) for name in names]
    drawn = [line.get_xdata()[0] for line in right.lines if line.get_marker() not in ("", "None")]
    np.testing.assert_allclose(drawn, medians)
    assert [text.get_text() for text in right.texts] == ["", "", "1 not finite"]
    found = "2 findings, the worst: " if compared else "1 finding, the worst: "
    title = figure.get_suptitle().splitlines()[0]
    assert title == found + "non-finite statistics in block_11, 1 of 6 features"


def test_plot_without_matplotlib_says_what_to_install(broken, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        diagnose(*broken[1]).plot()

"""A feature is judged by what its running statistics do to the output in evaluation."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import bnjax
import bnjax.linen
import bnjax.nnx
from bnjax.diagnosis.measure import diagnose
from tests.support.diagnosis import COLLECTED, EPSILON, summary

LAYER = "the model itself"


def moments(x):
    """The moments of a batch of shape (examples, features), in float64."""
    return bnjax.Moments(np.full(x.shape[1:], float(len(x))), x.mean(0), x.var(0))


def layer(x, scale=None):
    """Parameters, and the state after only one batch, with a count."""
    params = bnjax.BNParams(np.ones(x.shape[1]) if scale is None else np.asarray(scale), np.zeros(x.shape[1]))
    return params, bnjax.BNState(x.mean(0), x.var(0), np.ones(x.shape[1], np.int32))


def output(params, mean, var, x):
    return params.scale * (x - mean) / np.sqrt(var + EPSILON) + params.bias


@pytest.fixture
def x(rng):
    return rng.normal(0, 1, (1000, 64))


@pytest.mark.parametrize("scale", [1.0, -0.3, "random"])
def test_damage_is_the_change_of_the_output(scale, x, rng):
    params, state = layer(x, rng.normal(0, 1, 64) if scale == "random" else np.full(64, scale))
    state = state._replace(mean=state.mean + rng.normal(0, 2, 64), var=np.exp(rng.normal(0, 4, 64)))
    report = diagnose(params, state, moments(x)).layers[LAYER]
    change = output(params, state.mean, state.var, x) - output(params, x.mean(0), x.var(0), x)
    usual = np.maximum(abs(params.scale), np.sqrt(np.mean(params.scale**2)))
    np.testing.assert_allclose(report.damage, np.sqrt(np.mean(change**2, 0)) / usual, rtol=1e-9)


@pytest.mark.parametrize("var", [0.0, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1])
@pytest.mark.parametrize("offset", [0.0, 5.0])
def test_one_feature_that_evaluation_amplifies_is_found_and_named(var, offset, x):
    x = x + offset
    params, state = layer(x)
    state.var[7] = var
    (finding,) = diagnose(params, state, moments(x)).findings
    gain = output(params, state.mean, state.var, x)[:, 7].std() / output(params, x.mean(0), x.var(0), x)[:, 7].std()
    severity = "error" if gain - 1 > 5 else "warning"
    assert finding[:4] == (severity, LAYER, "variance differs", (1, 64))
    assert finding.indices == (7,)
    np.testing.assert_allclose(finding.damage, gain - 1, rtol=1e-4)
    assert "amplifies" in finding.advice
    assert "feature 7\n" in str(diagnose(params, state, moments(x)))
    assert not diagnose(params, state, moments(x)).layers[LAYER].dead.any()


def test_one_feature_that_evaluation_shrinks_changes_less_than_its_own_deviation(x):
    params, state = layer(x)
    state.var[7] = 1e6
    diagnosis = diagnose(params, state, moments(x))
    assert diagnosis.findings == []
    assert 0.99 < diagnosis.layers[LAYER].damage[7] < 1


def test_findings_are_sorted_by_damage_and_name_the_worst_features_first(x):
    params, state = layer(x)
    state.mean[[3, 40, 9, 10, 11, 12]] += [1000, 3, 30, 4, 5, 6]
    state.var[5] = 1e-6
    names = "large", "small", "none"
    states = {"large": state, "small": state._replace(mean=x.mean(0) + 50 * (np.arange(64) == 20)), "none": layer(x)[1]}
    states["small"] = states["small"]._replace(var=x.var(0))
    diagnosis = diagnose(dict.fromkeys(names, params), states, dict.fromkeys(names, moments(x)))
    assert [(f.layer, f.problem, f.severity) for f in diagnosis.findings] == [
        ("large", "mean shifted", "error"),
        ("large", "variance differs", "error"),
        ("small", "mean shifted", "error"),
    ]
    harm = [f.damage for f in diagnosis.findings]
    assert harm == sorted(harm, reverse=True)
    assert [f.indices for f in diagnosis.findings] == [(3, 9, 12, 11, 10, 40), (5,), (20,)]
    assert "    features 3, 9, 12, 11 and 2 more\n" in str(diagnosis)
    assert json.loads(json.dumps(diagnosis.as_dict()))["findings"][0]["indices"] == [3, 9, 12, 11, 10, 40]


def test_a_feature_of_small_scale_does_proportionally_less(x):
    for own, found in (1.0, ["error"]), (0.1, ["warning"]), (0.01, []), (0.0, []):
        params, state = layer(x, np.where(np.arange(64) == 3, own, 1.0))
        state.mean[3] += 20
        state.var[3] = 0.9
        problems = [f for f in diagnose(params, state, moments(x)).findings if f.problem != "zero scale"]
        assert [f.severity for f in problems] == found
    params, state = layer(x, np.zeros(64))
    far = diagnose(params, state._replace(mean=state.mean + 20), moments(x))
    assert summary(far) == [("note", LAYER, "zero scale", (64, 64))]


@pytest.mark.parametrize("size", [32, 256])
def test_rarely_active_features_are_no_finding_beside_one_that_is_wrong(size, rng):
    thresholds = np.concatenate([np.linspace(1, 2.6, 8), np.zeros(24)])  # from 16% active examples to 0.5%, and half
    mean, var = np.zeros(33), np.ones(33)

    def batch():
        rare = np.maximum(rng.standard_normal((size, 32)) - thresholds, 0)
        return np.concatenate([rare, rng.normal(1, 1, (size, 1))], 1)

    most = 0
    for step in range(400):
        x = batch()
        if step > 300:
            params, _ = layer(x)
            state = bnjax.BNState(mean, var, np.ones(33, np.int32))
            diagnosis = diagnose(params, state, moments(x))
            most = max(most, diagnosis.layers[LAYER].damage.max())
            assert diagnosis.findings == []
            state = state._replace(var=np.where(np.arange(33) == 32, 0.01, var))
            (finding,) = diagnose(params, state, moments(x)).findings
            assert (finding.problem, finding.indices) == ("variance differs", (32,))
        mean, var = 0.9 * mean + 0.1 * x.mean(0), 0.9 * var + 0.1 * x.var(0)
    assert most > 2  # as much as a variance of 0.1 instead of 1 does


def test_a_layer_of_a_scan_is_judged_by_itself_and_named(x):
    x = x[:, :8]
    own, state, batch = (jax.tree.map(lambda v: np.stack([v] * 24), tree) for tree in (*layer(x), moments(x)))
    state.var[5] *= 400  # 8 of 192 features: a share of the layer, not of the stack
    state.var[9, 1] = 1e-4
    state.mean[11] += 1.5
    diagnosis = diagnose({"norm": own}, {"norm": state}, {"norm": batch})
    shifted, differs = sorted(diagnosis.findings, key=lambda f: f.problem)
    assert (shifted.severity, shifted.features, {i for i, _ in shifted.indices}) == ("error", (8, 192), {11})
    assert (differs.severity, differs.features, differs.indices[0]) == ("error", (9, 192), (9, 1))
    assert {i for i, _ in differs.indices[1:]} == {5}
    report = diagnosis.layers["norm"]
    assert shifted.value == report.shift[shifted.indices[0]]
    assert differs.value == report.var_ratio[9, 1]


@pytest.mark.parametrize(("dtype", "digits"), [("bfloat16", 8), ("float16", 11)])
def test_statistics_in_half_precision_stop_within_the_value_of_the_finding(dtype, digits, rng):
    x = rng.normal(3, 2, (64, 5))
    dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16
    mean, var = np.zeros(5, dtype), np.ones(5, dtype)
    for _ in range(2000):
        mean = (mean.astype(np.float32) + np.float32(0.01) * (x.mean(0) - mean.astype(np.float32))).astype(dtype)
        var = (var.astype(np.float32) + np.float32(0.01) * (x.var(0) - var.astype(np.float32))).astype(dtype)
    state = bnjax.BNState(mean, var, np.full(5, 2000, np.int32))
    finding = diagnose({}, state, momentum=0.99).findings[0]
    assert finding[:4] == ("warning", LAYER, "half precision", (5, 5))
    far = abs(mean.astype(np.float64) - x.mean(0)) / np.sqrt(var.astype(np.float64))
    assert far.max() < 1.05 * finding.value  # the distance is of the last value that moved, one step before
    assert far.max() > 0.5 * finding.value
    spacing = 2.0 ** (np.floor(np.log2(mean.astype(np.float64))) + 1 - digits)
    stop = spacing / 0.02 / np.sqrt(var.astype(np.float64) + EPSILON)
    np.testing.assert_allclose(finding.value, stop.max(), rtol=1e-6)
    assert "float32" in finding.advice
    broken = diagnose({}, state._replace(mean=np.where(np.arange(5) == 2, np.nan, mean).astype(dtype)), momentum=0.99)
    assert [f.problem for f in broken.findings] == ["non-finite statistics", "half precision"]
    assert broken.findings[1].value > 0
    scale = bnjax.BNParams(np.ones(5, dtype), np.zeros(5, dtype))
    wide = state._replace(mean=mean.astype(np.float32), var=var.astype(np.float32))
    assert diagnose(scale, wide, momentum=0.99).findings == []


def test_a_model_in_bfloat16_is_right_again_once_its_statistics_are_in_float32(rng):
    x = jnp.asarray(rng.normal(3, 2, (64, 4)), jnp.bfloat16)
    model = bnjax.nnx.BatchNorm(4, momentum=0.99, rngs=nnx.Rngs(0))
    nnx.update(model, jax.tree.map(lambda a: a.astype(jnp.bfloat16), nnx.state(model)))
    params, state = nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat)
    assert summary(diagnose(params, state))[-1] == ("warning", LAYER, "half precision", (4, 4))
    apply, variables = bnjax.nnx.functional(model)
    stats = jax.tree.map(lambda a: a.astype(jnp.float32), variables["batch_stats"])
    variables = bnjax.recalibrate(apply, {**variables, "batch_stats": stats}, [x])
    _, left = apply(variables, x, mutable=COLLECTED)
    assert diagnose(variables["params"], variables["batch_stats"], left["batch_moments"]).findings == []


def test_a_layer_that_ran_in_evaluation_mode_is_named(rng):
    x = rng.normal(2, 3, (64, 4)).astype(np.float32)
    _, known = layer(x)
    for frozen in (True, False):
        norms = [bnjax.linen.BatchNorm(use_running_average=f, momentum=0.0) for f in (False, frozen)]
        model = nn.Sequential(norms)
        variables = model.init(jax.random.key(0), x)
        stats = {"mean": known.mean * 0, "var": known.var}
        variables["batch_stats"]["layers_1"] = {**variables["batch_stats"]["layers_1"], **stats}
        _, left = model.apply(variables, x, mutable=COLLECTED)
        diagnosis = diagnose(variables["params"], left["batch_stats"], left["batch_moments"])
        named = [("note", "layers_1", "evaluation mode", (4, 4))] if frozen else []
        assert summary(diagnosis) == named
        assert ("\nwithout moments, not compared: layers_1" in str(diagnosis)) == frozen


def test_diagnoses_are_compared(x):
    params, state = layer(x)
    broken = state._replace(var=np.where(np.arange(64) == 3, np.nan, state.var))
    first, again, other = (diagnose(params, s, moments(x)) for s in (broken, broken, state))
    assert first == again
    assert first.layers[LAYER] == again.layers[LAYER]
    assert first != other
    assert first.layers[LAYER] != other.layers[LAYER]
    assert first != diagnose(params, broken)  # without a batch
    assert first != diagnose(params, broken, moments(x), epsilon=1e-3)
    assert first != str(first)
    with pytest.raises(TypeError, match="unhashable"):
        hash(first)
    shifted = diagnose(params, broken._replace(mean=state.mean + 4), moments(x))
    assert [f.problem for f in shifted.beyond(first)] == ["mean shifted"]
    assert [f.problem for f in first.beyond(other)] == ["non-finite statistics"]
    assert first.beyond(shifted) == []

"""What `diagnose` rejects, and what the message says to pass."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import bnjax
import bnjax.nnx
from bnjax import training
from bnjax.diagnosis.measure import diagnose
from bnjax.interop.match import Report

PARAMS, STATE = bnjax.bn_init(3)
MOMENTS = bnjax.batch_moments(np.ones((5, 3), np.float32))
VARIABLES = {"params": {"bn": PARAMS}, "batch_stats": {"bn": STATE}}
MODEL = nnx.Sequential(bnjax.nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
TRAINING = training.TrainState.create(apply_fn=None, tx=optax.sgd(0.1), **VARIABLES)
BAD = {
    "no layer": (lambda: diagnose({}, {"a": {"mean": jnp.ones(3)}}), ValueError, "both a mean and a var"),
    "shape": (lambda: diagnose(PARAMS, STATE, bnjax.batch_moments(jnp.ones((5, 4)))), ValueError, r"\(4,\).*\(3,\)"),
    "other names": (
        lambda: diagnose({"a": PARAMS}, {"a": STATE}, {"b": bnjax.batch_moments(jnp.ones((5, 3)))}),
        ValueError,
        r"moments of \['b'\], but statistics of \['a'\]",
    ),
    "some moments of other names": (
        lambda: diagnose({}, {"a": STATE, "b": STATE}, {"a": MOMENTS, "c": MOMENTS}),
        ValueError,
        r"moments of \['c'\], but statistics of \['b'\]",
    ),
    "nonsense": (lambda: diagnose(PARAMS, STATE, {"x": 1}), ValueError, r"weight, mean and var; it holds \['x'\]"),
    "statistics as moments": (
        lambda: diagnose(PARAMS, STATE, STATE),
        ValueError,
        r"it holds \['count', 'mean', 'var'\]",
    ),
    "the input as moments": (lambda: diagnose(PARAMS, STATE, np.ones((5, 3))), ValueError, "it holds .'an array'"),
    "moments as statistics": (lambda: diagnose(PARAMS, MOMENTS), ValueError, r"\(batch_stats=...\).*these are moments"),
    "moments as params": (lambda: diagnose(MOMENTS, STATE), ValueError, r"\(params=...\).*these are moments"),
    "swapped": (lambda: diagnose(STATE, PARAMS), ValueError, "Pass them in this order"),
    "variables as params": (
        lambda: diagnose(VARIABLES, STATE),
        ValueError,
        r"\(params=...\): got dict with params, batch_stats. Pass variables\['params'\]",
    ),
    "variables as statistics": (lambda: diagnose(PARAMS, VARIABLES), ValueError, r"Pass variables\['batch_stats'\]"),
    "updates as moments": (
        lambda: diagnose(PARAMS, STATE, {"batch_moments": MOMENTS}),
        ValueError,
        r"Pass only the collection, updates\['batch_moments'\]",
    ),
    "no statistics": (lambda: diagnose(PARAMS, None), ValueError, "both a mean and a var"),
    "train state": (lambda: diagnose(TRAINING, STATE), TypeError, "got TrainState with.*state.params"),
    "train state as statistics": (lambda: diagnose({}, TRAINING), TypeError, "got TrainState.*state.batch_stats"),
    "nnx model": (lambda: diagnose(MODEL, MODEL), TypeError, "got the model, Sequential.*bnjax.nnx.functional"),
    "linen model": (lambda: diagnose(nn.Dense(3), STATE), TypeError, "got the model, Dense"),
    "report": (lambda: diagnose(PARAMS, Report(())), TypeError, r"\(batch_stats=...\): got the report of a conversion"),
    "pair of variables and report": (lambda: diagnose(({}, Report(())), STATE), TypeError, "of a conversion and its"),
    "diagnosis": (lambda: diagnose(PARAMS, STATE, diagnose(PARAMS, STATE)), TypeError, "it holds Diagnosis"),
    "shapes alone": (lambda: diagnose(PARAMS, jax.eval_shape(lambda: STATE)), TypeError, "holds ShapeDtypeStruct"),
    "params of a wider model": (
        lambda: diagnose(bnjax.bn_init(4)[0], STATE),
        ValueError,
        r"scale of the model itself has shape \(4,\), its running mean \(3,\)",
    ),
    "params of another model": (
        lambda: diagnose({"a": PARAMS}, {"b": STATE}),
        ValueError,
        r"scales of \['a'\], but statistics of \['b'\]",
    ),
    "params of another model with kernels": (
        lambda: diagnose({"a": {"bn": PARAMS, "dense": {"kernel": np.ones((3, 3))}}}, {"b": {"bn": STATE}}),
        ValueError,
        r"scales of \['a/bn'\], but statistics of \['b/bn'\]",
    ),
    "mean and var": (lambda: diagnose({}, STATE._replace(var=np.ones(4))), ValueError, r"mean has shape \(3,\), var"),
    "schedule": (lambda: diagnose(PARAMS, STATE, momentum=bnjax.debiased(0.9)), TypeError, "expected a number"),
    "momentum": (lambda: diagnose(PARAMS, STATE, momentum=1.5), ValueError, r"expected a number in \[0, 1\]"),
    "epsilon": (lambda: diagnose(PARAMS, STATE, epsilon=0), ValueError, r"diagnose\(epsilon=0\)"),
    "traced": (lambda: jax.jit(lambda state: diagnose(PARAMS, state).epsilon)(STATE), TypeError, "outside jit"),
}


@pytest.mark.parametrize("name", BAD)
def test_diagnose_rejects(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


def test_models_that_are_right_are_taken_as_they_are():
    dense = {"kernel": np.ones((3, 3)), "bias": np.ones(3)}
    state = STATE._replace(mean=STATE.mean + 1, count=STATE.count + 1)
    norm = {"scale": np.ones(3), "bias": np.ones(3)}
    for params, stats in (
        (None, state),
        ({"Dense_0": dense, "LayerNorm_0": norm}, {"BatchNorm_0": state}),  # BatchNorm without scale and bias
        ({"a": {"Dense_0": dense, "norm": norm}, "b": {"Dense_0": dense}}, {"b": {"norm": state}}),
        (nnx.state(MODEL), nnx.state(MODEL)),
        (VARIABLES["params"], {"bn": {"mean": 0.5, "var": 2.0}}),
        ([PARAMS, PARAMS], [state, state]),
    ):
        diagnosis = diagnose(params, stats)
        assert {f.problem for f in diagnosis.findings} <= {"never updated"}
    partly = diagnose({}, {"a": state, "b": state}, {"a": MOMENTS._replace(var=np.ones(3))})
    assert "\nwithout moments, not compared: b" in str(partly)
    assert diagnose({}, {"a": state}, {"a": MOMENTS, "b": MOMENTS}).layers.keys() == {"a"}


def test_parameters_of_classes_and_of_all_indices_fit_the_statistics():
    x = np.random.default_rng(0).normal(0, 1, (100, 3))
    state = bnjax.BNState(x.mean(0) + 20 * (np.arange(3) == 1), x.var(0), np.ones(3, np.int32))
    batch = bnjax.Moments(np.full(3, 100.0), x.mean(0), x.var(0))
    scale = np.array([[1.0, 0.3, 1.0], [1.0, 0.4, 1.0]])  # of two classes: the root of the mean square is 0.354
    report = diagnose({"scale": scale}, state, batch).layers["the model itself"]
    plain = diagnose({"scale": np.ones(3)}, state, batch).layers["the model itself"]
    usual = np.sqrt((2 + 0.125) / 3)
    np.testing.assert_allclose(report.damage[1] / plain.damage[1], np.sqrt(0.125) / usual, rtol=1e-9)
    indexed = jax.tree.map(lambda v: np.stack([v] * 5), (state, batch))
    stacked = diagnose({"scale": np.array([1.0, 0.25, 1.0])}, *indexed).layers["the model itself"]
    np.testing.assert_allclose(
        stacked.damage[:, 1] / plain.damage[1], np.full(5, 0.25 / np.sqrt(2.0625 / 3)), rtol=1e-9
    )

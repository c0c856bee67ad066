"""Bad arguments: an error while tracing that says what was passed, what was expected and what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import bnjax

X = np.zeros((4, 3), np.float32)


def apply(x=X, train=True, features=3, params=None, dtype=jnp.float32, **options):
    fresh, state = bnjax.bn_init(features, dtype=dtype)
    return bnjax.bn_apply(fresh if params is None else params, state, x, train, **options)


def counted(count):
    params, state = bnjax.bn_init(3)
    return params, state._replace(count=count)


# The call, then pieces of the message: the argument, what came, what was expected, what to do.
REJECTED = {
    "features": (
        lambda: apply(features=4),
        ValueError,
        [
            r"bn_apply\(params=\.\.\.\)",
            r"params.scale has shape \(4,\)",
            r"features \(3,\) on axis 1",
            r"bn_init\(3\)",
        ],
    ),
    "features_of_state": (
        lambda: apply(features=4, params=bnjax.BNParams(None, None)),
        ValueError,
        [r"bn_apply\(x=", r"x has shape \(4, 3\)", r"state.mean has shape \(4,\)", r"bn_init\(3\)"],
    ),
    "features_of_several_axes": (
        lambda: apply(features=4, axis=(0, 1), params=bnjax.BNParams(None, None)),
        ValueError,
        [r"features \(4, 3\) on axis \(0, 1\)", r"bn_init\(\(4, 3\)\)"],
    ),
    "conditional": (
        lambda: apply(params=bnjax.BNParams(np.ones((2, 3)), None)),
        ValueError,
        [r"params.scale has shape \(2, 3\)", "x's rank with each size 1 or x's"],
    ),
    "axis": (
        lambda: apply(axis=2),
        ValueError,
        [r"bn_apply\(axis=2\)", r"shape \(4, 3\)", r"\[-2, 2\)", "Pass the axis"],
    ),
    "axis_below": (lambda: apply(axis=(-3, 1)), ValueError, [r"axis=\(-3, 1\)", r"\[-2, 2\)"]),
    "axis_repeated": (lambda: apply(axis=(1, -1)), ValueError, [r"axis=\(1, -1\)", "repeated", "once"]),
    "axis_of_a_scalar": (
        lambda: bnjax.batch_moments(np.float32(1)),
        ValueError,
        [r"batch_moments\(axis=-1\)", r"\(\)"],
    ),
    "axis_not_an_integer": (lambda: apply(axis="channel"), TypeError, ["axis='channel'", "expected an integer"]),
    "axis_none": (lambda: apply(axis=None), TypeError, ["axis=None", "expected an integer"]),
    "axis_empty": (lambda: apply(axis=()), TypeError, [r"axis=\(\)", "expected an integer"]),
    "momentum_above": (lambda: apply(momentum=1.5), ValueError, [r"momentum=1\.5", r"\[0, 1\]", "old value", "1 - p"]),
    "momentum_below": (lambda: apply(momentum=np.float32(-0.1)), ValueError, ["momentum=", r"\[0, 1\]"]),
    "momentum_nan": (lambda: apply(momentum=float("nan")), ValueError, ["momentum=nan"]),
    "momentum_none": (lambda: apply(momentum=None), TypeError, ["momentum=None", "cumulative_average"]),
    "momentum_in_evaluation": (lambda: apply(momentum=2, train=False), ValueError, ["momentum=2"]),
    "debiased": (lambda: bnjax.debiased(1.01), ValueError, [r"debiased\(momentum=1\.01\)", r"\[0, 1\]"]),
    "debiased_traced": (lambda: jax.jit(bnjax.debiased)(0.9), TypeError, [r"debiased\(momentum=", "outside", "count"]),
    "count_floating": (
        lambda: bnjax.bn_apply(*counted(np.zeros(3, np.float32)), X, True),
        TypeError,
        ["state.count has the dtype float32", r"astype\(jnp.int32\)"],
    ),
    "count_none": (lambda: bnjax.bn_apply(*counted(None), X, True), TypeError, ["state.count", "NoneType", "zeros"]),
    "merged_integers": (
        lambda: bnjax.merge_moments(bnjax.Moments(np.ones(3, int), X[0], X[0])),
        TypeError,
        [r"merge_moments\(", "weight of int", "jnp.float32"],
    ),
    "merged_lists": (lambda: bnjax.merge_moments(bnjax.Moments([1.0], [1.0], [1.0])), TypeError, ["weight of list"]),
    "epsilon_zero": (lambda: apply(epsilon=0), ValueError, [r"bn_apply\(epsilon=0\)", "positive", "1e-5"]),
    "epsilon_negative": (lambda: apply(epsilon=-1e-5), ValueError, ["epsilon=-1e-05", "positive"]),
    "epsilon_nan": (lambda: apply(epsilon=float("nan")), ValueError, ["epsilon=nan", "positive"]),
    "epsilon_traced": (lambda: jax.jit(lambda e: apply(epsilon=e))(1e-5), TypeError, ["epsilon", "static", "number"]),
    "epsilon_none": (lambda: apply(epsilon=None), TypeError, ["epsilon", "NoneType"]),
    "train_number": (
        lambda: apply(train=1),
        TypeError,
        [r"bn_apply\(train=", "Python bool", "1 of <class 'int'>", "static"],
    ),
    "train_numpy": (lambda: apply(train=np.bool_(True)), TypeError, ["Python bool", "numpy"]),
    "train_none": (lambda: apply(train=None), TypeError, ["Python bool", "NoneType"]),
    "train_traced": (lambda: jax.jit(lambda t: apply(train=t))(True), TypeError, ["train", "Python bool", "static"]),
    "mask_shape": (
        lambda: apply(mask=np.ones((3, 1), bool)),
        ValueError,
        [r"bn_apply\(mask=", r"x has shape \(4, 3\)", r"got \(3, 1\)", "Reshape mask"],
    ),
    "mask_rank": (lambda: apply(mask=np.ones(4, bool)), ValueError, ["x's rank", r"got \(4,\)", "Reshape mask"]),
    "mask_dtype": (
        lambda: apply(mask=np.ones((4, 1), np.complex64)),
        TypeError,
        ["booleans", "complex64", "real part"],
    ),
    "mask_of_moments": (lambda: bnjax.batch_moments(X, mask=X[0] > 0), ValueError, [r"batch_moments\(mask="]),
    "mask_list": (lambda: apply(mask=[[True]]), TypeError, [r"bn_apply\(mask=", "array", "list"]),
    "x_integer": (lambda: apply(x=X.astype(int)), TypeError, [r"bn_apply\(x=", "int", r"x\.astype\(jnp\.float32\)"]),
    "x_bool": (lambda: bnjax.batch_moments(X > 0), TypeError, [r"batch_moments\(x=", "bool"]),
    "x_list": (lambda: apply(x=[1.0, 2.0]), TypeError, [r"bn_apply\(x=", "list", "asarray"]),
    "x_complex": (lambda: apply(x=X + 1j), TypeError, ["x is complex", "state.mean is float32", "complex64"]),
    "state_complex": (lambda: apply(dtype=jnp.complex64), TypeError, ["x is float32", "complex64", "y has x's dtype"]),
    "axis_name": (
        lambda: apply(axis_name="devices"),
        NameError,
        [r"bn_apply\(axis_name='devices'\)", "no mapped axis", "vmap", "leave axis_name"],
    ),
    "axis_name_of_two": (
        lambda: jax.vmap(lambda x: bnjax.batch_moments(x, axis_name=("i", "j")), axis_name="i")(X[None]),
        ValueError,
        [r"batch_moments\(axis_name='j'\)", "no mapped axis"],
    ),
    "groups_without_name": (
        lambda: apply(axis_index_groups=[[0]]),
        ValueError,
        ["axis_index_groups", "axis_name is None"],
    ),
    "groups_incomplete": (
        lambda: jax.vmap(lambda x: apply(x, axis_name="i", axis_index_groups=[[0, 1], [1]]), axis_name="i")(
            np.stack([X] * 3)
        ),
        ValueError,
        [r"axis_index_groups=\(\(0, 1\), \(1,\)\)", "0 to 2", "exactly one group"],
    ),
    "axis_name_repeated": (
        lambda: jax.vmap(lambda x: apply(x, axis_name=("i", "i")), axis_name="i")(X[None]),
        ValueError,
        ["axis_name=", "repeated", "once"],
    ),
    "groups_flat": (lambda: apply(axis_name="i", axis_index_groups=[0, 1]), TypeError, [r"\[0, 1\]", "list of lists"]),
    "momentum_shape": (
        lambda: apply(momentum=jnp.ones((5, 3))),
        ValueError,
        [r"momentum", r"\(5, 3\)", r"features \(3,\)"],
    ),
    "schedule_above": (lambda: apply(momentum=lambda count: 1.5), ValueError, [r"momentum=1\.5", r"\[0, 1\]"]),
    "debiased_array": (lambda: bnjax.debiased(jnp.float32(1.5)), ValueError, [r"momentum=1\.5"]),
    "epsilon_tiny": (lambda: apply(epsilon=1e-50), ValueError, ["epsilon=1e-50", "positive in float32"]),
    "epsilon_text": (lambda: apply(epsilon="small"), TypeError, ["epsilon", "str"]),
    "unbiased_text": (lambda: apply(unbiased_var="False"), TypeError, [r"bn_apply\(unbiased_var=", "Python bool"]),
    "params_lists": (lambda: apply(params=bnjax.BNParams([1.0], None)), TypeError, [r"params\.scale", "list"]),
    "merge_list": (
        lambda: bnjax.merge_moments([1, 2]),
        TypeError,
        [r"merge_moments\(", r"\['list'\]", r"merge_moments\(\*list\)"],
    ),
    "init_complex": (lambda: bnjax.bn_init(3, scale=1j), TypeError, [r"bn_init\(scale=", "complex64"]),
    "init_features": (lambda: bnjax.bn_init(3.0), ValueError, [r"bn_init\(features=3.0\)", "integer"]),
    "init_negative": (lambda: bnjax.bn_init((3, -1)), ValueError, [r"features=\(3, -1\)", "non-negative"]),
    "init_dtype": (lambda: bnjax.bn_init(3, dtype=jnp.int32), TypeError, [r"bn_init\(dtype=int32\)", "floating"]),
    "init_scale": (lambda: bnjax.bn_init(3, scale=np.ones(4)), ValueError, [r"bn_init\(scale=", r"\(4,\)", r"\(3,\)"]),
    "params_tuple": (lambda: apply(params=(X[0], X[0])), TypeError, [r"bn_apply\(params=", "BNParams", "tuple"]),
    "state_tuple": (
        lambda: bnjax.bn_apply(bnjax.bn_init(3)[0], (X[0], X[0]), X, True),
        TypeError,
        [r"bn_apply\(state=", "BNState", "tuple"],
    ),
}


@pytest.mark.parametrize("case", REJECTED)
def test_bad_arguments_are_rejected(case):
    call, kind, pieces = REJECTED[case]
    with pytest.raises(kind) as caught:
        call()
    for piece in pieces:
        assert caught.match(piece)


@pytest.mark.parametrize("case", ["features", "axis", "mask_shape", "x_complex", "axis_name"])
def test_bad_arguments_are_rejected_while_tracing(case):
    call, kind, _ = REJECTED[case]
    with pytest.raises(kind):
        jax.eval_shape(call)


def test_groups_over_axes_of_two_kinds_are_rejected():
    mesh = jax.make_mesh((2,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))

    def f(x):
        options = {"axis_name": ("a", "i"), "axis_index_groups": [[0, 1], [2, 3]]}
        return jax.vmap(lambda x: bnjax.batch_moments(x, **options).mean, axis_name="i")(x)

    with pytest.raises(ValueError, match="axes of one kind"):
        jax.shard_map(f, mesh=mesh, in_specs=P("a"), out_specs=P("a"))(np.zeros((4, 5, 3), np.float32))


def test_options_may_come_as_any_sequence():
    x = np.random.default_rng(0).standard_normal((2, 4, 3)).astype(np.float32)
    want = bnjax.batch_moments(x, axis=(0, 2))
    for axis in ([0, 2], np.array([2, 0]), {-1, 0}):
        assert all(np.array_equal(a, b) for a, b in zip(bnjax.batch_moments(x, axis=axis), want, strict=True))

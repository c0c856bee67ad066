"""Folding one layer, against its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnjax
import bnjax.linen
import bnjax.nnx
from tests.support.folding import CLOSE, drawn, numbers


@pytest.mark.parametrize(("scale", "bias"), [(1.0, 0.0), (None, 0.0), (1.0, None), (None, None)])
def test_fold_is_the_formula(scale, bias):
    params, state = drawn(bnjax.bn_init((3, 4), scale=scale, bias=bias))
    x = numbers(7, 3, 4).astype(np.float64)
    mean, var = (np.asarray(v, np.float64) for v in state[:2])
    gamma, beta = (
        np.float64(d) if v is None else np.asarray(v, np.float64) for v, d in zip(params, (1, 0), strict=True)
    )
    want = (x - mean) / np.sqrt(var + 1e-3) * gamma + beta
    affine = bnjax.fold(params, state, epsilon=1e-3)
    np.testing.assert_allclose(x * np.asarray(affine.scale) + np.asarray(affine.bias), want, rtol=1e-5, atol=1e-5)


def test_fold_of_half_precision_parameters_is_float32():
    params, state = drawn(bnjax.bn_init(3, dtype=jnp.bfloat16))
    affine = bnjax.fold(params, state)
    assert {v.dtype for v in affine} == {jnp.dtype("float32")}
    want, _ = bnjax.bn_apply(params, state, numbers(5, 3), False)
    np.testing.assert_allclose(numbers(5, 3) * affine.scale[None] + affine.bias[None], want, **CLOSE)
    kernel, bias = bnjax.fold_into_previous(jnp.ones((2, 3), jnp.bfloat16), None, affine)
    assert (kernel.dtype, bias.dtype) == (jnp.bfloat16, jnp.bfloat16)


def test_fold_of_complex_layers():
    params, state = bnjax.bn_init(2, dtype=jnp.complex64)
    state = state._replace(mean=jnp.array([1 + 2j, 3j], jnp.complex64), var=jnp.array([4.0, 1.0]))
    affine = bnjax.fold(params, state)
    x = (numbers(5, 2) + 1j * numbers(5, 2)[::-1]).astype(np.complex64)
    want, _ = bnjax.bn_apply(params, state, x, False)
    np.testing.assert_allclose(x * affine.scale[None] + affine.bias[None], want, **CLOSE)
    with pytest.raises(TypeError, match=r"float32 kernel cannot hold a complex layer"):
        bnjax.fold_into_previous(jnp.ones((3, 2)), None, affine)


def test_fold_is_differentiable_and_compiles():
    params, state = drawn(bnjax.bn_init(3))
    gradient = jax.jit(jax.grad(lambda p: bnjax.fold(p, state).bias.sum()))(params)
    np.testing.assert_allclose(gradient.scale, -state.mean / np.sqrt(state.var + 1e-5), rtol=1e-5)
    np.testing.assert_array_equal(gradient.bias, np.ones(3))


def test_fold_rejects():
    params, state = bnjax.bn_init(3)
    with pytest.raises(ValueError, match=r"fold\(state=None\).*normalizes by its batch"):
        bnjax.fold(params, None)
    with pytest.raises(ValueError, match=r"params.scale has shape \(4, 1, 3\), state.mean \(3,\)"):
        bnjax.fold(bnjax.BNParams(jnp.ones((4, 1, 3)), None), state)
    with pytest.raises(ValueError, match=r"fold\(epsilon=0"):
        bnjax.fold(params, state, epsilon=0)
    affine = bnjax.fold(params, state)
    with pytest.raises(ValueError, match=r"fold_into_previous.*shape \(3, 2\) and so 2 features.*\(3,\)"):
        bnjax.fold_into_previous(jnp.ones((3, 2)), None, affine)
    with pytest.raises(ValueError, match=r"fold_into_next.*shape \(2, 4\) and so 4 features.*\(3,\)"):
        bnjax.fold_into_next(jnp.ones((2, 4)), None, affine, groups=2)


@pytest.mark.parametrize(
    ("function", "kernel", "bias", "options", "message"),
    [
        ("previous", np.ones((2, 3)), np.ones(2), {}, r"\(bias=...\): expected shape \(3,\), .* got \(2,\)"),
        ("previous", np.ones((2, 3)), [0.0] * 3, {}, r"\(bias=...\): expected a floating or complex array, got list"),
        ("previous", [[1.0] * 3], None, {}, r"\(kernel=...\): expected a floating or complex array, got list"),
        ("previous", np.ones((2, 3)), None, {"axis": 7}, r"\(axis=7\): kernel has shape \(2, 3\).*axis of kernel that"),
        (
            "previous",
            np.ones((2, 3)),
            None,
            {"axis": (1, -1)},
            r".*an axis of kernel, which has shape \(2, 3\), is repeated",
        ),
        ("next", np.ones((3, 2)), np.ones(3), {}, r"\(bias=...\): expected shape \(2,\), .* got \(3,\)"),
        ("next", np.ones((3, 2)), None, {"groups": 0}, r"\(groups=0\): expected a positive integer"),
        ("next", np.ones(3), None, {}, r"\(kernel=...\): expected shape \(..., inputs / groups, outputs\), got \(3,\)"),
        (
            "next",
            np.ones((1, 4)),
            None,
            {"groups": 3},
            r"\(groups=3\): .* 4 outputs, which is not a multiple of groups",
        ),
    ],
)
def test_fold_into_a_neighbour_rejects(function, kernel, bias, options, message):
    affine = bnjax.fold(*bnjax.bn_init(3))
    kernel, bias = (v.astype(np.float32) if isinstance(v, np.ndarray) else v for v in (kernel, bias))
    with pytest.raises((TypeError, ValueError), match=rf"fold_into_{function}{message}"):
        getattr(bnjax, f"fold_into_{function}")(kernel, bias, affine, **options)

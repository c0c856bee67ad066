"""Bad arguments of the variants: an error that names the call, the argument, and what to pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnjax

X = np.ones((4, 3), np.float32)
PARAMS, STATE = bnjax.bn_init(3)
INDEXED = bnjax.indexed_bn_init(3, 4)
ERRORS = {
    "ghost_size 0": (lambda: bnjax.ghost_bn_apply(PARAMS, STATE, X, True, ghost_size=0), ValueError, "ghost_size=0"),
    "ghost_size 2.0": (
        lambda: bnjax.ghost_bn_apply(PARAMS, STATE, X, True, ghost_size=2.0),
        ValueError,
        "ghost_size=2.0",
    ),
    "ghost x": (
        lambda: bnjax.ghost_bn_apply(PARAMS, STATE, X.astype(int), True, ghost_size=2),
        TypeError,
        r"ghost_bn_apply\(x=...\)",
    ),
    "r_max": (lambda: bnjax.renorm_bn_apply(PARAMS, STATE, X, True, r_max=0.9, d_max=0), ValueError, "r_max=0.9"),
    "r_max nan": (
        lambda: bnjax.renorm_bn_apply(PARAMS, STATE, X, True, r_max=np.nan, d_max=0),
        ValueError,
        "r_max=nan",
    ),
    "d_max": (lambda: bnjax.renorm_bn_apply(PARAMS, STATE, X, True, r_max=1, d_max=-1), ValueError, "d_max=-1"),
    "state": (lambda: bnjax.renorm_bn_apply(PARAMS, None, X, True, r_max=1, d_max=0), ValueError, "state=None"),
    "complex": (
        lambda: bnjax.renorm_bn_apply(*bnjax.bn_init(3, dtype=jnp.complex64), X + 0j, True, r_max=1, d_max=0),
        TypeError,
        "complex",
    ),
    "index": (lambda: bnjax.indexed_bn_apply(*INDEXED, X, True, index=4), ValueError, "index=4.*0 to 3"),
    "index -1": (lambda: bnjax.indexed_bn_apply(*INDEXED, X, True, index=-1), ValueError, "index=-1"),
    "index 1.0": (lambda: bnjax.indexed_bn_apply(*INDEXED, X, True, index=1.0), TypeError, r"got 1.0\. Pass an"),
    "a list of indices": (
        lambda: bnjax.indexed_bn_apply(*INDEXED, X, True, index=[0, 1, 2, 3]),
        TypeError,
        r"got \[0, 1, 2, 3\]\. .*jnp.asarray",
    ),
    "boolean indices": (
        lambda: bnjax.indexed_bn_apply(*INDEXED, X, True, index=np.ones(4, bool)),
        TypeError,
        r"got bool\. .*astype\(jnp.int32\)",
    ),
    "another number of indices": (
        lambda: bnjax.indexed_bn_apply(*INDEXED, X, True, index=jnp.arange(3)),
        ValueError,
        r"shape \(4,\).*x has shape \(4, 3\) and its examples along axis 0, got shape \(3,\)",
    ),
    "a column of indices": (
        lambda: bnjax.indexed_bn_apply(*INDEXED, X, True, index=jnp.zeros((4, 1), int)),
        ValueError,
        r"got shape \(4, 1\)\. Pass",
    ),
    "an index for each of no examples": (
        lambda: bnjax.indexed_bn_apply(*INDEXED, X[0], True, index=jnp.zeros(3, int)),
        ValueError,
        r"all axes of x, of shape \(3,\), are feature axes",
    ),
    "num_indices": (lambda: bnjax.indexed_bn_init(3, 0), ValueError, "num_indices=0"),
    "r_max of a schedule": (
        lambda: bnjax.renorm_bn_apply(PARAMS, STATE, X, True, r_max=lambda count: 0.5, d_max=0),
        ValueError,
        "r_max=0.5",
    ),
    "shape of r_max": (
        lambda: bnjax.renorm_bn_apply(PARAMS, STATE, X, True, r_max=jnp.ones(5), d_max=0),
        ValueError,
        r"r_max=\.\.\..*\(3,\).*\(5,\)",
    ),
    "ramp": (lambda: bnjax.linear_ramp(1.0, 3.0, 11, 10), ValueError, r"start=11, stop=10\): expected start <= stop"),
    "average": (
        lambda: bnjax.renorm_bn_apply(PARAMS, STATE, X, False, r_max=1, d_max=0, average="variance"),
        ValueError,
        r"renorm_bn_apply\(average='variance'\): expected \"std\".*or \"var\"",
    ),
    "class tables": (
        lambda: bnjax.conditional_params(bnjax.BNParams(jnp.ones((4, 1)), None), jnp.zeros(4, int), X),
        ValueError,
        r"scale of shape \(classes, 3\), got \(4, 1\)",
    ),
    "class tables of two axes": (
        lambda: bnjax.conditional_params(
            bnjax.BNParams(jnp.ones((4, 1)), None), jnp.zeros(4, int), X[None], axis=(0, 1)
        ),
        ValueError,
        r"scale of shape \(classes, 1, 4\)",
    ),
    "state of bn_init": (
        lambda: bnjax.indexed_bn_apply(PARAMS, STATE, X, True, index=0),
        ValueError,
        r"indexed_bn_apply\(state=.*expected the state of indexed_bn_init.*state.mean of shape \(3,\)",
    ),
    "state of one feature axis": (
        lambda: bnjax.indexed_bn_apply(PARAMS, INDEXED[1], X, True, index=0, axis=(0, 1)),
        ValueError,
        r"axis of indices before 2 of features, got state.mean of shape \(4, 3\)",
    ),
    "indexed axis": (
        lambda: bnjax.indexed_bn_apply(*INDEXED, X, True, index=0, axis=2),
        ValueError,
        r"indexed_bn_apply\(axis=2\): x has shape \(4, 3\)",
    ),
    "plain state": (lambda: bnjax.indexed_bn_apply(PARAMS, None, X, True, index=0), TypeError, "indexed_bn_init"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_variants_reject(name):
    call, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        call()


KEY = jax.random.key(0)
LSTM_PARAMS, LSTM_STATE = bnjax.bn_lstm_init(KEY, 3, 8, num_steps=5)
CARRY = bnjax.bn_lstm_carry(4, 8)


def lstm(params=LSTM_PARAMS, state=LSTM_STATE, carry=CARRY, x=X):
    return bnjax.bn_lstm_apply(params, state, carry, x, True)


LSTM_ERRORS = {
    "num_steps": (lambda: bnjax.bn_lstm_init(KEY, 3, 8, 0), ValueError, r"bn_lstm_init\(num_steps=0\): expected a pos"),
    "features": (lambda: bnjax.bn_lstm_init(KEY, 3, -8, 5), ValueError, r"bn_lstm_init\(features=-8\)"),
    "inputs": (lambda: bnjax.bn_lstm_init(KEY, 3.0, 8, 5), ValueError, r"bn_lstm_init\(inputs=3.0\)"),
    "dtype": (lambda: bnjax.bn_lstm_init(KEY, 3, 8, 5, dtype=int), TypeError, r"bn_lstm_init\(dtype=int"),
    "batch of a carry": (
        lambda: bnjax.bn_lstm_carry(-4, 8),
        ValueError,
        r"bn_lstm_carry\(batch=-4\): .*number of sequ",
    ),
    "features of a carry": (lambda: bnjax.bn_lstm_carry(4, 0), ValueError, r"bn_lstm_carry\(features=0\)"),
    "dtype of a carry": (lambda: bnjax.bn_lstm_carry(4, 8, dtype=int), TypeError, r"bn_lstm_carry\(dtype=int"),
    "lengths of a carry": (
        lambda: bnjax.bn_lstm_carry(4, 8, length=jnp.ones(3, int)),
        ValueError,
        r"bn_lstm_carry\(length=...\): expected an array of shape \(4,\), got \(3,\). Pass the number of timesteps",
    ),
    "list of lengths": (lambda: bnjax.bn_lstm_carry(1, 8, length=[5]), ValueError, r"array of shape \(1,\), got list"),
    "state and carry swapped": (
        lambda: lstm(state=CARRY, carry=LSTM_STATE),
        TypeError,
        r"bn_lstm_apply\(state=...\): expected bnjax.BNLSTMState, got BNLSTMCarry. Pass what bn_lstm_init returned",
    ),
    "params of bn_init": (
        lambda: lstm(params=PARAMS),
        TypeError,
        r"\(params=...\): expected bnjax.BNLSTMParams, got BNPa",
    ),
    "carry of a pair": (
        lambda: lstm(carry=(X, X)),
        TypeError,
        r"BNLSTMCarry, got tuple. Pass what bn_lstm_carry returned",
    ),
    "inputs of x": (
        lambda: lstm(x=X[:, :2]),
        ValueError,
        r"bn_lstm_apply\(x=...\): expected shape \(batch, 3\), got \(4, 2",
    ),
    "time of x": (
        lambda: lstm(x=X[None]),
        ValueError,
        r"bn_lstm_apply\(x=...\): .*got \(1, 4, 3\). Pass the inputs of one",
    ),
    "integers": (
        lambda: lstm(x=X.astype(int)),
        TypeError,
        r"bn_lstm_apply\(x=...\): expected a floating or complex dtype",
    ),
    "batch": (
        lambda: lstm(x=X[:2]),
        ValueError,
        r"bn_lstm_apply\(carry=...\): x has shape \(2, 3\) and the cell 8 features, so carry.cell of shape \(2, 8\) is "
        r"expected, got \(4, 8\). Pass bn_lstm_carry\(2, 8\)",
    ),
    "batch of one": (
        lambda: lstm(carry=bnjax.bn_lstm_carry(1, 8)),
        ValueError,
        r"carry.cell of shape \(4, 8\) is expected",
    ),
    "lengths": (
        lambda: lstm(carry=CARRY._replace(length=jnp.ones((4, 1), int))),
        ValueError,
        r"carry.length of shape \(4,\) is expected, got \(4, 1\)",
    ),
    "dtype of the cell": (
        lambda: lstm(carry=CARRY._replace(cell=jnp.ones((4, 8), int))),
        TypeError,
        r"bn_lstm_apply\(carry.cell=...\): expected a floating or complex dtype",
    ),
    "recurrent kernel": (
        lambda: lstm(params=LSTM_PARAMS._replace(recurrent_kernel=jnp.ones((8, 8)))),
        ValueError,
        r"bn_lstm_apply\(params=...\): params.recurrent_kernel has shape \(8, 8\), expected \(8, 32\)",
    ),
    "state of another layer": (
        lambda: lstm(state=LSTM_STATE._replace(cell_bn=STATE)),
        ValueError,
        r"bn_lstm_apply\(state=...\): expected the state of indexed_bn_init",
    ),
}


@pytest.mark.parametrize("name", LSTM_ERRORS)
def test_the_bn_lstm_rejects_while_tracing(name):
    call, kind, message = LSTM_ERRORS[name]
    with pytest.raises(kind, match=message):
        jax.eval_shape(call)

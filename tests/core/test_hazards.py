"""What goes wrong outside a single call: state that changes, programs that multiply, counters that end, imports."""

import dataclasses
import logging
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import bnjax
from tests.support import reference

PARAMS, STATE = bnjax.bn_init(4)
X = np.random.default_rng(0).normal(3, 2, (16, 4)).astype(np.float32)


class Rate:
    def __init__(self, rate):
        self.rate = rate

    def at(self, count):
        return self.rate + 0.0 * count.astype(float)


@dataclasses.dataclass(frozen=True)
class HoldsAnArray:
    rates: object

    def __call__(self, count):
        return self.rates + 0.0 * count.astype(float)


RENORM = partial(bnjax.renorm_bn_apply, r_max=3.0, d_max=1.0)
GHOST = partial(bnjax.ghost_bn_apply, ghost_size=8)


@pytest.mark.parametrize("apply", [bnjax.bn_apply, RENORM, GHOST], ids=["plain", "renorm", "ghost"])
def test_a_schedule_that_changed_is_used_as_it_is_now(apply):
    rate = Rate(0.9)
    for rate.rate in (0.9, 0.0, 0.5):
        _, state = apply(PARAMS, STATE, X, True, momentum=rate.at)
        mean = (1 - rate.rate) * X.astype(np.float64).mean(0)
        np.testing.assert_allclose(state.mean, mean, rtol=1e-5)


def test_a_limit_that_changed_is_used_as_it_is_now():
    limit = Rate(1.0)
    outputs = []
    for limit.rate in (1.0, 2.0):
        y, _ = bnjax.renorm_bn_apply(PARAMS, STATE, X, True, r_max=limit.at, d_max=0.0)
        outputs.append(np.asarray(y).std(0))
    np.testing.assert_allclose(outputs[0], 1, rtol=1e-3)  # batch normalization
    np.testing.assert_allclose(outputs[1], np.minimum(X.std(0), 2), rtol=1e-3)  # x / running std, as far as 2 allows


def test_a_schedule_may_hold_an_array_and_be_called_twice():
    schedule, state = HoldsAnArray(jnp.array([0.0, 0.5, 0.9, 1.0])), STATE
    for _ in range(2):
        _, state = bnjax.bn_apply(PARAMS, state, X, True, momentum=schedule)
    kept = np.array([0.0, 0.5, 0.9, 1.0]) ** 2
    np.testing.assert_allclose(state.mean, (1 - kept) * X.astype(np.float64).mean(0), rtol=1e-5, atol=1e-6)


def compilations(calls):
    """The number of programs of ours that the calls compile."""
    names = []

    class Names(logging.Handler):
        def emit(self, record):
            names.append(record.getMessage())

    loggers = [logging.getLogger(name) for name in ("jax._src.dispatch", "jax._src.interpreters.pxla")]
    with jax.log_compiles(True):
        handler = Names()
        for logger in loggers:
            logger.addHandler(handler)
            logger.propagate = False
        for call in calls:
            call()
        for logger in loggers:
            logger.removeHandler(handler)
            logger.propagate = True
    ours = ("batch_norm", "_batch_moments")
    return sum("Finished XLA compilation" in name and any(f"jit({own})" in name for own in ours) for name in names)


INDEXED = bnjax.indexed_bn_init(4, 2)
TAKE_A_MASK = {
    "plain": lambda mask: bnjax.bn_apply(PARAMS, STATE, X, True, mask=mask),
    "renorm": lambda mask: RENORM(PARAMS, STATE, X, True, mask=mask),
    "ghost": lambda mask: GHOST(PARAMS, STATE, X, True, mask=mask),
    "adaptive": lambda mask: bnjax.adaptive_bn_apply(PARAMS, STATE, X, source_weight=3, mask=mask),
    "indexed": lambda mask: bnjax.indexed_bn_apply(*INDEXED, X, True, index=0, mask=mask),
    "index per example": lambda mask: bnjax.indexed_bn_apply(*INDEXED, X, True, index=np.zeros(16, int), mask=mask),
    "moments": lambda mask: bnjax.batch_moments(X, mask=mask),
}


@pytest.mark.parametrize("name", TAKE_A_MASK)
def test_a_weight_known_to_be_negative_is_an_error_wherever_a_mask_is_taken(name):
    for mask in (np.full((16, 1), -1), -jnp.ones((16, 1)), np.full((16, 1), np.nan)):
        with pytest.raises(ValueError, match=r"\(mask=...\): expected booleans or weights of 0 or more, got (-1|nan)"):
            TAKE_A_MASK[name](mask)


@pytest.mark.parametrize("name", ["plain", "renorm", "ghost", "index per example", "moments"])
def test_every_spelling_of_an_axis_shares_one_program(name):
    x = np.ones((8, 3, 4), np.float32)
    one = {
        "plain": lambda axis: bnjax.bn_apply(PARAMS, STATE, x, True, axis=axis),
        "renorm": lambda axis: RENORM(PARAMS, STATE, x, True, axis=axis),
        "ghost": lambda axis: bnjax.ghost_bn_apply(PARAMS, STATE, x, True, axis=axis, ghost_size=4),
        "index per example": lambda axis: bnjax.indexed_bn_apply(*INDEXED, x, True, index=np.zeros(8, int), axis=axis),
        "moments": lambda axis: bnjax.batch_moments(x, axis=axis),
    }[name]
    spellings = -1, 2, (2,), [-1], (-1,), np.int64(2)
    assert compilations([partial(one, axis) for axis in spellings]) == 1


def test_schedules_share_the_program_of_their_calls():
    state = STATE
    calls = [
        lambda m=m: bnjax.bn_apply(PARAMS, state, X[:7], True, momentum=m) for m in map(bnjax.debiased, (0.9, 0.99))
    ]
    assert compilations(calls) == 1


def test_the_carry_of_a_bn_lstm_can_be_donated():
    carry = bnjax.bn_lstm_carry(4, 8)
    moved = jax.jit(lambda carry: jax.tree.map(lambda v: v + 1, carry), donate_argnums=0)(carry)
    assert moved.cell.sum() == moved.output.sum() == 32


@pytest.mark.parametrize("count", [2**24 - 1, 2**24, 2**24 + 1, 2**25, 2**31 - 1])
def test_cumulative_average_stays_below_one(count):
    momentum = bnjax.cumulative_average(jnp.int32(count))
    assert momentum < 1
    np.testing.assert_allclose(1 - np.float64(momentum), 1 / (count + 1), atol=2**-24)


def test_a_full_counter_stays_full():
    full = STATE._replace(count=jnp.full(4, 2**31 - 1, jnp.int32))
    _, state = bnjax.bn_apply(PARAMS, full, X, True, momentum=bnjax.cumulative_average)
    assert state.count.tolist() == [2**31 - 1] * 4


@pytest.mark.parametrize(
    ("momentum", "text"),
    [
        (bnjax.debiased, r"bn_apply\(momentum=debiased\).*momentum=bnjax.debiased\(0.99\)"),
        (bnjax.linear_ramp, r"bn_apply\(momentum=linear_ramp\).*bnjax.linear_ramp\("),
        (lambda count: lambda count: 0.9, "it returned another function"),
        (None, "PyTorch's momentum=None, pass bnjax.cumulative_average"),
        ("0.9", "expected a number or a function"),
    ],
    ids=["debiased", "ramp", "factory", "None", "text"],
)
def test_what_is_no_momentum_is_refused(momentum, text):
    with pytest.raises(TypeError, match=text):
        bnjax.bn_apply(PARAMS, STATE, X, True, momentum=momentum)


def test_a_class_is_no_limit():
    with pytest.raises(TypeError, match=r"renorm_bn_apply\(r_max=linear_ramp\)"):
        bnjax.renorm_bn_apply(PARAMS, STATE, X, True, r_max=bnjax.linear_ramp, d_max=0.0)


def test_importing_changes_no_table_of_jax():
    code = """
import jax.experimental.jet as jet, jax.extend.core.primitives as primitives
from jax.interpreters import ad
tables = jet.jet_rules, ad.primitive_jvps, ad.primitive_transposes
before = [dict(table) for table in tables]
import bnjax
for table, old in zip(tables, before):
    added = {str(key) for key in table if key not in old}
    assert all(name.startswith("bnjax_") for name in added), added
    assert all(table[key] is value for key, value in old.items())
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def parts_of(x, shardings):
    return [bnjax.batch_moments(jax.device_put(part, sharding)) for part, sharding in zip(x, shardings, strict=True)]


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_moments_of_differently_sharded_parts_merge(kind):
    mesh = jax.make_mesh((4,), ("d",), axis_types=(getattr(jax.sharding.AxisType, kind),))
    x = np.random.default_rng(1).normal(5, 2, (2, 8, 4)).astype(np.float32)
    by_feature = NamedSharding(mesh, P(None, "d"))
    with jax.set_mesh(mesh):
        merged = bnjax.merge_moments(*parts_of(x, [by_feature, NamedSharding(mesh, P("d"))]))
        again = bnjax.merge_moments(*parts_of(x, [NamedSharding(mesh, P()), by_feature]))
    for moments in (merged, again):
        for got, wanted in zip(moments, reference.moments(x.reshape(16, 4)), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_moments_on_other_devices_are_refused_with_the_remedy():
    one, other = (bnjax.batch_moments(jax.device_put(X, device)) for device in jax.devices()[:2])
    with pytest.raises(ValueError, match=r"merge_moments\(...\): .*jax.device_put"):
        bnjax.merge_moments(one, other)
    np.testing.assert_allclose(bnjax.merge_moments(one, jax.device_put(other, jax.devices()[0])).weight, 32)


def test_a_weight_that_a_merge_would_lose_is_a_warning():
    total = bnjax.Moments(jnp.full(1, 2.0**24), jnp.zeros(1), jnp.ones(1))
    row = bnjax.Moments(jnp.ones(1), jnp.ones(1), jnp.zeros(1))
    with pytest.warns(UserWarning, match=r"merge_moments\(...\): .* lost beside 1.67772e\+07.*Merge small parts"):
        bnjax.merge_moments(total, row)
    rows = bnjax.Moments(jnp.full(1, 2.0**20), jnp.ones(1), jnp.zeros(1))  # the remedy: rows merged first
    merged = bnjax.merge_moments(total, rows)
    assert merged.weight.tolist() == [2**24 + 2**20]
    np.testing.assert_allclose(merged.mean, 2**20 / (2**24 + 2**20), rtol=1e-6)

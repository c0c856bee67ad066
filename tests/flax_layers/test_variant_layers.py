"""The Linen and NNX layers of the variants against the pure functions, and the BN-LSTM against its paper."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import bnjax
import bnjax.linen
import bnjax.nnx
from bnjax import training
from tests.support import reference

pytestmark = pytest.mark.usefixtures("flax_promotion")

KEY = jax.random.key(0)
LIMITS = {"r_max": 1.5, "d_max": 0.4}
# The layers' options, the pure function with its options, and a call's other arguments.
LAYERS = {
    "Ghost": ({"ghost_size": 3}, lambda *a, **k: bnjax.ghost_bn_apply(*a, ghost_size=3, **k), {}),
    "Renorm": (LIMITS, lambda *a, **k: bnjax.renorm_bn_apply(*a, **LIMITS, **k), {}),
    "Indexed": ({"num_indices": 4}, bnjax.indexed_bn_apply, {"index": 2}),
}


def close(actual, expected, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), actual, expected)


def linen_run(name, options, batches, call):
    layer = getattr(bnjax.linen, f"{name}BatchNorm")(momentum=0.8, **options)
    variables = jax.jit(partial(layer.init, use_running_average=False, **call))(KEY, batches[0])
    train = jax.jit(partial(layer.apply, use_running_average=False, mutable=["batch_stats"], **call))
    for x in batches:
        y, updates = train(variables, x)
        variables = {**variables, **updates}
    return y, variables["batch_stats"], jax.jit(partial(layer.apply, use_running_average=True, **call))(variables, x)


def nnx_run(name, options, batches, call):
    layer = getattr(bnjax.nnx, f"{name}BatchNorm")(3, momentum=0.8, rngs=nnx.Rngs(0), **options)
    run = nnx.jit(lambda layer, x: layer(x, **call))
    for x in batches:
        y = run(layer, x)
    layer.eval()
    return y, nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat)), run(layer, x)


@pytest.mark.parametrize("run", [linen_run, nnx_run])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_what_its_function_computes(name, run, rng):
    options, function, call = LAYERS[name]
    batches = rng.normal(2, 3, (3, 8, 3)).astype(np.float32)
    params, state = bnjax.indexed_bn_init(3, 4) if name == "Indexed" else bnjax.bn_init(3)
    for x in batches:
        expected, state = function(params, state, x, True, momentum=0.8, **call)
    y, stats, evaluated = run(name, options, batches, call)
    close(y, expected)
    close((stats["mean"], stats["var"]), (state.mean, state.var))
    assert "count" not in stats
    close(evaluated, function(params, state, x, False, **call)[0])


@pytest.mark.parametrize("run", [linen_run, nnx_run])
def test_the_renorm_layer_counts_for_the_papers_schedule(run, rng):
    batches = rng.normal(2, 3, (3, 8, 3)).astype(np.float32)
    y, stats, _ = run("Renorm", {}, batches, {})
    np.testing.assert_array_equal(stats["count"], 3)
    close(y, reference.train(batches[-1], np.ones(3), np.zeros(3), 0, 1)[0], 1e-5)  # still batch normalization
    rising = {"r_max": bnjax.linear_ramp(1.0, 3.0, 0, 4), "d_max": bnjax.linear_ramp(0.0, 2.0, 0, 4)}
    y, stats, _ = run("Renorm", rising, batches, {})
    params, state = bnjax.bn_init(3)
    for x in batches:
        expected, state = bnjax.renorm_bn_apply(params, state, x, True, momentum=0.8, **rising)
    close(y, expected)


def test_a_conditional_layer_embeds_the_label(rng):
    x = rng.normal(2, 3, (5, 4, 3)).astype(np.float32)
    label = np.array([0, 2, 1, 2, 0])
    table = {"scale": rng.normal(size=(3, 3)).astype(np.float32), "bias": rng.normal(size=(3, 3)).astype(np.float32)}
    xhat = reference.train(x, np.ones(3), np.zeros(3), 0, 1)[0]
    expected = table["scale"][label][:, None] * xhat + table["bias"][label][:, None]
    layer = bnjax.linen.ConditionalBatchNorm(num_classes=3, use_running_average=False)
    variables = layer.init(KEY, x, label=label)
    assert jax.tree.map(jnp.shape, variables["params"]) == {"scale": (3, 3), "bias": (3, 3)}
    y, _ = layer.apply({**variables, "params": table}, x, label=label, mutable=["batch_stats"])
    close(y, expected)
    layer = bnjax.nnx.ConditionalBatchNorm(3, num_classes=3, rngs=nnx.Rngs(0))
    assert layer.scale.shape == (3, 3)
    layer.scale[...], layer.bias[...] = table["scale"], table["bias"]
    close(layer(x, label=label), expected)
    first = bnjax.conditional_params(bnjax.BNParams(**table), label, x.transpose(2, 0, 1), axis=0)
    close(bnjax.bn_apply(first, None, x.transpose(2, 0, 1), True, axis=0)[0], expected.transpose(2, 0, 1))
    with pytest.raises(ValueError, match=r"one for each example.*\(5, 4, 3\).*\(2,\)"):
        bnjax.conditional_params(bnjax.BNParams(**table), label[:2], x)
    with pytest.raises(TypeError, match="expected integers"):
        bnjax.conditional_params(bnjax.BNParams(**table), label / 2, x)


@pytest.mark.parametrize("frozen_params", [False, True])
def test_a_frozen_layer_trains_like_evaluation(frozen_params, rng):
    x = rng.normal(2, 3, (8, 3)).astype(np.float32)
    options = {"frozen": True, "frozen_params": frozen_params}
    stats = {"mean": jnp.array([1.0, 2.0, 3.0]), "var": jnp.array([1.0, 4.0, 9.0])}
    params, state = bnjax.bn_init(3)
    expected, _ = bnjax.bn_apply(params, bnjax.BNState(**stats, count=state.count), x, False)
    layer = bnjax.linen.BatchNorm(use_running_average=False, **options)
    variables = {**layer.init(KEY, x), "batch_stats": stats}

    def linen_loss(params):
        y, updates = layer.apply({**variables, "params": params}, x, mutable=["batch_stats"])
        return jnp.sum(y**2), (y, updates)

    gradient, (y, updates) = jax.jit(jax.grad(linen_loss, has_aux=True))(variables["params"])
    close(y, expected)
    close(updates["batch_stats"], stats, 0)
    xhat = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
    slope = np.zeros(3) if frozen_params else (2 * expected * xhat).sum(0)
    close(gradient["scale"], slope, 1e-4)

    layer = bnjax.nnx.BatchNorm(3, rngs=nnx.Rngs(0), **options)
    nnx.update(layer, {name: nnx.BatchStat(value) for name, value in stats.items()})
    layer.train()
    close(layer(x), expected)
    close(layer.mean[...], stats["mean"], 0)
    close(nnx.grad(lambda layer: jnp.sum(layer(x) ** 2))(layer)["scale"][...], slope, 1e-4)


def bn_lstm_oracle(params, x, lengths, num_steps, epsilon=1e-5):
    """Equations 6 to 8 of Cooijmans et al. (2017) in float64, each step by the statistics of the sequences in it."""
    params = jax.tree.map(lambda v: np.asarray(v, np.float64), params)
    sigmoid = lambda v: 1 / (1 + np.exp(-v))  # noqa: E731
    features = params.recurrent_kernel.shape[0]
    cell, output = np.zeros((2, len(x), features))
    outputs, statistics = [], []
    for t in range(x.shape[1]):
        going = t < lengths

        def norm(name, v, going=going):
            mean, var = v[going].mean(0), v[going].var(0)
            statistics[-1][name] = mean, var
            bn = getattr(params, name)
            return (v - mean) / np.sqrt(var + epsilon) * bn.scale + (0 if bn.bias is None else bn.bias)

        statistics.append({})
        gates = norm("recurrent_bn", output @ params.recurrent_kernel) + norm("input_bn", x[:, t] @ params.input_kernel)
        f, i, o, g = np.split(gates + params.bias, 4, -1)
        new = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
        hidden = sigmoid(o) * np.tanh(norm("cell_bn", new))
        cell, output = np.where(going[:, None], new, cell), np.where(going[:, None], hidden, output)
        outputs.append(output)
    return np.stack(outputs, 1), statistics


@pytest.fixture
def lstm(rng):
    params, state = bnjax.bn_lstm_init(KEY, 3, 6, num_steps=4)
    params = params._replace(bias=rng.normal(size=24).astype(np.float32))
    return params, state


LENGTHS = np.array([5, 5, 2, 4, 3, 5, 5, 1])


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "several lengths"])
def test_bn_lstm_matches_the_oracle(lengths, lstm, rng):
    params, state = lstm
    x = rng.normal(size=(8, 5, 3)).astype(np.float32)
    if lengths is not None:
        x[np.arange(5) >= lengths[:, None]] = np.nan  # what follows a sequence is nobody's

    def one(carry, x):
        carry, state = bnjax.bn_lstm_apply(params, carry[1], carry[0], x, True, momentum=0.9)
        return (carry, state), carry.output

    start = bnjax.bn_lstm_carry(8, 6, length=None if lengths is None else jnp.asarray(lengths))
    (carry, new), outputs = jax.jit(partial(jax.lax.scan, one))((start, state), x.swapaxes(0, 1))
    clean = np.nan_to_num(x)
    expected, statistics = bn_lstm_oracle(params, clean, np.full(8, 5) if lengths is None else lengths, 4)
    close(outputs.swapaxes(0, 1), expected, 2e-4)
    close(carry.output, expected[:, -1], 2e-4)
    for t in range(3):
        close(new.cell_bn.mean[t], 0.1 * statistics[t]["cell_bn"][0], 1e-4)
        close(new.input_bn.var[t], 0.9 + 0.1 * statistics[t]["input_bn"][1], 1e-4)
    last = 0.1 * (0.9 * statistics[3]["input_bn"][0] + statistics[4]["input_bn"][0])
    close(new.input_bn.mean[3], last, 1e-4)  # steps 3 and 4 share the last index
    np.testing.assert_array_equal(new.input_bn.count[:, 0], [1, 1, 1, 2])


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "several lengths"])
def test_the_bn_lstm_layers_compute_what_the_function_computes(lengths, lstm, rng):
    params, state = lstm
    x = rng.normal(size=(8, 5, 3)).astype(np.float32)
    lengths = None if lengths is None else jnp.asarray(lengths)

    def one(carry, x):
        carry, state = bnjax.bn_lstm_apply(params, carry[1], carry[0], x, True)
        return (carry, state), carry.output

    start = bnjax.bn_lstm_carry(8, 6, length=lengths), state
    (carry, new), outputs = jax.jit(partial(jax.lax.scan, one))(start, x.swapaxes(0, 1))
    outputs = np.asarray(outputs).swapaxes(0, 1)

    cell = bnjax.linen.BNLSTMCell(features=6, num_steps=4, use_running_average=False)
    layer = bnjax.linen.BNLSTM(cell)
    variables = jax.jit(layer.init)(KEY, x)
    kernels = {name: getattr(params, name) for name in ("input_kernel", "recurrent_kernel", "bias")}
    variables["params"]["cell"].update(kernels)
    close(variables["params"]["cell"]["cell_bn"], {"scale": np.full(6, 0.1), "bias": np.zeros(6)})
    assert set(variables["params"]["cell"]["input_bn"]) == {"scale"}
    (last, y), updates = jax.jit(partial(layer.apply, mutable=["batch_stats"]))(variables, x, length=lengths)
    close(y, outputs)
    close(last.cell, carry.cell)
    for name in bnjax.BNLSTMState._fields:
        close(updates["batch_stats"]["cell"][name]["var"], getattr(new, name).var)

    cell = bnjax.nnx.BNLSTMCell(3, 6, num_steps=4, rngs=nnx.Rngs(0))
    for name, kernel in kernels.items():
        getattr(cell, name)[...] = kernel
    start = cell.initialize_carry((8, 3), length=lengths)
    y = nnx.jit(lambda cell, x: nnx.RNN(cell)(x, initial_carry=start))(cell, x)
    close(y, outputs)
    for name in bnjax.BNLSTMState._fields:
        close(getattr(cell, name).var[...], getattr(new, name).var)
    evaluated = []
    cell.eval()
    evaluated.append(nnx.jit(lambda cell, x: nnx.RNN(cell)(x))(cell, x))
    frozen = bnjax.linen.BNLSTM(bnjax.linen.BNLSTMCell(features=6, num_steps=4, use_running_average=True))
    evaluated.append(jax.jit(frozen.apply)({**variables, **updates}, x)[1])
    close(*evaluated)
    assert np.abs(evaluated[0] - outputs).max() > 1e-3


def test_bn_lstm_gradients_match_plain_autodiff(rng):
    with jax.enable_x64(True):
        params, state = bnjax.bn_lstm_init(KEY, 3, 4, num_steps=3, dtype=jnp.float64)
        x = rng.normal(size=(6, 3, 3))

        def loss(params, x):
            def one(carry, x):
                carry, new = bnjax.bn_lstm_apply(params, carry[1], carry[0], x, True)
                return (carry, new), carry.output

            start = bnjax.bn_lstm_carry(6, 4, dtype=jnp.float64), state
            return jnp.sum(jax.lax.scan(one, start, x.swapaxes(0, 1))[1] ** 3)

        def plain(params, x):
            def norm(bn, v):
                xhat = (v - v.mean(0)[None]) / jnp.sqrt(v.var(0) + 1e-5)[None] * bn.scale[None]
                return xhat if bn.bias is None else xhat + bn.bias[None]

            cell = output = jnp.zeros((6, 4))
            total = 0
            for t in range(3):
                gates = norm(params.recurrent_bn, output @ params.recurrent_kernel)
                gates += norm(params.input_bn, x[:, t] @ params.input_kernel) + params.bias[None]
                f, i, o, g = jnp.split(gates, 4, -1)
                cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
                output = jax.nn.sigmoid(o) * jnp.tanh(norm(params.cell_bn, cell))
                total += jnp.sum(output**3)
            return total

        close(*(jax.jit(jax.grad(f, (0, 1)))(params, x) for f in (loss, plain)), 1e-8)


def test_a_bn_lstm_over_a_named_axis_is_one_device(lstm, rng):
    params, state = lstm
    x = rng.normal(size=(8, 3)).astype(np.float32)
    carry = bnjax.bn_lstm_carry(8, 6)._replace(output=rng.normal(size=(8, 6)).astype(np.float32))
    expected = bnjax.bn_lstm_apply(params, state, carry, x, True)
    split = bnjax.BNLSTMCarry(0, 0, None, None)

    def apply(carry, x):
        return bnjax.bn_lstm_apply(params, state, carry, x, True, axis_name="data")

    halves = jax.tree.map(lambda v: v.reshape(4, 2, -1) if v.ndim else v, carry)
    mapped = jax.jit(jax.vmap(apply, (split, 0), axis_name="data", out_axes=(split, None)))
    new, stats = mapped(halves, x.reshape(4, 2, 3))
    close(new.output.reshape(8, 6), expected[0].output, 1e-4)
    close(stats, expected[1], 1e-4)


def test_nan_after_a_sequence_reaches_no_gradient(lstm):
    params, state = lstm
    x = np.where((np.arange(8) < 5)[:, None], 1 + np.arange(24, dtype=np.float32).reshape(8, 3), np.float32(np.nan))
    carry = bnjax.bn_lstm_carry(8, 6, length=np.arange(8) < 5)

    def loss(params, x):
        return jnp.sum(bnjax.bn_lstm_apply(params, state, carry, x, True)[0].output ** 2)

    gradient = jax.jit(jax.grad(loss, (0, 1)))
    gradients, expected = gradient(params, x), gradient(params, np.nan_to_num(x))
    close(gradients, expected)
    assert np.abs(gradients[0].input_kernel).max() > 0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_bn_lstm_in_half_precision_scans(dtype):
    x = jnp.ones((4, 3, 2), dtype)
    params, _ = bnjax.bn_lstm_init(KEY, 2, 5, num_steps=3, dtype=dtype)
    kernel = params.recurrent_kernel.astype(jnp.float32)
    close(kernel @ kernel.T, np.eye(5), 0.03)
    cell = bnjax.nnx.BNLSTMCell(2, 5, num_steps=3, param_dtype=dtype, rngs=nnx.Rngs(0))
    outputs = nnx.jit(lambda cell, x: nnx.RNN(cell)(x))(cell, x)
    assert (outputs.shape, outputs.dtype) == ((4, 3, 5), dtype)


def test_a_bn_lstm_layer_runs_in_shard_map_and_refuses_two_lengths(rng):
    x = rng.normal(size=(8, 3, 2)).astype(np.float32)
    cell = bnjax.linen.BNLSTMCell(features=4, num_steps=3, use_running_average=False, axis_name="data")
    layer = bnjax.linen.BNLSTM(cell)
    variables = jax.jit(layer.init)(KEY, x)

    def apply(x):
        return layer.apply(variables, x, mutable=["batch_stats"])[0][1]

    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    outputs = jax.jit(jax.shard_map(apply, mesh=mesh, in_specs=spec, out_specs=spec))(x)
    whole = bnjax.linen.BNLSTM(bnjax.linen.BNLSTMCell(features=4, num_steps=3, use_running_average=False))
    (_, want), _ = jax.jit(partial(whole.apply, mutable=["batch_stats"]))(variables, x)
    close(outputs, want, 1e-4)
    with pytest.raises(ValueError, match="the carry holds the length"):
        layer.init(KEY, x, length=jnp.ones(8, int), initial_carry=bnjax.bn_lstm_carry(8, 4))


@pytest.mark.parametrize("layer", ["Ghost", "Renorm", "Indexed"])
def test_variants_accumulate_as_one_batch(layer, rng):
    """A single layer: the merged moments of micro-batches are those of the whole, however the output is normalized."""
    x = rng.normal(2, 3, (12, 3)).astype(np.float32)
    options, _, call = LAYERS[layer]
    model = getattr(bnjax.linen, f"{layer}BatchNorm")(use_running_average=False, momentum=0.7, **options)

    def loss(model, x, train):
        return jnp.mean(model(x, **call) ** 2)

    variables = model.init(KEY, x, **call)
    state = training.TrainState.create(apply_fn=model.apply, tx=optax.sgd(0.0), **variables)
    whole, parts = (training.train_step(loss, accumulate=n, donate=False)(state, x)[0].batch_stats for n in (1, 3))
    close(parts, whole)
    assert np.abs(np.asarray(whole["mean"])).max() > 0.1


def test_layers_refuse_bad_options():
    x = jnp.ones((4, 3))
    with pytest.raises(ValueError, match="ghost_size=0"):
        bnjax.linen.GhostBatchNorm(ghost_size=0, use_running_average=False).init(KEY, x)
    with pytest.raises(ValueError, match="index=4"):
        bnjax.nnx.IndexedBatchNorm(3, num_indices=4, rngs=nnx.Rngs(0))(x, index=4)
    with pytest.raises(ValueError, match="num_indices=0"):
        bnjax.nnx.IndexedBatchNorm(3, num_indices=0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="num_classes=0"):
        bnjax.linen.ConditionalBatchNorm(num_classes=0, use_running_average=False).init(KEY, x, label=jnp.zeros(4, int))
    with pytest.raises(TypeError, match="ghost_size"):
        bnjax.linen.GhostBatchNorm()
    with pytest.raises(TypeError, match=r"IndexedBatchNorm\(indexed_params=...\): expected a Python bool, got 'no'"):
        bnjax.nnx.IndexedBatchNorm(3, num_indices=4, indexed_params="no", rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"IndexedBatchNorm\(indexed_params=...\): expected a Python bool, got 'no'"):
        bnjax.linen.IndexedBatchNorm(num_indices=4, indexed_params="no", use_running_average=False).init(
            KEY, x, index=0
        )
    with pytest.raises(TypeError, match=r"GhostBatchNorm\(frozen=...\): expected a Python bool, got 'no'"):
        bnjax.linen.GhostBatchNorm(ghost_size=2, frozen="no", use_running_average=False).init(KEY, x)
    with pytest.raises(ValueError, match="r_max=0"):
        nn.Sequential([bnjax.linen.RenormBatchNorm(r_max=0, use_running_average=False)]).init(KEY, x)


def test_the_bn_lstm_cells_refuse_bad_sizes_and_shapes():
    for sizes, message in (
        ((3, 4, 0), "num_steps=0"),
        ((3, -4, 5), "hidden_features=-4"),
        ((0, 4, 5), "in_features=0"),
    ):
        with pytest.raises(ValueError, match=rf"BNLSTMCell\({message}\): expected a positive integer"):
            bnjax.nnx.BNLSTMCell(*sizes[:2], num_steps=sizes[2], rngs=nnx.Rngs(0))
    x, carry = jnp.ones((2, 3)), bnjax.bn_lstm_carry(2, 4)
    for sizes, message in (((4, 0), "num_steps=0"), ((-4, 5), "features=-4")):
        cell = bnjax.linen.BNLSTMCell(features=sizes[0], num_steps=sizes[1], use_running_average=False)
        with pytest.raises(ValueError, match=rf"BNLSTMCell\({message}\): expected a positive integer"):
            cell.init(KEY, carry, x)
    nnx_cell = bnjax.nnx.BNLSTMCell(3, 4, num_steps=5, rngs=nnx.Rngs(0))
    linen_cell = bnjax.linen.BNLSTMCell(features=4, num_steps=5, use_running_average=False)
    for call in (nnx_cell, partial(linen_cell.init, KEY)):
        with pytest.raises(
            ValueError, match=r"BNLSTMCell\(carry=...\): x has shape \(1, 3\).*Pass bn_lstm_carry\(1, 4\)"
        ):
            call(carry, x[:1])
    with pytest.raises(ValueError, match=r"BNLSTMCell\(x=...\): expected shape \(batch, 3\), got \(2, 2\)"):
        nnx_cell(carry, x[:, :2])

# %% [markdown]
# # End to end: Linen
#
# This page is for people with a model to train. One small program takes a convolutional network from data to serving.
# It trains on eight devices with accumulated gradients, averages the weights, can be stopped and resumed at any time,
# and writes a file that another process serves. The sections check their results. The program runs in less than a
# minute on two cores, and needs these packages:
#
# ```sh
# pip install '.[flax,export]' orbax-checkpoint scikit-learn  # in a checkout of bnjax
# ```
#
# ## Devices
#
# JAX can divide the CPU into several devices, which compute the same as eight accelerators. It reads
# `JAX_NUM_CPU_DEVICES` when the first array is made. On a machine with GPUs or TPUs the variable has no effect on the
# training, which uses all of them. The rest of the program works for any number: `JAX_NUM_CPU_DEVICES=1 python
# linen.py` runs on one device.

# %%
import os

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sklearn.datasets import load_digits

import bnjax
import bnjax.linen
from bnjax.training import TrainState, decay_mask, eval_step, train_step

mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
replicated, divided = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))

# %% [markdown]
# ## Data
#
# scikit-learn has 1,797 images of digits. The batch of a step is a function of the step's number, so a resumed run
# sees the same batches as an uninterrupted one. `device_put` divides a batch among the
# devices, whose number must divide the size of a micro-batch, 64.

# %%
digits = load_digits()
images, labels = digits.images[..., None].astype(np.float32) / 16, digits.target
order = np.random.default_rng(0).permutation(len(images))
train_rows, test_rows = order[384:], order[:384]
BATCH, MICRO_BATCHES, STEPS, SAVE_EVERY = 128, 2, 120, 50


def batch_of(rows):
    return jax.device_put({"image": images[rows], "label": labels[rows]}, divided)


def training_batch(step):
    epoch, start = divmod(step, len(train_rows) // BATCH)
    shuffled = np.random.default_rng(epoch).permutation(train_rows)
    return batch_of(shuffled[start * BATCH : (start + 1) * BATCH])


# %% [markdown]
# ## Model and loss
#
# A convolution before batch normalization needs no bias, because the layer would subtract it. 120 steps are few for the
# default momentum of 0.99, so the running statistics use 0.9. `x.shape[0]`, unlike `len(x)`, may be a symbol, which
# the export needs.


# %%
class Network(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        for features in (16, 32):
            x = nn.Conv(features, (3, 3), strides=2, use_bias=False)(x)
            x = nn.relu(bnjax.linen.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


def loss(model, batch, train):
    logits = model(batch["image"], train)
    value = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
    return value, {"accuracy": jnp.mean(logits.argmax(-1) == batch["label"])}


# %% [markdown]
# ## Training
#
# `bnjax.training.train_step` runs the batch as two micro-batches, averages their gradients, and updates the running
# statistics once. The state is replicated and the batch is divided, so the statistics cover all devices; the model
# needs no `axis_name`. `optax.incremental_update` averages the weights, with a weight of 0.05 for the
# newest. The average begins with the variables, not with `state.params`, which the first step deletes, because it
# reuses their memory.

# %%
model = Network()
optimizer = optax.adamw(1e-2, weight_decay=1e-3, mask=decay_mask)
step, update_average = train_step(loss, accumulate=MICRO_BATCHES), jax.jit(optax.incremental_update)


def start():
    variables = model.init(jax.random.key(0), images[:1], train=False)
    state = TrainState.create(apply_fn=model.apply, tx=optimizer, **variables)
    return jax.device_put({"state": state, "average": variables["params"]}, replicated)


def train(run, steps, manager):
    state, average = run["state"], run["average"]
    for number in range(int(state.step), steps):
        state, _ = step(state, training_batch(number))
        average = update_average(state.params, average, 0.05)
        if (number + 1) % SAVE_EVERY == 0:
            manager.save(number + 1, args=ocp.args.StandardSave({"state": state, "average": average}))
    return {"state": state, "average": average}


# %% [markdown]
# ## Checkpoint and resume
#
# A checkpoint holds the training state (parameters, running statistics, optimizer state and step) and the average. A
# new run tells Orbax the structure and the devices to restore to, which may differ from the devices of the run that
# saved. The same command resumes a program that was killed. To train from the beginning, for example after a change
# of the program, delete the folder.

# %%
options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
manager = ocp.CheckpointManager(Path("checkpoints-linen").absolute(), options=options)


def resumed():
    latest, fresh = manager.latest_step(), start()
    print(f"starting from {'the beginning' if latest is None else f'the checkpoint of step {latest}'}")
    return fresh if latest is None else manager.restore(latest, args=ocp.args.StandardRestore(fresh))


run = train(resumed(), STEPS, manager)

# %% [markdown]
# The newest checkpoint is from step 100. A run that is resumed from it ends with the same bits as the uninterrupted
# run.

# %%
again = resumed()
assert again["state"].step == 100
jax.tree.map(np.testing.assert_array_equal, train(again, STEPS, manager), run)

# %% [markdown]
# ## Averaged weights and evaluation
#
# The averaged weights were never run in training mode, so the running statistics do not fit them. `bnjax.recalibrate`
# recomputes the statistics. Its batches have the size of the micro-batches, which normalized the network in training.
# The task is so easy that the three rows of the output hardly differ;
# [Recalibration](../guides/recalibration.md#evidence) has a network in which they do.

# %%
state = run["state"]
size = BATCH // MICRO_BATCHES
parts = [batch_of(train_rows[i : i + size])["image"] for i in range(0, len(train_rows) - size + 1, size)]
stale = {"params": run["average"], "batch_stats": state.batch_stats}
variables = bnjax.recalibrate(partial(model.apply, train=True), stale, parts)

evaluate, test = eval_step(loss), batch_of(test_rows)
compared = {"last": state, "averaged": state.replace(**stale), "recalibrated": state.replace(**variables)}
for name, kept in compared.items():
    result = evaluate(kept, test)
    print(f"{name:12} weights: test accuracy {result['accuracy']:.3f}, loss {result['loss']:.4f}")
assert result["accuracy"] > 0.96

# %% [markdown]
# ## Fold and export
#
# The served program uses one device, so the variables are taken from the eight devices to the host.
# `bnjax.linen.fold_model` puts batch normalization into the convolutions. The exported program holds the weights,
# takes batches of any size, and is compiled for CPU, GPU or TPU where it is loaded.

# %%
variables = jax.device_get(variables)
folded, interceptor = bnjax.linen.fold_model(model, variables, images[:1], train=False)
assert "batch_stats" not in folded


def probabilities(x):
    return jax.nn.softmax(interceptor.model.apply(folded, x, train=False))


expected = jax.nn.softmax(model.apply(variables, images[test_rows], train=False))
np.testing.assert_allclose(probabilities(images[test_rows]), expected, atol=1e-5)

symbolic = jax.ShapeDtypeStruct(jax.export.symbolic_shape("batch, 8, 8, 1"), jnp.float32)
exported = jax.export.export(jax.jit(probabilities), platforms=["cpu", "cuda", "tpu"])(symbolic)
assert exported.nr_devices == 1
Path("digits-linen.bin").write_bytes(exported.serialize())

# %% [markdown]
# ## Load and serve
#
# The process that serves needs the file, JAX and flatbuffers. It needs neither Flax nor bnjax nor the model's code.
# `jax.jit` compiles the program once for each size of a batch, so `serve` pads the batch to the next power of two by
# repeating images. In evaluation an image does not affect the outputs of others.

# %%
program = jax.jit(jax.export.deserialize(Path("digits-linen.bin").read_bytes()).call)


def serve(x):
    size = 1 << (len(x) - 1).bit_length()
    return np.asarray(program(np.resize(x, (size, *x.shape[1:]))))[: len(x)]


for size in (1, 50):
    np.testing.assert_allclose(serve(images[test_rows[:size]]), expected[:size], atol=1e-5)

"""Recurrent networks need their own form of batch normalization (Cooijmans et al., 2017).

Digits are read pixel by pixel by three networks: an LSTM without batch normalization, an LSTM with running statistics
that all timesteps share, and the BN-LSTM, with running statistics for every timestep. The second and the third compute
the same in training, and differ in evaluation. The experiment measures the test accuracy, and, for the initialized
BN-LSTM with several initial scales, the norm of the loss's gradient with respect to the output of each timestep (the
paper's figure 1 shows it for a plain tanh network).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bnjax
from bnjax.variants.lstm import SCALE, step
from experiments.harness import data, plot, records, study, train
from experiments.models import networks

NETWORKS = ("LSTM", "BN, shared over timesteps", "BN-LSTM")
COLOURS = dict(zip(NETWORKS, (plot.VERMILION, plot.ORANGE, plot.BLUE), strict=True))
SCALES = (0.1, 0.3, 0.6, 1.0)
KEPT = 10


@dataclass(frozen=True)
class Recurrent(study.Study):
    """The configuration of the experiment. Its fields are the flags of the command line."""

    NAME = "recurrent"
    CLAIM = "recurrent networks need their own form of batch normalization"
    SOURCE = "Cooijmans et al. (2017), sections 3 to 5, figure 1"
    THRESHOLD = (
        f"{study.CLEARLY}, the BN-LSTM's statistics per timestep give a higher test accuracy at the end than (a) the "
        f"LSTM, (b) statistics shared over timesteps; (c) with the initial scale of {SCALE} the gradient in the first "
        f"timestep's output is within a factor of {KEPT} of that in the last one's, over all of its timesteps, and "
        "with a scale of 1 further off, in whichever direction (in the paper's tanh network it vanishes)"
    )
    SMOKE = {"features": 8, "steps": 30, "seeds": 2, "eval_every": 15}
    FULL = {"features": 100, "steps": 20_000, "seeds": 10, "eval_every": 500}

    features: int = 32
    """units of the LSTM"""
    batch_size: int = 60
    """images per step"""
    steps: int = 600
    """updates per run"""
    learning_rate: float = 3e-3
    """learning rate of Adam"""
    momentum: float = 0.9
    """weight of the old value in the running statistics"""
    eval_every: int = 50
    """steps between evaluations on the test set"""

    def runs(self, dataset: data.Dataset) -> records.Runs:
        pixels = int(np.prod(dataset.train_images.shape[1:3]))

        def network(name):
            init = partial(_init, classes=dataset.classes, features=self.features, name=name, pixels=pixels)
            # Shared statistics are updated at every pixel. This momentum makes them remember as many images.
            momentum = self.momentum ** (1 if name == "BN-LSTM" else 1 / pixels)
            return networks.Network(init, partial(_apply, name=name, pixels=pixels, momentum=momentum))

        runs = {
            name: self.fit(*network(name), dataset, optimizer=partial(optax.adam, self.learning_rate))
            for name in NETWORKS
        }
        return runs | {tuple(f"scale {scale}" for scale in SCALES): self._gradients(*network("BN-LSTM"), dataset)}

    def _gradients(self, init, apply, dataset) -> Iterator[train.Evaluation]:
        """The norm of the gradient with respect to each timestep's output, for every scale and seed."""
        batch = [jnp.asarray(x[: self.batch_size]) for x in (data.flat(dataset.train_images), dataset.train_labels)]
        starts = [init(jax.random.key(seed)) for seed in range(self.seeds)]
        params, state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
        steps = state.input_bn.count.shape[1]

        def norms(params, state, scale):
            lstm = params["lstm"]
            norms = {
                name: getattr(lstm, name)._replace(scale=scale * jnp.ones_like(getattr(lstm, name).scale))
                for name in ("input_bn", "recurrent_bn", "cell_bn")
            }
            params = params | {"lstm": lstm._replace(**norms)}

            def loss(added):
                return train.cross_entropy(partial(apply, added=added), params, state, *batch)

            return jnp.linalg.norm(jax.grad(loss)(jnp.zeros((steps, len(batch[0]), self.features))), axis=(1, 2))

        each = jax.jit(jax.vmap(jax.vmap(norms, (0, 0, None)), (None, None, 0)))
        values = np.asarray(each(params, state, jnp.array(SCALES))).reshape(len(SCALES) * self.seeds, -1)
        yield train.Evaluation(0, 1.0, np.full(len(values), np.nan), {"gradient_norm": values})

    def judge(self, metrics: dict[str, records.Series]) -> study.Finding:
        final = {name: metrics[name]["test_accuracy"][:, -1] for name in NETWORKS}
        norms = {scale: metrics[f"scale {scale}"]["gradient_norm"][:, 0] for scale in SCALES}
        kept = {scale: norm[:, 0] / norm[:, -1] for scale, norm in norms.items()}
        off = {scale: abs(np.log(np.maximum(values, 1e-30))) for scale, values in kept.items()}
        words = [records.spread(values, ".3f") for values in final.values()]
        parts = [f"{np.exp(np.mean(np.log(np.maximum(kept[scale], 1e-30)))):.1e}" for scale in SCALES]
        return study.Finding(
            f"test accuracy {words[2]} with statistics per timestep, {words[1]} with shared ones, {words[0]} without "
            f"batch normalization; gradient of the first timestep in parts of the last one's: {parts[0]} with an "
            f"initial scale of {SCALES[0]}, {parts[-1]} with {SCALES[-1]:g}",
            (
                *(study.clearly(final["BN-LSTM"] - study.lower(final[name])) for name in NETWORKS[:2]),
                study.clearly(np.log(KEPT) - off[SCALE]) and study.clearly(off[SCALES[-1]] - off[SCALE]),
            ),
            f"Digits read pixel by pixel: accuracy {words[2]} with statistics per timestep, {words[1]} with shared "
            f"ones, {words[0]} without",
            [
                ["network or initial scale", "final test accuracy", "gradient, first / last timestep"],
                *([name, word, ""] for name, word in zip(NETWORKS, words, strict=True)),
                *([f"BN-LSTM, {scale:g}", "", part] for scale, part in zip(SCALES, parts, strict=True)),
            ],
        )

    def draw(self, path, metrics, title):
        with plot.figure(path, title, panels=2) as (left, right):
            series = {name: (metrics[name].steps, metrics[name]["test_accuracy"]) for name in NETWORKS}
            plot.curves(left, series, COLOURS)
            left.set(ylabel="test accuracy", ylim=(0, 1.02))
            plot.legend(left, self.seeds)
            norms = {f"{scale:g}": metrics[f"scale {scale}"]["gradient_norm"][:, 0] for scale in SCALES}
            series = {scale: (1 + np.arange(norm.shape[1]), norm) for scale, norm in norms.items()}
            plot.curves(right, series, dict(zip(norms, plot.PALETTE, strict=False)), xlabel="timestep, a pixel")
            right.set(ylabel="norm of the gradient in the output, at the start", yscale="log")
            right.legend(title="initial scale", frameon=False, fontsize=8, title_fontsize=8)


def _init(key, *, classes, features, name, pixels):
    """Variables of the LSTM and of a linear layer on its last output."""
    lstm, state = bnjax.bn_lstm_init(key, 1, features, pixels if name == "BN-LSTM" else 1)
    lstm = lstm._replace(bias=lstm.bias.at[:features].set(1.0))  # open forget gates (Jozefowicz et al., 2015)
    kernel = jax.random.normal(jax.random.fold_in(key, 100), (features, classes)) * features**-0.5
    return {"lstm": lstm, "kernel": kernel, "bias": jnp.zeros(classes)}, state


def _apply(params, state, x, train, *, name, pixels, momentum, mask=None, axis_name=None, added=None):
    """Logits from a reading of the images pixel by pixel; `added` goes to the output of each timestep."""
    lstm = params["lstm"]
    features = len(lstm.recurrent_kernel)
    carry = bnjax.bn_lstm_carry(len(x), features, length=None if mask is None else jnp.where(mask[:, 0], pixels, 0))
    # The first pixels are blank in all images. Without noise the first variances would be 0 (the paper's section 5.1).
    carry = carry._replace(output=0.1 * jax.random.normal(jax.random.key(0), carry.output.shape))
    inputs = jnp.moveaxis(x.reshape(len(x), pixels, -1).mean(-1, keepdims=True), 1, 0)

    def read(carry, inputs):
        carry, state = carry
        x, added = inputs
        if name == "LSTM":
            carry = step(
                lstm.input_kernel, lstm.recurrent_kernel, lstm.bias, carry, x, lambda name, values, mask: values
            )
        else:
            options = {"momentum": momentum, "axis_name": axis_name}
            carry, state = bnjax.bn_lstm_apply(lstm, state, carry, x, train, **options)
        if added is not None:
            carry = carry._replace(output=carry.output + added)
        return (carry, state), None

    (carry, state), _ = jax.lax.scan(read, (carry, state), (inputs, added))
    return carry.output @ params["kernel"] + params["bias"][None], state

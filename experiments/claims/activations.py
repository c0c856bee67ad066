"""Batch normalization reduces internal covariate shift (Ioffe & Szegedy, 2015, sections 2 and 4.1, figures 1b and c).

The shift is measured in two ways. Ioffe & Szegedy call it the change in the distribution of network activations due to
the change in network parameters during training: `distributions.drift`. The mean and the variance of a normalized input
are steady by definition, except for the learned bias and scale, so it would be strange if this did not fall.

Santurkar et al. (2018, definition 2.1) ask for what the shift was feared for. Let G be the gradient of the loss with
respect to a layer's parameters, and G' the same gradient after all layers before it have been updated by a step, on the
same batch. If the layer's problem changes much by these updates, G' differs from G. The measures are |G - G'| / |G| and
the cosine between G and G'. The paper compares |G - G'|, which depends on the scale of the gradients, and so on the
parametrization; the relative change does not. Only kernels are compared, because both arms have them.
"""

from dataclasses import dataclass
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.claims.common import ACTIVATIONS, GRIDS, NETWORKS, Observed, build
from experiments.harness import (
    curves,
    distributions,
    headline,
    lab,
    plot,
    protocol,
    records,
    report,
    runs,
    scores,
    study,
)

ARMS = ("plain", "batch normalization")
RATES = ("same rate", "own best rate")
MEASURES = {
    "drift": "drift of the inputs of the last hidden layer, in their standard deviations",
    "change": "relative change of a layer's gradient by the update of the layers before it",
    "cosine": "cosine between a layer's gradients before and after the update of the layers before it",
}


def _parts():
    where = {RATES[0]: "the plain network's best rate", RATES[1]: "each one's own best rate"}
    for measure, network, rate in product(MEASURES, NETWORKS, RATES):
        if rate == RATES[1] and measure != "change":
            continue
        ratio = measure != "cosine"
        paper = {
            "drift": "'much more stable' (figures 1b and 1c)",
            "change": "'similar, or even' more with batch normalization (Santurkar et al., section 2.2)",
            "cosine": "'similar, or even' less with batch normalization (Santurkar et al., section 2.2)",
        }
        yield protocol.Part(
            f"{network}, {rate}, {measure}",
            f"{NETWORKS[network]}: {MEASURES[measure]}, "
            + ("plain / batch normalization" if ratio else "batch normalization - plain")
            + f", at {where[rate]}",
            1.0 if ratio else 0.0,
            "less shift means a smaller drift or change" if ratio else "less shift means a larger cosine",
            "ratio" if ratio else "difference",
            paper=paper[measure],
            margin=protocol.TENTH if ratio else None,
        )


def gradient_change(apply, params, state, images, labels, rate):
    """How much the gradients of kernels change by the update of the layers before theirs.

    Args:
      apply, params, state: the network; `params` is a list of layers.
      images, labels: the batch of the gradients and of the update.
      rate: the learning rate of the update.

    Returns:
      By measure, a number for each layer but the first: `change`, |G - G'| / |G|, and `cosine`, between G and G'.
    """

    def gradients(params):
        def loss(params):
            return scores.cross_entropy(apply, params, state, images, labels)

        return jax.grad(loss)(params)

    before = gradients(params)
    updated = jax.tree.map(lambda p, g: p - rate * g, params, before)

    def of(layer):
        mixed = [jax.tree.map(lambda p, q, i=i: jnp.where(i < layer, q, p), *each) for i, each in enumerate(pairs)]
        after = gradients(mixed)
        found = []
        for old, new in zip(before, after, strict=True):
            g, h = old["kernel"], new["kernel"]
            norm = jnp.linalg.norm(g)
            found.append((jnp.linalg.norm(g - h) / norm, (g * h).sum() / (norm * jnp.linalg.norm(h))))
        return jnp.array(found)[layer]

    pairs = [*zip(params, updated, strict=True)]
    # One layer after another, so that only one gradient is compiled.
    change, cosine = jax.lax.map(of, jnp.arange(1, len(params))).T
    return {"change": change, "cosine": cosine}


@dataclass(frozen=True)
class Activations(Observed):
    """The configuration of the experiment. Its fields are the flags of the command line."""

    NAME = "activations"
    CLAIM = "batch normalization reduces internal covariate shift: it steadies the distributions of a layer's inputs"
    # The paper's network and its measure, figures 1b and 1c.
    HEADLINE = headline.Headline(
        "sigmoid, same rate, drift",
        "{} drift of a layer's inputs with batch normalization",
        "batch normalization",
        "amount",
    )
    QUESTION = (
        "Do the distributions of a layer's inputs change less, and does a layer's gradient change less when the layers "
        "before it are updated?"
    )
    SOURCE = "Ioffe & Szegedy (2015), sections 2 and 4.1, figures 1b and 1c; Santurkar et al. (2018), section 2.2"
    PROTOCOL = (
        "The networks of the claim convergence, each arm at a learning rate chosen by the mean validation accuracy "
        "over the curve. The drift is the standard deviation, over all steps of training, of the median of a unit's "
        "input in the last hidden layer on fixed training images, divided by the input's own standard deviation. It is "
        "nearly true by definition that normalization makes it smaller. Therefore the measure of Santurkar et al. is "
        "added: how much a layer's gradient on a batch changes, and the cosine between the gradients, when a step on "
        "this batch updates the layers before it, averaged over layers. Both arms are compared at equal loss of this "
        "batch: on average over losses from 0.75 to 0.25 of log(classes), which lie between guessing and the target of "
        "the training loss."
    )
    WOULD_CHANGE = (
        "The paper of Santurkar et al. compares differences of gradients that are not divided by the gradient's norm, "
        "which favours the network with the smaller gradients. At a rate that is too high for the plain network, its "
        "distributions move more."
    )
    PARTS = (*_parts(),)
    CHANGES = (
        report.Change(
            "2026-11-27",
            "Only the drift was measured, which normalization makes smaller nearly by definition, at one learning rate "
            "chosen for the plain network and with a threshold of 2 that no publication states. The change of "
            "gradients by the update of earlier layers (Santurkar et al.), tuned rates and a convolutional network "
            "were added.",
            "1000 to 1009",
        ),
        study.again(),
    )

    units: int = 3
    """units of the last hidden layer whose inputs are recorded"""

    def _probe(self, apply, network):
        def probe(params, state, view):
            batch = view.images[: self.batch_size], view.labels[: self.batch_size]
            changes = gradient_change(apply, params, state, *batch, view.setting["rate"])
            inputs, _ = distributions.last_inputs(apply, ACTIVATIONS[network], params, state, view.images)
            return {
                "batch_loss": scores.cross_entropy(apply, params, state, *batch),
                "change": jnp.exp(jnp.log(changes["change"]).mean()),
                "cosine": changes["cosine"].mean(),
                **distributions.summary(inputs[:, : self.units]),
            }

        return probe

    def measure(self, lab: lab.Lab) -> None:
        for network in self.networks:
            steps, points = self.budget(network)
            common: dict[str, Any] = {"steps": steps, "batch_size": self.batch_size}
            each = {arm: build(lab.dataset, network, arm != "plain", self.weight_std) for arm in ARMS}
            grid, every = GRIDS[network], max(1, steps // 25)
            rate = {
                arm: lab.tune(f"{network}, {arm}", each[arm], grid, eval_every=every, **common).rate for arm in ARMS
            }
            for arm in ARMS:
                lab.train(
                    f"{network}, {arm}",
                    each[arm],
                    (rate["plain"], rate[arm]),
                    eval_every=curves.log_spaced(steps, points),
                    probe=self._probe(each[arm].apply, network),
                    **common,
                )

    def _series(self, metrics, network, rate):
        """By arm, its learning rate and its series."""
        best = {arm: lab.chosen(metrics, f"{network}, {arm}") for arm in ARMS}
        used = {arm: best["plain" if rate == RATES[0] else arm].rate for arm in ARMS}
        return {arm: (used[arm], metrics[lab.at(f"{network}, {arm}", used[arm])]) for arm in ARMS}

    def _measured(self, metrics, series):
        """By measure, the value of each seed."""
        levels = np.multiply(curves.LEVELS, np.log(metrics.classes))
        return {
            "drift": distributions.drift(series.steps, series["median"], series["spread"]),
            "change": np.exp(curves.at_losses(series["batch_loss"], np.log(series["change"]), levels)),
            "cosine": curves.at_losses(series["batch_loss"], series["cosine"], levels),
        }

    def judge(self, metrics: runs.Metrics) -> study.Finding:
        effects, remarks, found = {}, {}, {}
        rows = [["network, rate", "arm", "learning rate", *MEASURES]]
        for network, rate in product(self.networks, RATES):
            for arm, (used, series) in self._series(metrics, network, rate).items():
                values = self._measured(metrics, series)
                found[network, rate, arm] = values
                words = [records.spread(values[measure], ".3g", "never") for measure in MEASURES]
                rows.append([f"{network}, {rate}", arm, f"{used:g}", *words])
        for part in self.PARTS:
            network, rate, measure = part.name.split(", ")
            if network not in self.networks:
                effects[part.name] = np.full(self.seeds, np.nan)
                continue
            plain, normalized = (found[network, rate, arm][measure] for arm in ARMS)
            effects[part.name] = plain / normalized if part.kind == "ratio" else normalized - plain
            edges = [lab.chosen(metrics, f"{network}, {arm}").edge for arm in (ARMS if rate == RATES[1] else ARMS[:1])]
            remarks[part.name] = "; ".join(filter(None, edges))
        said = []
        for network in self.networks:
            plain, same = (found[network, RATES[0], arm] for arm in ARMS)
            own = found[network, RATES[1], ARMS[1]]
            drifts, changes = ([records.spread(x[name], ".2g") for x in (plain, same, own)] for name in [*MEASURES][:2])
            said.append(
                f"{NETWORKS[network]}: drift {drifts[0]} standard deviations plain, {drifts[1]} with batch "
                f"normalization at the same rate; the update of the layers before it changes a layer's gradient by "
                f"{changes[0]} of its norm plain, by {changes[1]} with batch normalization at the same rate, by "
                f"{changes[2]} at its own best rate"
            )
        return study.Finding(
            effects,
            f"{'. '.join(said)}.",
            "The input of a unit of the last hidden layer, and the change of gradients against the loss",
            rows,
            remarks,
        )

    def draw(self, path, metrics, title):
        with plot.figure(path, title, panels=1 + len(self.networks)) as panels:
            series = {arm: each for arm, (_, each) in self._series(metrics, self.networks[0], RATES[0]).items()}
            for arm, each in series.items():
                # Only of the first seed: units of different seeds have nothing in common.
                median, spread = (each[name][0, :, 0] for name in ("median", "spread"))
                colour = plot.COLOURS[arm]
                panels[0].fill_between(each.steps, median - spread, median + spread, color=colour, alpha=0.25, lw=0)
                panels[0].plot(each.steps, median, color=colour, lw=2)
            panels[0].set(xlabel="training steps", ylabel="median, and 15th to 85th percentile, of an input")
            panels[0].set_title(f"{self.networks[0]}, same rate, one seed", fontsize=10)
            for axes, network in zip(panels[1:], self.networks, strict=True):
                levels = np.geomspace(1, curves.LEVELS[-1], 25)
                for rate, style in zip(RATES, ("-", "--"), strict=True):
                    for arm, (_, each) in self._series(metrics, network, rate).items():
                        if rate == RATES[1] and arm == "plain":
                            continue
                        changes = [
                            curves.at_losses(
                                each["batch_loss"], np.log(each["change"]), [level * np.log(metrics.classes)]
                            )
                            for level in levels
                        ]
                        mean = np.exp(np.ma.masked_invalid(changes).mean(1))
                        label = arm if arm == "plain" else f"{arm}, {rate}"
                        axes.plot(levels, mean, style, color=plot.COLOURS[arm], lw=2, label=label)
                axes.set(xscale="log", yscale="log", xlim=(1, levels[-1]), ylim=(0.05, 2))
                axes.set_xlabel("loss of the batch / log(classes)")
                axes.set_yticks((0.1, 0.2, 0.5, 1), ("0.1", "0.2", "0.5", "1"))
                axes.set_title(network, fontsize=10)
                plot.ticks(axes, (1, 0.75, 0.5, 0.25))
            panels[1].set_ylabel("relative change of a layer's gradient")
            panels[1].legend(frameon=False, fontsize=8)

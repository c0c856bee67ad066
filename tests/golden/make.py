"""Makes torch.npz and keras.npz beside this file: layers and networks trained a few steps in PyTorch and Keras.

    python tests/golden/make.py      # with torch 2.13.0 and keras 3 installed; they need not be for the tests

Inputs and initial weights of the large network are written down as a formula, `wave`, not as arrays.
"""

import itertools
import os
from pathlib import Path

import numpy as np

STEPS = 3
LAYERS = {
    "default": {},
    "no_affine": {"affine": False},
    "cumulative": {"momentum": None},
    "no_statistics": {"track_running_stats": False},
}
SIZES = (784, 256, 128, 10)


def wave(*shape: int, phase: float = 0.0) -> np.ndarray:
    """Numbers in [-1, 1] without a visible pattern."""
    index = np.arange(np.prod(shape), dtype=np.float64)
    return np.sin(index * 12.9898 + phase * 78.233 + np.sin(index)).reshape(shape).astype(np.float32)


def batch(step: int, shape: tuple[int, ...]) -> np.ndarray:
    return 2 + 3 * wave(*shape, phase=step + 1.0)


def torch_layers() -> dict[str, np.ndarray]:
    import torch

    out: dict[str, np.ndarray] = {}

    def keep(name, tensor):
        out[name] = tensor.detach().numpy().copy()

    for layer_name, options in LAYERS.items():
        layer = torch.nn.BatchNorm2d(3, **options)
        if layer.affine:
            with torch.no_grad():
                layer.weight.copy_(torch.tensor([0.5, -1.0, 2.0]))
                layer.bias.copy_(torch.tensor([0.1, 0.2, -0.3]))
        for key, value in layer.state_dict().items():
            keep(f"{layer_name}/before/{key}", value)
        optimizer = torch.optim.SGD(layer.parameters(), 0.1) if layer.affine else None
        for step in range(STEPS):
            x = torch.from_numpy(batch(step, (4, 3, 5, 6))).requires_grad_()
            layer.zero_grad()
            y = layer(x)
            y.backward(torch.from_numpy(wave(4, 3, 5, 6, phase=10.0 + step)))
            keep(f"{layer_name}/{step}/y", y)
            keep(f"{layer_name}/{step}/dx", x.grad)
            if optimizer:
                keep(f"{layer_name}/{step}/dweight", layer.weight.grad)
                keep(f"{layer_name}/{step}/dbias", layer.bias.grad)
                optimizer.step()
        for key, value in layer.state_dict().items():
            keep(f"{layer_name}/after/{key}", value)
        keep(f"{layer_name}/evaluation", layer.eval()(torch.from_numpy(batch(9, (4, 3, 5, 6)))))
    return out


def torch_network() -> dict[str, np.ndarray]:
    """784-256-128-10, a BatchNorm1d after each hidden Linear and before its ReLU."""
    import torch
    from torch import nn

    parts: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(SIZES)):
        linear = nn.Linear(fan_in, fan_out)
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(wave(fan_out, fan_in, phase=20.0 + i) / fan_in**0.5))
            linear.bias.zero_()
        parts += [linear] if i == 2 else [linear, nn.BatchNorm1d(fan_out), nn.ReLU()]
    network = nn.Sequential(*parts)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    labels = torch.arange(32) % 10
    losses = []
    for step in range(STEPS):
        loss = nn.functional.cross_entropy(network(torch.from_numpy(batch(step, (32, SIZES[0])))), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    out = {f"network/{k}": v.numpy().copy() for k, v in network.state_dict().items() if k.split(".")[0] in ("1", "4")}
    out["network/losses"] = np.array(losses)
    out["network/evaluation"] = network.eval()(torch.from_numpy(batch(9, (32, SIZES[0])))).detach().numpy()
    return out


def keras_network() -> dict[str, np.ndarray]:
    """Dense(64, relu), then BatchNormalization."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    network = keras.Sequential([keras.Input((20,)), keras.layers.Dense(64, activation="relu")])
    network.add(keras.layers.BatchNormalization())
    kernel = wave(20, 64, phase=30.0) / 20**0.5
    network.layers[0].set_weights([kernel, np.zeros(64, np.float32)])
    network.compile(optimizer=keras.optimizers.SGD(0.1), loss="mse")
    target = wave(32, 64, phase=31.0)
    losses = [float(network.train_on_batch(batch(step, (32, 20)), target)) for step in range(STEPS)]
    out = {f"after/{i}": w for i, w in enumerate(network.layers[1].get_weights())}
    out["losses"] = np.array(losses)
    out["evaluation"] = np.asarray(network(batch(9, (32, 20)), training=False))
    return out


if __name__ == "__main__":
    here = Path(__file__).parent
    np.savez_compressed(here / "torch.npz", **torch_layers(), **torch_network())
    np.savez_compressed(here / "keras.npz", **keras_network())

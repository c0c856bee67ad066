"""Arrays as PyTorch's tensors and back, bfloat16 included."""

import jax.numpy as jnp
import numpy as np
import torch


def tensor(array):
    array = np.asarray(array)
    if array.dtype == jnp.bfloat16:
        return torch.tensor(array.astype(np.float32)).bfloat16()
    return torch.tensor(array)


def array(tensor):
    if tensor is None:
        return None
    tensor = tensor.detach()
    return tensor.float().numpy().astype(jnp.bfloat16) if tensor.dtype == torch.bfloat16 else tensor.numpy().copy()

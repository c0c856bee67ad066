"""From training to serving.

    affine          a layer in evaluation as an affine map, and that map in a kernel
    neighbours      which linear layers and norms stand side by side in a traced model
    recalibration   population statistics for weights that no longer change

`fold_model` of `bnjax.linen` and `bnjax.nnx` is made of the first two.
"""

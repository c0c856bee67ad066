"""From training to serving.

    affine          a layer in evaluation as an affine map, and that map folded into a kernel
    neighbours      finds the linear layers and the norms that are adjacent in a traced model
    pairs           folds the norm of each pair of adjacent layers into the linear layer
    recalibration   recomputes the running statistics of weights that no longer change

`fold_model` of `bnjax.linen` and of `bnjax.nnx` is built on the first three.
"""

"""The mathematics of batch normalization on arrays.

    jax_internals   JAX APIs without a stability guarantee, and what runs without them
    records         the named tuples that functions take and return
    residuals       the `checkpoint_name` of the statistics, for policies of `jax.checkpoint`
    sharding        operands with equal shardings, under explicit sharding
    domains         sums over axes, or over the examples of each of several domains
    weights         masks, and means that leave masked elements out
    reductions      the two sums of the backward pass, with a lowering for CPU and for GPUs
    reading         how one part of a batch is read: its mean and variance
    merging         moments of parts of a batch, merged to the moments of the whole
    checks          errors for bad arguments
    collectives     arrays gathered or summed over named axes
    mesh_sums       moments of all devices of named mesh axes, in sums of fixed size
    moments         mean and variance of a batch, over devices too, with their derivative
    normalize       the formula, with its derivative
    schedules       numbers that may be functions of the number of updates
    running         the update of the running statistics by a batch's moments
    layer           `BatchNorm`, the options of a layer as one value, and the steps of a call
    apply           `bn_init` and `bn_apply`
    trees           the layers in the trees of a model's variables
    frozen          the layers whose parameters a training step leaves unchanged

Each module imports only from the modules above it.
"""

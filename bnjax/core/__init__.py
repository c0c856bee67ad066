"""The mathematics of batch normalization on arrays.

    jax_internals   what JAX does not promise to keep, and what runs without it
    records         the named tuples that functions take and return
    residuals       the name of the statistics, by which a policy of `jax.checkpoint` saves them
    sharding        operands sharded alike, under explicit sharding
    domains         sums over axes, or over the examples of each of several domains
    weights         masks, and means that masked elements cannot enter
    reductions      the two sums of the backward pass, with a lowering for CPU and for GPUs
    reading         how one part of a batch is read: its mean and variance
    merging         moments of parts of a batch, merged to those of the whole
    checks          errors for bad arguments
    collectives     arrays gathered or summed over named axes
    mesh_sums       moments of all devices of named mesh axes, in sums of fixed size
    moments         mean and variance of a batch, over devices too, with their derivative
    normalize       the formula, with its derivative
    schedules       numbers that may be functions of the number of updates
    running         the update of the running statistics by a batch's moments
    layer           `BatchNorm`, the options of a layer as one value, and the way of x through its steps
    apply           `bn_init` and `bn_apply`
    trees           the layers in the trees of a model's variables
    frozen          the layers whose parameters a training step leaves as they are

Each module imports only from the modules above it.
"""

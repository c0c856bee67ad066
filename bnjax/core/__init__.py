"""The mathematics of batch normalization on arrays.

    jax_internals   what JAX does not promise to keep, and what runs without it
    records         the named tuples that functions take and return
    checkpoint      the name that `jax.checkpoint` knows the statistics by
    sharding        operands sharded alike, under explicit sharding
    domains         sums over axes, or over the examples of each of several domains
    weights         masks, and sums that masked elements cannot enter
    reductions      the two sums of the backward pass, with a lowering for CPU and for GPUs
    array_moments   mean and variance of one array, by one read of it
    checks          errors for bad arguments
    collectives     arrays gathered or summed over named axes
    moments         mean and variance of a batch, over devices too, with their derivative
    normalize       the formula, with its derivative
    options         the options that all calls share, checked and hashable
    schedules       numbers that may be functions of the number of updates
    running         the update of the running statistics by a batch's moments
    apply           `bn_apply`: validate, choose statistics, normalize, update
    trees           the layers in the trees of a model's variables
    frozen          the layers whose parameters a training step leaves as they are

Each module imports only from the modules above it.
"""

"""The mathematics of batch normalization on arrays, from the bottom up.

    jax_internals   what JAX does not promise, and what runs where it is missing
    reductions      the two sums that batch normalization is made of, by primitives
    array_moments   mean and variance of one array, by one read of it
    moments         mean and variance merged, over devices too, with their derivative
    normalize       the formula, with its derivative
    schedules       momentum as a function of the number of updates
    checks          errors for bad arguments
    apply           the layer as a function: checks, statistics, formula, update
    trees           the layers in the trees of a model's variables
    deprecation     old names

Each imports only from those above it.
"""

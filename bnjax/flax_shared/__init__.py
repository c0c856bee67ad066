"""Code shared by the Linen and the NNX layers.

    flax_internals  Flax APIs without a stability guarantee
    bridge          whether a Linen model collects moments, also through the NNX layers in it
    conventions     Flax's rules for axes, masks and dtypes around the pure functions
    conversion      the changes that `convert` makes to layers
    found           what `convert` finds in a model, and reports of layers that it leaves out

These modules hold no variables. Only `flax_internals` and `bridge` know Linen and NNX, because both meet there.
"""

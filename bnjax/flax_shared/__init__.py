"""Code shared by the Linen and the NNX layers.

    conventions   Flax's rules for axes, masks and dtypes around the pure functions
    conversion    the changes that `convert` makes to layers
    bridge        whether a Linen model collects moments, also through the NNX layers in it

These modules hold no variables. Only `bridge` knows Linen and NNX, since both meet there.
"""

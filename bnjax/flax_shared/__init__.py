"""Code shared by the Linen and the NNX layers.

    bridge        whether a Linen model collects moments, also through the NNX layers in it
    conventions   Flax's rules for axes, masks and dtypes around the pure functions
    conversion    the changes that `convert` makes to layers
    found         what `convert` finds in a model, and says of what it leaves

These modules hold no variables. Only `bridge` knows Linen and NNX, since both meet there.
"""

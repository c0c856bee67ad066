"""Code shared by the Linen and the NNX layers.

    conventions   Flax's rules for axes, masks and dtypes around the pure functions
    conversion    the changes that `convert` makes to layers

These modules hold no variables, and use neither Linen nor NNX.
"""

"""Code shared by the Linen and the NNX layers.

    conventions   Flax's rules for axes, masks and dtypes around the pure functions
    conversion    the changes that `convert` makes to layers
    found         what `convert` finds in a model, and says of what it leaves

These modules hold no variables, and use neither Linen nor NNX.
"""

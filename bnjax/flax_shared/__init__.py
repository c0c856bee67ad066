"""What the Linen and the NNX layers share.

    conventions   Flax's rules for axes, masks and dtypes around the pure functions
    conversion    the changes that `convert` takes

They hold no variables and know neither Linen nor NNX.
"""

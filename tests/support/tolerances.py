"""How close results have to be, and why."""

import numpy as np

EPS = np.finfo(np.float32).eps
# The number of roundings that may add up on the way to one result, each of relative size EPS / 2.
FACTOR = 8
# Float32 results of well-scaled data against float64.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}

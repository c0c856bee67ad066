"""Batch normalization for JAX: pure functions, exact on one device or many. See README.md."""

from bnjax import interop as interop
from bnjax.array_moments import Moments as Moments
from bnjax.diagnostics import Diagnosis as Diagnosis
from bnjax.diagnostics import diagnose as diagnose
from bnjax.functional import BNParams as BNParams
from bnjax.functional import BNState as BNState
from bnjax.functional import bn_apply as bn_apply
from bnjax.functional import bn_init as bn_init
from bnjax.inference import Affine as Affine
from bnjax.inference import fold as fold
from bnjax.inference import fold_into_next as fold_into_next
from bnjax.inference import fold_into_previous as fold_into_previous
from bnjax.inference import recalibrate as recalibrate
from bnjax.moments import batch_moments as batch_moments
from bnjax.moments import merge as merge
from bnjax.momentum import cumulative_average as cumulative_average
from bnjax.momentum import debiased as debiased
from bnjax.recurrent import BNLSTMCarry as BNLSTMCarry
from bnjax.recurrent import BNLSTMParams as BNLSTMParams
from bnjax.recurrent import BNLSTMState as BNLSTMState
from bnjax.recurrent import bn_lstm_apply as bn_lstm_apply
from bnjax.recurrent import bn_lstm_carry as bn_lstm_carry
from bnjax.recurrent import bn_lstm_init as bn_lstm_init
from bnjax.variants import RENORM_D_MAX as RENORM_D_MAX
from bnjax.variants import RENORM_R_MAX as RENORM_R_MAX
from bnjax.variants import conditional_params as conditional_params
from bnjax.variants import ghost_bn_apply as ghost_bn_apply
from bnjax.variants import indexed_bn_apply as indexed_bn_apply
from bnjax.variants import indexed_bn_init as indexed_bn_init
from bnjax.variants import ramp as ramp
from bnjax.variants import renorm_bn_apply as renorm_bn_apply

__version__ = "0.1.0"

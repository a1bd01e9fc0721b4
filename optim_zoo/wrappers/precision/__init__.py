"""Training in low precision without losing small steps.

A bfloat16 number has 8 significant bits, so that a step below 1/256 of a parameter is rounded away.
`master_weights` keeps float32 parameters in the state. `stochastic_rounding` rounds at random, so
that small steps arrive on average. `store_state` stores parts of the state in low precision.
"""

from optim_zoo.wrappers.precision.masters import MasterWeightsState, master_weights
from optim_zoo.wrappers.precision.rounding import (
    StochasticRoundingState,
    round_stochastically,
    stochastic_rounding,
)
from optim_zoo.wrappers.precision.storage import StoreStateState, store_state

__all__ = [
    "MasterWeightsState",
    "StochasticRoundingState",
    "StoreStateState",
    "master_weights",
    "round_stochastically",
    "stochastic_rounding",
    "store_state",
]

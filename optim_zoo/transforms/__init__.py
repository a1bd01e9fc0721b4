"""The small pure pieces that optimizers are chains of, one idea in each file."""

from optim_zoo.transforms.adadelta import ScaleByAdadeltaState, scale_by_adadelta
from optim_zoo.transforms.adagrad import ScaleByAdagradState, scale_by_adagrad
from optim_zoo.transforms.adam import (
    ScaleByLazyAdamState,
    ScaleByUncorrectedAdamState,
    scale_by_adam,
    scale_by_lazy_adam,
)
from optim_zoo.transforms.amsgrad import (
    ScaleByAmsgradState,
    ScaleByUncorrectedAmsgradState,
    scale_by_amsgrad,
)
from optim_zoo.transforms.centralization import CentralizeGradientsState, centralize_gradients
from optim_zoo.transforms.clipping import ClipByGlobalNormState, clip_by_global_norm
from optim_zoo.transforms.factors import ScaleByRulesState, scale_by_rules
from optim_zoo.transforms.lars import scale_by_lars_trust_ratio
from optim_zoo.transforms.layerwise import ScaleByLarsTrustRatioState, ScaleByTrustRatioState
from optim_zoo.transforms.leaf_by_leaf import chain_leaf_by_leaf
from optim_zoo.transforms.learning_rate import (
    ScaleByLearningRateState,
    cast_like_params,
    scale_by_learning_rate,
)
from optim_zoo.transforms.moments import ScaleByAdamState
from optim_zoo.transforms.momentum import (
    TraceMomentumEmaState,
    TraceMomentumState,
    TraceNesterovMomentumState,
    trace_momentum,
)
from optim_zoo.transforms.nadam import (
    ScaleByNadamState,
    ScaleByScheduledNadamState,
    scale_by_nadam,
    scale_by_scheduled_nadam,
)
from optim_zoo.transforms.radam import ScaleByRadamState, scale_by_radam
from optim_zoo.transforms.rms import ScaleByRmsState, scale_by_rms
from optim_zoo.transforms.trust_ratio import scale_by_trust_ratio
from optim_zoo.transforms.weight_decay import AddDecayedWeightsState, add_decayed_weights

__all__ = [
    "AddDecayedWeightsState",
    "CentralizeGradientsState",
    "ClipByGlobalNormState",
    "ScaleByAdadeltaState",
    "ScaleByAdagradState",
    "ScaleByAdamState",
    "ScaleByAmsgradState",
    "ScaleByLarsTrustRatioState",
    "ScaleByLazyAdamState",
    "ScaleByLearningRateState",
    "ScaleByNadamState",
    "ScaleByRadamState",
    "ScaleByRmsState",
    "ScaleByRulesState",
    "ScaleByScheduledNadamState",
    "ScaleByTrustRatioState",
    "ScaleByUncorrectedAdamState",
    "ScaleByUncorrectedAmsgradState",
    "TraceMomentumEmaState",
    "TraceMomentumState",
    "TraceNesterovMomentumState",
    "add_decayed_weights",
    "cast_like_params",
    "centralize_gradients",
    "chain_leaf_by_leaf",
    "clip_by_global_norm",
    "scale_by_adadelta",
    "scale_by_adagrad",
    "scale_by_adam",
    "scale_by_amsgrad",
    "scale_by_lars_trust_ratio",
    "scale_by_lazy_adam",
    "scale_by_learning_rate",
    "scale_by_nadam",
    "scale_by_radam",
    "scale_by_rms",
    "scale_by_rules",
    "scale_by_scheduled_nadam",
    "scale_by_trust_ratio",
    "trace_momentum",
]

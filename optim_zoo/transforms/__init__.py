"""The small pure pieces that optimizers are chains of, one idea a file."""

from optim_zoo.transforms.adam import ScaleByAdamState, scale_by_adam
from optim_zoo.transforms.clipping import ClipByGlobalNormState, clip_by_global_norm
from optim_zoo.transforms.learning_rate import ScaleByLearningRateState, scale_by_learning_rate
from optim_zoo.transforms.trust_ratio import ScaleByTrustRatioState, scale_by_trust_ratio
from optim_zoo.transforms.weight_decay import add_decayed_weights

__all__ = [
    "ClipByGlobalNormState",
    "ScaleByAdamState",
    "ScaleByLearningRateState",
    "ScaleByTrustRatioState",
    "add_decayed_weights",
    "clip_by_global_norm",
    "scale_by_adam",
    "scale_by_learning_rate",
    "scale_by_trust_ratio",
]

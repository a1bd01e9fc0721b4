"""The optimizers, one paper a file, each a chain of pieces from `optim_zoo.transforms`."""

from optim_zoo.optimizers.adadelta import adadelta
from optim_zoo.optimizers.adagrad import adagrad
from optim_zoo.optimizers.adam import adam
from optim_zoo.optimizers.adamw import adamw
from optim_zoo.optimizers.amsgrad import amsgrad
from optim_zoo.optimizers.bert_adamw import bert_adamw
from optim_zoo.optimizers.lamb import lamb
from optim_zoo.optimizers.lars import lars
from optim_zoo.optimizers.lars_ema import lars_ema
from optim_zoo.optimizers.layerwise_adaptive import layerwise_adaptive
from optim_zoo.optimizers.lazy_adam import lazy_adam
from optim_zoo.optimizers.lookahead import lookahead
from optim_zoo.optimizers.momentum import momentum
from optim_zoo.optimizers.nadam import nadam
from optim_zoo.optimizers.nesterov import nesterov
from optim_zoo.optimizers.radam import radam
from optim_zoo.optimizers.ranger import ranger
from optim_zoo.optimizers.rmsprop import rmsprop
from optim_zoo.optimizers.sgd import sgd

__all__ = [
    "adadelta",
    "adagrad",
    "adam",
    "adamw",
    "amsgrad",
    "bert_adamw",
    "lamb",
    "lars",
    "lars_ema",
    "layerwise_adaptive",
    "lazy_adam",
    "lookahead",
    "momentum",
    "nadam",
    "nesterov",
    "radam",
    "ranger",
    "rmsprop",
    "sgd",
]

"""The public optimizers and pieces, and a description of each optimizer.

`optim_zoo` re-exports the optimizers and pieces that this file names in ``__all__``. An optimizer
also has an `Entry`, from which ``optim-zoo list`` and ``show``, configs and shared tests find it.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType

import optax

from optim_zoo import ranges
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
from optim_zoo.transforms.adadelta import scale_by_adadelta
from optim_zoo.transforms.adagrad import scale_by_adagrad
from optim_zoo.transforms.adam import scale_by_adam, scale_by_lazy_adam
from optim_zoo.transforms.amsgrad import scale_by_amsgrad
from optim_zoo.transforms.centralization import centralize_gradients
from optim_zoo.transforms.clipping import clip_by_global_norm
from optim_zoo.transforms.factors import scale_by_rules
from optim_zoo.transforms.lars import scale_by_lars_trust_ratio
from optim_zoo.transforms.leaf_by_leaf import chain_leaf_by_leaf
from optim_zoo.transforms.learning_rate import cast_like_params, scale_by_learning_rate
from optim_zoo.transforms.momentum import trace_momentum
from optim_zoo.transforms.nadam import scale_by_nadam, scale_by_scheduled_nadam
from optim_zoo.transforms.radam import scale_by_radam
from optim_zoo.transforms.rms import scale_by_rms
from optim_zoo.transforms.trust_ratio import scale_by_trust_ratio
from optim_zoo.transforms.weight_decay import add_decayed_weights

# `optim_zoo` does not re-export `Entry`, `OPTIMIZERS` and `get`. Type checkers need literals.
__all__ = [
    "adadelta",
    "adagrad",
    "adam",
    "adamw",
    "add_decayed_weights",
    "amsgrad",
    "bert_adamw",
    "cast_like_params",
    "centralize_gradients",
    "chain_leaf_by_leaf",
    "clip_by_global_norm",
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
    "sgd",
    "trace_momentum",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """Describes an optimizer of the library.

    Attributes:
      constructor: The function that makes the optimizer.
      description: One line about it, without a period.
      paper: The arXiv number, or the publication where there is none.
      variant: Which of the variants in use it is, and whose code it follows.
      example: An expression that makes one, where ``optim_zoo`` is imported.
      wraps: Whether its first argument is another transformation, not the learning rate.
    """

    constructor: Callable[..., optax.GradientTransformation]
    description: str
    paper: str
    variant: str
    example: str
    wraps: bool = False

    @property
    def name(self) -> str:
        """The name of the constructor, such as ``lamb``."""
        return self.constructor.__name__

    @property
    def formula(self) -> str:
        """The formula in the docstring of the constructor, as lines of text."""
        _, _, rest = (inspect.getdoc(self.constructor) or "").partition("::\n\n")
        lines = []
        for line in rest.splitlines():
            if line and not line.startswith(" "):
                break
            lines.append(line)
        return inspect.cleandoc("\n".join(lines))


_ENTRIES = (
    Entry(
        constructor=adadelta,
        description=(
            "steps in the units of the parameters, from averages of past gradients and steps"
        ),
        paper="arXiv 1212.5701",
        variant="with a learning rate; the formula of torch, Keras, TensorFlow and optax",
        example="optim_zoo.adadelta(1.0)",
    ),
    Entry(
        constructor=adagrad,
        description="divides by the root of the sum of all squared gradients",
        paper="Duchi, Hazan and Singer, JMLR 12, 2011",
        variant="eps under the root, sum of squares starting at 0.1, as in optax and Keras",
        example="optim_zoo.adagrad(0.01)",
    ),
    Entry(
        constructor=adam,
        description="divides the mean of recent gradients by the root of their mean square",
        paper="arXiv 1412.6980",
        variant="eps added to the corrected root, as in torch and optax",
        example="optim_zoo.adam(1e-3)",
    ),
    Entry(
        constructor=adamw,
        description="Adam with decoupled weight decay",
        paper="arXiv 1711.05101",
        variant="weight decay multiplied by the learning rate, as in optax and torch",
        example="optim_zoo.adamw(1e-3, weight_decay=0.1, exclude_from_weight_decay=[r'bias$'])",
    ),
    Entry(
        constructor=amsgrad,
        description="Adam with a second moment that never decreases",
        paper="arXiv 1904.09237",
        variant="maximum of the uncorrected second moment, corrected afterwards, as in torch",
        example="optim_zoo.amsgrad(1e-3)",
    ),
    Entry(
        constructor=bert_adamw,
        description="AdamW without bias correction, as BERT was trained",
        paper="arXiv 1810.04805",
        variant="AdamWeightDecayOptimizer of google-research/bert",
        example="optim_zoo.bert_adamw(1e-4)",
    ),
    Entry(
        constructor=lamb,
        description="AdamW's direction scaled to the norm of each layer, for large batches",
        paper="arXiv 1904.00962",
        variant="Algorithm 2 of version 5, with bias correction, as in optax",
        example="optim_zoo.lamb(1e-3, weight_decay=0.01)",
    ),
    Entry(
        constructor=lars,
        description="momentum on gradients scaled to the norm of each layer, for large batches",
        paper="arXiv 1708.03888",
        variant=(
            "norm of the raw gradient, learning rate inside momentum, "
            "as in tensorflow/tpu and MLPerf"
        ),
        example="optim_zoo.lars(1.0, weight_decay=1e-4, exclude_from_layer_adaptation=[r'bias$'])",
    ),
    Entry(
        constructor=lars_ema,
        description="a moving average of gradients scaled to the norm of each layer",
        paper="arXiv 1904.00962",
        variant="Algorithm 1: trust ratio after the moving average, without a coefficient",
        example="optim_zoo.lars_ema(0.01, weight_decay=0.01)",
    ),
    Entry(
        constructor=layerwise_adaptive,
        description="the direction of any base scaled to the norm of each layer",
        paper="arXiv 1904.00962",
        variant="the general strategy of section 3",
        example="optim_zoo.layerwise_adaptive(optim_zoo.scale_by_adam(), 1e-3)",
        wraps=True,
    ),
    Entry(
        constructor=lazy_adam,
        description="Adam on only those rows of a table that have a gradient",
        paper="arXiv 1412.6980",
        variant="eps as in adam; the variants of TensorFlow Addons and torch are ports",
        example="optim_zoo.lazy_adam(1e-3)",
    ),
    Entry(
        constructor=lookahead,
        description="slow weights that follow an inner optimizer, which restarts from them",
        paper="arXiv 1907.08610",
        variant="slow weights that start as the parameters, as in the paper's code for torch",
        example="optim_zoo.lookahead(optim_zoo.adam(1e-3))",
        wraps=True,
    ),
    Entry(
        constructor=momentum,
        description="gradient descent along an average of the gradients",
        paper="Polyak, USSR Comput. Math. Math. Phys. 4, 1964",
        variant="heavy ball or moving average; learning rate after it, as in TensorFlow 1",
        example="optim_zoo.momentum(0.1, 0.9)",
    ),
    Entry(
        constructor=nadam,
        description="Adam with Nesterov's momentum",
        paper="Dozat, ICLR workshop 2016",
        variant="without a schedule of the momentum, as in optax",
        example="optim_zoo.nadam(2e-3)",
    ),
    Entry(
        constructor=nesterov,
        description="gradient descent that takes the gradient one step ahead of its momentum",
        paper="Nesterov, Soviet Math. Dokl. 27, 1983",
        variant=(
            "the parameters are the point ahead; learning rate after the momentum, "
            "as in TensorFlow 1"
        ),
        example="optim_zoo.nesterov(0.1, 0.9)",
    ),
    Entry(
        constructor=radam,
        description="Adam with rectified steps while its second moments hold few gradients",
        paper="arXiv 1908.03265",
        variant="threshold 5, only momentum below it, eps added to the corrected root, as in optax",
        example="optim_zoo.radam(1e-3)",
    ),
    Entry(
        constructor=ranger,
        description="RAdam inside Lookahead, optionally with gradient centralization",
        paper="arXiv 1908.03265 and 1907.08610",
        variant=(
            "eps added to the corrected root, as in TensorFlow Addons' Lookahead(RectifiedAdam)"
        ),
        example="optim_zoo.ranger(1e-3, gradient_centralization=True)",
    ),
    Entry(
        constructor=rmsprop,
        description="divides by the root of the mean square of recent gradients",
        paper="Tieleman and Hinton, Coursera lecture 6.5, 2012",
        variant="eps under the root, learning rate inside the momentum, as in optax and Keras",
        example="optim_zoo.rmsprop(1e-3)",
    ),
    Entry(
        constructor=sgd,
        description="gradient descent, plain or with momentum",
        paper="Robbins and Monro, Ann. Math. Stat. 22, 1951",
        variant="first step without dampening, learning rate after the momentum, as in torch",
        example="optim_zoo.sgd(0.1, momentum=0.9, nesterov=True)",
    ),
)

OPTIMIZERS: Mapping[str, Entry] = MappingProxyType({entry.name: entry for entry in _ENTRIES})


def get(name: str) -> Entry:
    """Returns the entry of an optimizer.

    Args:
      name: The name of its constructor, such as ``"lamb"``.

    Returns:
      Its description, paper, variant, example and constructor.

    Raises:
      ArgumentValueError: No optimizer has this name. The message lists the nearest names.

    Example:
      ```python
      tx = optim_zoo.registry.get("lamb").constructor(1e-3)
      ```
    """
    ranges.check_choice("optimizer", name, OPTIMIZERS, argument="name")
    return OPTIMIZERS[name]

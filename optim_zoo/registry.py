"""The optimizers by name, with what each of them is and what proves it."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import optax

from optim_zoo import optimizers, ranges


@dataclasses.dataclass(frozen=True)
class Proof:
    """A recorded trajectory that an optimizer follows under arguments of its own.

    Beside these it follows every recorded case that names it itself.
    """

    case: str  # the id of the case
    arguments: Mapping[str, Any]  # in the form of `recorded.Case.arguments`


@dataclasses.dataclass(frozen=True)
class Entry:
    """An optimizer of the zoo."""

    name: str
    constructor: Callable[..., optax.GradientTransformation]
    description: str  # one line
    paper: str  # arXiv number, or where there is none the publication
    variant: str  # which of the variants in use it is, and the code it agrees with
    example: str  # an expression that makes one
    proofs: tuple[Proof, ...] = ()
    wraps: bool = False  # its first argument is another transformation, not the learning rate

    @property
    def formula(self) -> str:
        """The formula in the docstring of the constructor, without its indentation."""
        _, _, rest = (inspect.getdoc(self.constructor) or "").partition("::\n\n")
        lines = []
        for line in rest.splitlines():
            if line and not line.startswith(" "):
                break
            lines.append(line)
        return inspect.cleandoc("\n".join(lines))


_RATE = {"learning_rate": 0.01}
_ADAM = {**_RATE, "b1": 0.9, "b2": 0.999, "eps": 1e-8}
_BERT = {**_RATE, "b1": 0.9, "b2": 0.999, "eps": 1e-6, "weight_decay": 0.01}
_UNDECAYED = {"exclude_from_weight_decay": ("dense/bias", "layer_norm/scale")}
_EXCLUDED = {**_UNDECAYED, "exclude_from_layer_adaptation": ("dense/bias", "layer_norm/scale")}
_HEAVY_BALL = {"learning_rate": 0.05, "momentum": 0.9}
_LARS = {"learning_rate": 2.0, "momentum": 0.9, "weight_decay": 0.001, "trust_coefficient": 0.001}

_ENTRIES = (
    Entry(
        "adadelta",
        optimizers.adadelta,
        "steps in the units of the parameters, from averages of past gradients and steps",
        "arXiv 1212.5701",
        "with a learning rate; torch, Keras, TensorFlow and optax agree",
        "optim_zoo.adadelta(1.0)",
        (
            Proof("torch_adadelta", {"learning_rate": 1.0, "rho": 0.9, "eps": 1e-6}),
            Proof("keras_adadelta_lr1", {"learning_rate": 1.0, "rho": 0.9, "eps": 1e-6}),
        ),
    ),
    Entry(
        "adagrad",
        optimizers.adagrad,
        "divides by the root of the sum of all squared gradients",
        "Duchi, Hazan and Singer, JMLR 12, 2011",
        "eps inside the root, accumulator from 0.1, as optax and Keras",
        "optim_zoo.adagrad(0.01)",
        (Proof("keras_adagrad", {"learning_rate": 0.05}),),
    ),
    Entry(
        "adam",
        optimizers.adam,
        "divides the mean of recent gradients by the root of their mean square",
        "arXiv 1412.6980",
        "eps beside the corrected root, as torch and optax",
        "optim_zoo.adam(1e-3)",
        (
            Proof("torch_adam", _ADAM),
            Proof("bert_adamw_wd0", {**_ADAM, "eps": 1e-6, "bias_correction": False}),
        ),
    ),
    Entry(
        "adamw",
        optimizers.adamw,
        "Adam with decoupled weight decay",
        "arXiv 1711.05101",
        "decay times learning rate, as optax and torch",
        "optim_zoo.adamw(1e-3, weight_decay=0.1, exclude_from_weight_decay=[r'bias$'])",
        (Proof("torch_adamw_excl", {**_ADAM, "weight_decay": 0.01, **_UNDECAYED}),),
    ),
    Entry(
        "amsgrad",
        optimizers.amsgrad,
        "Adam whose second moment never falls",
        "arXiv 1904.09237",
        "maximum of the uncorrected second moment, corrected afterwards, as torch",
        "optim_zoo.amsgrad(1e-3)",
        (Proof("torch_adam_amsgrad", _ADAM),),
    ),
    Entry(
        "bert_adamw",
        optimizers.bert_adamw,
        "AdamW without bias correction, as BERT was trained",
        "arXiv 1810.04805",
        "AdamWeightDecayOptimizer of google-research/bert",
        "optim_zoo.bert_adamw(1e-4)",
        (
            Proof("bert_adamw", {**_BERT, "exclude_from_weight_decay": ()}),
            Proof("bert_adamw_excl", {**_BERT, **_UNDECAYED}),
            Proof("mac_adamw_excl", {**_BERT, **_UNDECAYED}),
        ),
    ),
    Entry(
        "lamb",
        optimizers.lamb,
        "AdamW's direction scaled to the norm of each layer, for large batches",
        "arXiv 1904.00962",
        "Algorithm 2 of version 5, bias correction on, as optax",
        "optim_zoo.lamb(1e-3, weight_decay=0.01)",
        (Proof("ymcui_lamb_excl", {**_BERT, **_UNDECAYED, "bias_correction": False}),),
    ),
    Entry(
        "lars",
        optimizers.lars,
        "momentum on gradients scaled to the norm of each layer, for large batches",
        "arXiv 1708.03888",
        "norm of the raw gradient, learning rate inside the momentum, as tensorflow/tpu and MLPerf",
        "optim_zoo.lars(1.0, weight_decay=1e-4, exclude_from_layer_adaptation=[r'bias$'])",
        (
            Proof("tpu_lars", _LARS),
            Proof("tpu_lars_excl_nesterov", {**_LARS, **_EXCLUDED, "nesterov": True}),
            Proof("mlperf_tf1_lars", _LARS),
        ),
    ),
    Entry(
        "lars_ema",
        optimizers.lars_ema,
        "a moving average of gradients scaled to the norm of each layer",
        "arXiv 1904.00962",
        "Algorithm 1: ratio behind the average, no coefficient",
        "optim_zoo.lars_ema(0.01, weight_decay=0.01)",
    ),
    Entry(
        "layerwise_adaptive",
        optimizers.layerwise_adaptive,
        "the direction of any base scaled to the norm of each layer",
        "arXiv 1904.00962",
        "the general strategy of section 3",
        "optim_zoo.layerwise_adaptive(optim_zoo.scale_by_adam(), 1e-3)",
        (
            Proof(
                "paper_lamb_wd0",
                {
                    "base": {
                        "constructor": "optim_zoo.scale_by_adam",
                        "arguments": {"b1": 0.9, "b2": 0.999, "eps": 1e-6},
                    },
                    **_RATE,
                },
            ),
            Proof(
                "paper_lars_wd0",
                {
                    "base": {
                        "constructor": "optim_zoo.trace_momentum",
                        "arguments": {"decay": 0.9, "ema": True},
                    },
                    **_RATE,
                },
            ),
        ),
        wraps=True,
    ),
    Entry(
        "lazy_adam",
        optimizers.lazy_adam,
        "Adam on the rows of a table that a batch touched",
        "arXiv 1412.6980",
        "eps as in adam; TensorFlow Addons' and torch's are among the ports",
        "optim_zoo.lazy_adam(1e-3)",
        (Proof("torch_adam", _ADAM),),
    ),
    Entry(
        "lookahead",
        optimizers.lookahead,
        "slow weights follow those of an inner optimizer, which goes back to them",
        "arXiv 1907.08610",
        "slow weights start as the parameters, as the paper's code for torch",
        "optim_zoo.lookahead(optim_zoo.adam(1e-3))",
        (
            Proof(
                "po_lookahead_sgd",
                {
                    "inner": {"constructor": "optim_zoo.sgd", "arguments": _HEAVY_BALL},
                    "sync_period": 3,
                    "slow_step_size": 0.5,
                },
            ),
            Proof(
                "mrz_torch_lookahead_sgd",
                {
                    "inner": {"constructor": "optim_zoo.sgd", "arguments": _HEAVY_BALL},
                    "sync_period": 5,
                    "slow_step_size": 0.8,
                },
            ),
        ),
        wraps=True,
    ),
    Entry(
        "momentum",
        optimizers.momentum,
        "gradient descent along an average of the gradients",
        "Polyak, USSR Comput. Math. Math. Phys. 4, 1964",
        "heavy ball, or moving average; learning rate outside, as TensorFlow 1",
        "optim_zoo.momentum(0.1, 0.9)",
        (Proof("tf1_momentum", {"learning_rate": 0.0625, "momentum": 0.75}),),
    ),
    Entry(
        "nadam",
        optimizers.nadam,
        "Adam with Nesterov's momentum",
        "Dozat, ICLR workshop 2016",
        "without a schedule of the momentum, as optax",
        "optim_zoo.nadam(2e-3)",
    ),
    Entry(
        "nesterov",
        optimizers.nesterov,
        "gradient descent that looks one step ahead along its momentum",
        "Nesterov, Soviet Math. Dokl. 27, 1983",
        "the parameters are the point looked ahead to; learning rate outside, as TensorFlow 1",
        "optim_zoo.nesterov(0.1, 0.9)",
        (Proof("tf1_nesterov", {"learning_rate": 0.0625, "momentum": 0.75}),),
    ),
    Entry(
        "radam",
        optimizers.radam,
        "Adam with a factor for the few gradients its first second moments hold",
        "arXiv 1908.03265",
        "threshold 5, momentum alone below it, eps beside the corrected root, as optax",
        "optim_zoo.radam(1e-3)",
    ),
    Entry(
        "ranger",
        optimizers.ranger,
        "RAdam inside Lookahead, gradient centralization by choice",
        "arXiv 1908.03265 and 1907.08610",
        "eps beside the corrected root, as TensorFlow Addons' Lookahead(RectifiedAdam)",
        "optim_zoo.ranger(1e-3, gradient_centralization=True)",
        (
            Proof(
                "tfa_ranger",
                {"learning_rate": 0.0078125, "b1": 0.875, "b2": 0.984375, "eps": 1e-7},
            ),
        ),
    ),
    Entry(
        "rmsprop",
        optimizers.rmsprop,
        "divides by the root of the mean square of recent gradients",
        "Tieleman and Hinton, Coursera lecture 6.5, 2012",
        "eps inside the root, learning rate inside the momentum, as optax and Keras",
        "optim_zoo.rmsprop(1e-3)",
        (
            Proof(
                "keras_rmsprop_momentum",
                {**_RATE, "decay": 0.9, "momentum": 0.9, "eps": 1e-6},
            ),
            Proof(
                "tf1_rmsprop_centered",
                {
                    "learning_rate": 0.0078125,
                    "decay": 0.875,
                    "momentum": 0.75,
                    "eps": 9.5367431640625e-07,
                    "centered": True,
                    "initial_scale": 1.0,
                },
            ),
        ),
    ),
    Entry(
        "sgd",
        optimizers.sgd,
        "gradient descent, plain or with momentum",
        "Robbins and Monro, Ann. Math. Stat. 22, 1951",
        "first step undampened, learning rate outside the momentum, as torch",
        "optim_zoo.sgd(0.1, momentum=0.9, nesterov=True)",
        (
            Proof("torch_sgd", {"learning_rate": 0.05}),
            Proof("torch_sgd_momentum", _HEAVY_BALL),
            Proof("torch_sgd_momentum_sched", {**_HEAVY_BALL, "learning_rate": "per_step/lr"}),
            Proof("torch_sgd_dampening", {**_HEAVY_BALL, "dampening": 0.3}),
        ),
    ),
)

OPTIMIZERS: Mapping[str, Entry] = MappingProxyType({entry.name: entry for entry in _ENTRIES})


def get(name: str) -> Entry:
    """The entry of ``name``.

    Raises:
      ArgumentValueError: there is none; the nearest names are listed.
    """
    ranges.check_choice("optimizer", name, OPTIMIZERS, argument="name")
    return OPTIMIZERS[name]

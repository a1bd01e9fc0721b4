"""The recorded trajectories that optimizers of the zoo follow, and with which arguments.

A recorded case names one constructor, usually a port. A proof compares an optimizer of the zoo
with the same numbers under its own arguments. An optimizer does not need a proof: a recorded case
may name it, and ``tests/reference`` holds an independent implementation of every optimizer.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any


@dataclasses.dataclass(frozen=True)
class Proof:
    """A recorded case, and the arguments with which an optimizer follows it."""

    case: str  # the id of the case
    arguments: Mapping[str, Any]  # in the form of `recorded.Case.arguments`


_RATE = {"learning_rate": 0.01}
_ADAM = {**_RATE, "b1": 0.9, "b2": 0.999, "eps": 1e-8}
_BERT = {**_RATE, "b1": 0.9, "b2": 0.999, "eps": 1e-6, "weight_decay": 0.01}
_UNDECAYED = {"exclude_from_weight_decay": ("dense/bias", "layer_norm/scale")}
_EXCLUDED = {**_UNDECAYED, "exclude_from_layer_adaptation": ("dense/bias", "layer_norm/scale")}
_HEAVY_BALL = {"learning_rate": 0.05, "momentum": 0.9}
_LARS = {"learning_rate": 2.0, "momentum": 0.9, "weight_decay": 0.001, "trust_coefficient": 0.001}

PROOFS: Mapping[str, tuple[Proof, ...]] = MappingProxyType(
    {
        "adadelta": (
            Proof("torch_adadelta", {"learning_rate": 1.0, "rho": 0.9, "eps": 1e-6}),
            Proof("keras_adadelta_lr1", {"learning_rate": 1.0, "rho": 0.9, "eps": 1e-6}),
        ),
        "adagrad": (Proof("keras_adagrad", {"learning_rate": 0.05}),),
        "adam": (
            Proof("torch_adam", _ADAM),
            Proof("bert_adamw_wd0", {**_ADAM, "eps": 1e-6, "bias_correction": False}),
        ),
        "adamw": (Proof("torch_adamw_excl", {**_ADAM, "weight_decay": 0.01, **_UNDECAYED}),),
        "amsgrad": (Proof("torch_adam_amsgrad", _ADAM),),
        "bert_adamw": (
            Proof("bert_adamw", {**_BERT, "exclude_from_weight_decay": ()}),
            Proof("bert_adamw_excl", {**_BERT, **_UNDECAYED}),
            Proof("mac_adamw_excl", {**_BERT, **_UNDECAYED}),
        ),
        "lamb": (Proof("ymcui_lamb_excl", {**_BERT, **_UNDECAYED, "bias_correction": False}),),
        "lars": (
            Proof("tpu_lars", _LARS),
            Proof("tpu_lars_excl_nesterov", {**_LARS, **_EXCLUDED, "nesterov": True}),
            Proof("mlperf_tf1_lars", _LARS),
        ),
        "layerwise_adaptive": (
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
        "lazy_adam": (Proof("torch_adam", _ADAM),),
        "lookahead": (
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
        "momentum": (Proof("tf1_momentum", {"learning_rate": 0.0625, "momentum": 0.75}),),
        "nesterov": (Proof("tf1_nesterov", {"learning_rate": 0.0625, "momentum": 0.75}),),
        "ranger": (
            Proof(
                "tfa_ranger",
                {"learning_rate": 0.0078125, "b1": 0.875, "b2": 0.984375, "eps": 1e-7},
            ),
        ),
        "rmsprop": (
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
        "sgd": (
            Proof("torch_sgd", {"learning_rate": 0.05}),
            Proof("torch_sgd_momentum", _HEAVY_BALL),
            Proof("torch_sgd_momentum_sched", {**_HEAVY_BALL, "learning_rate": "per_step/lr"}),
            Proof("torch_sgd_dampening", {**_HEAVY_BALL, "dampening": 0.3}),
        ),
    }
)
"""The proofs, keyed by the name of the optimizer."""

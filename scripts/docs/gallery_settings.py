"""Which sources of an optimizer the gallery compares with one another, and under which arguments.

The recorded cases named here were all fed the same parameters and gradients. A setting gives the
hyperparameters that its sources share. A source that was recorded under other hyperparameters is
run again through its port, which follows its recording to the tolerance of the case.
"""

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from optim_zoo import catalogue, recorded, verify

# What the sources call an argument of this library.
SYNONYMS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "learning_rate": ("lr",),
        "b1": ("beta_1", "beta1"),
        "b2": ("beta_2", "beta2"),
        "eps": ("epsilon",),
        "weight_decay": ("weight_decay_rate",),
        "decay": ("alpha", "rho"),
        "slow_step_size": ("alpha", "la_alpha"),
        "sync_period": ("k", "la_steps"),
        "nesterov": ("use_nesterov",),
        "trust_coefficient": ("trust_coeff", "eeta"),
        "exclude_from_weight_decay": ("skip_list",),
    }
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """Hyperparameters, and one recorded case of each source that is compared under them."""

    hyperparameters: Mapping[str, Any]  # under the names of this library
    cases: tuple[str, ...]
    inner: Mapping[str, Any] | None = None  # what Lookahead wraps, as in `recorded.Case.inner`
    note: str = ""  # what a reader has to know about the table, as a sentence


@dataclasses.dataclass(frozen=True)
class Source:
    """One source under the hyperparameters of a setting."""

    label: str  # whose code, and its version
    case: recorded.Case  # with the arguments of the setting
    from_recording: bool  # the case was recorded with exactly these arguments


def sources(setting: Setting) -> list[Source]:
    """Returns the sources of a setting, each with the arguments of the setting."""
    return [_source(recorded.get(case), setting) for case in setting.cases]


def _source(case: recorded.Case, setting: Setting) -> Source:
    arguments = _with(setting.hyperparameters, case.arguments, _function(case.constructor))
    inner = case.inner
    if inner is not None and setting.inner is not None and not _same(inner, setting.inner):
        inner = setting.inner
    elif inner is not None:
        function = _function(inner["constructor"])
        changed = _with(setting.hyperparameters, inner["arguments"], function)
        inner = {"constructor": inner["constructor"], "arguments": changed}
    changed_case = dataclasses.replace(case, arguments=arguments, inner=inner)
    unchanged = changed_case == case
    if not unchanged:
        changed_case = dataclasses.replace(changed_case, dtype="float64")
    return Source(_label(case), changed_case, unchanged)


def _label(case: recorded.Case) -> str:
    """Returns ``timm 1.0.31 Lamb``, for example.

    The class is left out where the constructor is this library's own.
    """
    source = verify.short_reference(case.reference)
    if case.origin == "transcribed" and "arXiv" in case.reference:
        return f"{source} (transcribed)"
    if not case.constructor.startswith("optim_zoo.ports."):
        return source
    return f"{source} {catalogue.short_name(case.constructor).rpartition('.')[2]}"


def _with(
    wanted: Mapping[str, Any], arguments: Mapping[str, Any], function: Callable[..., Any]
) -> dict[str, Any]:
    """Returns the arguments with the wanted hyperparameters, under the names of the function."""
    parameters = inspect.signature(function).parameters
    changed = dict(arguments)
    betas = [wanted.get("b1"), wanted.get("b2")]
    if "betas" in parameters and None not in betas:
        changed["betas"] = betas
    for name, value in wanted.items():
        here = next((n for n in (name, *SYNONYMS.get(name, ())) if n in parameters), None)
        if here is None:
            continue
        given = changed.get(here, parameters[here].default)
        if given != value and not (not given and not value):
            changed[here] = value
    return changed


def _same(inner: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Returns whether two inner optimizers are the same, whatever library their names are from."""
    return _plain(inner) == _plain(other)


def _plain(inner: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    ours = {theirs: name for name, names in SYNONYMS.items() for theirs in names}
    arguments = {ours.get(k, k): v for k, v in inner["arguments"].items() if v}
    return inner["constructor"].rpartition(".")[2].lower(), arguments


def _function(constructor: str) -> Callable[..., Any]:
    module, name = constructor.rsplit(".", 1)
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def described(hyperparameters: Mapping[str, Any]) -> str:
    """Returns the hyperparameters as a caption shows them: ``b1=0.9, b2=0.999``."""
    shown = {k: ", ".join(v) if isinstance(v, Sequence) else v for k, v in hyperparameters.items()}
    return ", ".join(f"`{key}={value}`" for key, value in shown.items())


_ADAM = {"learning_rate": 0.01, "b1": 0.9, "b2": 0.999, "eps": 1e-8}
_LAMB = {"learning_rate": 0.01, "b1": 0.9, "b2": 0.999, "eps": 1e-6, "weight_decay": 0.01}
_UNDECAYED = {"exclude_from_weight_decay": ["dense/bias", "layer_norm/scale"]}
_HEAVY_BALL = {"learning_rate": 0.05, "momentum": 0.9}
_DEFAULTS = "Every other argument has its source's default."

SETTINGS: Mapping[str, tuple[Setting, ...]] = MappingProxyType(
    {
        "adadelta": (
            Setting(
                hyperparameters={"learning_rate": 1.0, "rho": 0.9, "eps": 1e-6},
                cases=("torch_adadelta", "keras_adadelta_lr1", "optax_adadelta", "tf1_adadelta"),
            ),
        ),
        "adagrad": (
            Setting(
                hyperparameters={
                    "learning_rate": 0.05,
                    "initial_accumulator_value": 0.1,
                    "eps": 1e-7,
                },
                cases=("keras_adagrad", "optax_adagrad", "torch_adagrad", "tf1_adagrad"),
                note=(
                    "By default torch starts the accumulator at 0 and the others at 0.1. "
                    "TensorFlow 1 has no eps."
                ),
            ),
        ),
        "adam": (
            Setting(
                hyperparameters=_ADAM,
                cases=("torch_adam", "keras_adam", "tf1_adam"),
                note=(
                    "The same number `eps` is added to the corrected root in torch and to the "
                    "uncorrected root in Keras and TensorFlow 1."
                ),
            ),
        ),
        "adamw": (
            Setting(
                hyperparameters={**_ADAM, "weight_decay": 0.01, **_UNDECAYED},
                cases=(
                    *("optax_adamw", "torch_adamw_excl", "keras_adamw_excl", "tfa_adamw_excl"),
                    "bert_adamw_excl",
                ),
                note=(
                    "TensorFlow Addons does not multiply the weight decay by the learning rate; "
                    "BERT's class has no bias correction."
                ),
            ),
        ),
        "amsgrad": (
            Setting(hyperparameters=_ADAM, cases=("torch_adam_amsgrad", "keras_adam_amsgrad")),
        ),
        "bert_adamw": (
            Setting(
                hyperparameters={**_LAMB, **_UNDECAYED},
                cases=("bert_adamw_excl", "mac_adamw_excl", "torch_adamw_excl"),
                note="torch's AdamW corrects the bias of the moments and the others do not.",
            ),
        ),
        "lamb": (
            Setting(
                hyperparameters=_LAMB,
                cases=(
                    *("optax_lamb", "paper_lamb_wd", "algoeff_torch_lamb", "tfa_lamb_f32_defaults"),
                    *("keras_lamb_wd", "apex_fusedlamb_default", "timm_lamb", "albert_lamb"),
                    *("ymcui_lamb", "dle_tf_txl_lamb", "dle_txl_lamb", "po_lamb"),
                ),
                note=f"All leaves are decayed. {_DEFAULTS}",
            ),
            Setting(
                hyperparameters={**_LAMB, **_UNDECAYED},
                cases=(
                    *("optax_lamb_excl", "algoeff_torch_lamb_excl", "dle_tf_bert_lamb"),
                    *("tfa_lamb_excl", "apex_fusedlamb_excl", "timm_lamb_excl"),
                    *("albert_lamb_excl", "mlperf_bert_lamb", "ymcui_lamb_excl"),
                ),
                note=(
                    "Two of six leaves are excluded from weight decay, in the way that each source "
                    "offers; some of them then also lose their trust ratio. timm runs without its "
                    "clipping of gradients here."
                ),
            ),
        ),
        "lars": (
            Setting(
                hyperparameters={
                    "learning_rate": 2.0,
                    "momentum": 0.9,
                    "weight_decay": 0.001,
                    "trust_coefficient": 0.001,
                    "exclude_from_weight_decay": [],
                },
                cases=("tpu_lars", "mlperf_tf1_lars", "classic_lars", "po_lars", "timm_lars"),
                note=_DEFAULTS,
            ),
        ),
        "lazy_adam": (
            Setting(
                hyperparameters=_ADAM,
                cases=("torch_sparseadam", "tfa_lazyadam", "tfk_adam_sparse"),
                note=(
                    "The gradients are rows of tables. tf_keras decays the moments of all rows and "
                    "moves all of them; the others touch only the rows that have a gradient."
                ),
            ),
        ),
        "lookahead": (
            Setting(
                hyperparameters={"sync_period": 3, "slow_step_size": 0.5},
                inner={
                    "constructor": "optim_zoo.ports.torch.SGD",
                    "arguments": {"lr": 0.05, "momentum": 0.9},
                },
                cases=(
                    *("optax_lookahead_sgd", "po_lookahead_sgd", "mrz_torch_lookahead_sgd"),
                    *("tfa_lookahead_sgd_k3", "timm_lookahead_adam_k3", "lifeiteng_lookahead"),
                    "mrz_tf_lookahead",
                ),
                note="All of them wrap torch's SGD with learning rate 0.05 and momentum 0.9.",
            ),
        ),
        "momentum": (
            Setting(
                hyperparameters=_HEAVY_BALL,
                cases=("tf1_momentum", "torch_sgd_momentum", "keras_momentum"),
                note="With a constant learning rate all of them compute the same.",
            ),
            Setting(
                hyperparameters={"momentum": 0.9},
                cases=("torch_sgd_momentum_sched", "keras_momentum_sched"),
                note=(
                    "The learning rate changes from step to step. Keras has it inside the "
                    "momentum and torch outside."
                ),
            ),
        ),
        "nadam": (
            Setting(
                hyperparameters={**_ADAM, "weight_decay": 0.0},
                cases=(
                    *("optax_nadam", "torch_nadam", "keras_nadam", "tfk_nadam"),
                    *("timm_nadam_legacy", "timm_nadamw"),
                ),
                note="All but optax raise the momentum by a schedule of their own.",
            ),
        ),
        "nesterov": (
            Setting(
                hyperparameters={**_HEAVY_BALL, "nesterov": True, "weight_decay": 0},
                cases=("tf1_nesterov", "torch_sgd_nesterov", "keras_nesterov"),
            ),
        ),
        "radam": (
            Setting(
                hyperparameters={**_ADAM, "weight_decay": 0.0},
                cases=(
                    *("optax_radam", "torch_radam", "tfa_radam", "lifeiteng_radam_f64"),
                    *("timm_radam_legacy", "po_radam"),
                ),
            ),
        ),
        "ranger": (
            Setting(
                hyperparameters={
                    "learning_rate": 0.01,
                    "b1": 0.95,
                    "b2": 0.999,
                    "eps": 1e-5,
                    "sync_period": 4,
                    "slow_step_size": 0.5,
                    "weight_decay": 0.0,
                },
                cases=("tfa_ranger", "po_ranger", "jyhengcoder_ranger"),
            ),
        ),
        "rmsprop": (
            Setting(
                hyperparameters={
                    "learning_rate": 0.01,
                    "decay": 0.9,
                    "eps": 1e-8,
                    "momentum": 0.0,
                },
                cases=(
                    *("optax_rmsprop", "keras_rmsprop", "tf1_rmsprop", "timm_rmsprop_tf"),
                    "torch_rmsprop",
                ),
                note=(
                    "torch adds eps to the root and the others add it inside; TensorFlow 1 and "
                    "timm start the average at 1 and the others at 0."
                ),
            ),
            Setting(
                hyperparameters={
                    "learning_rate": 0.01,
                    "decay": 0.9,
                    "eps": 1e-6,
                    "momentum": 0.9,
                },
                cases=(
                    *("optax_rmsprop", "keras_rmsprop_momentum", "tf1_rmsprop"),
                    *("timm_rmsprop_tf", "torch_rmsprop_momentum"),
                ),
            ),
        ),
        "sgd": (
            Setting(hyperparameters={"learning_rate": 0.05}, cases=("torch_sgd", "keras_sgd")),
            Setting(
                hyperparameters=_HEAVY_BALL,
                cases=("torch_sgd_momentum", "keras_momentum", "tf1_momentum"),
            ),
        ),
    }
)

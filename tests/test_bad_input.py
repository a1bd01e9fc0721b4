"""Tests that bad input raises at once and that the message says what was expected and received."""

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optim_zoo as oz
from optim_zoo import SparseRows, centralize_gradients, ports, registry
from tests import pieces

Row = tuple[str, Callable[[], Any], type[Exception], str]

NAN, INF = float("nan"), float("inf")


def _tree(**changed: Any) -> Any:
    tree = {"dense": {"kernel": np.ones((3, 2)), "bias": np.ones(2)}, "embed": np.ones((5, 2))}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree) | changed


PARAMS = _tree()
WIDER = _tree(dense={"kernel": jnp.ones((3, 3)), "bias": jnp.ones(2)})
SPARSE = _tree(embed=SparseRows(np.asarray([1, 2]), np.ones((2, 2), np.float32), 5))


def _update(tx: optax.GradientTransformation, grads: Any, *params: Any) -> Any:
    return tx.update(grads, tx.init(PARAMS), *params)


def _make(name: str, **arguments: Any) -> optax.GradientTransformation:
    """Makes an optimizer of the registry; a wrapper gets a transformation to wrap."""
    constructor = registry.OPTIMIZERS[name].constructor
    takes = inspect.signature(constructor).parameters
    if "learning_rate" in takes:
        arguments = {"learning_rate": 0.1, **arguments}
    if not registry.OPTIMIZERS[name].wraps:
        return constructor(**arguments)
    inner = oz.scale_by_adam() if "learning_rate" in takes else oz.sgd(0.1)
    return constructor(inner, **arguments)


def _takes(name: str, *arguments: str) -> list[str]:
    takes = inspect.signature(registry.OPTIMIZERS[name].constructor).parameters
    return [argument for argument in arguments if argument in takes]


# Hyperparameters of every optimizer.


def _numbers() -> Iterator[Row]:
    expected = r"must be in \[0, inf\), got "
    decay = r"must be in \[0, 1\), got "
    for name in registry.OPTIMIZERS:
        for argument in _takes(name, "learning_rate"):
            for value in (-1, NAN, INF, np.float32(-1), jnp.asarray(-1.0)):
                yield (
                    f"{name}-{argument}-{value!r}",
                    lambda name=name, value=value: _make(name, learning_rate=value),
                    ValueError,
                    f"^learning_rate {expected}{value}$",
                )
            for value in (None, "1e-3", True, [0.1]):
                yield (
                    f"{name}-{argument}-{value!r}",
                    lambda name=name, value=value: _make(name, learning_rate=value),
                    TypeError,
                    rf"^learning_rate must be a number in .*, got {re.escape(repr(value))}$",
                )
        for argument in _takes(name, "b1", "b2", "decay", "momentum", "rho"):
            for value in (-0.1, 1.0, 1.5, NAN):
                yield (
                    f"{name}-{argument}-{value}",
                    lambda name=name, a=argument, value=value: _make(name, **{a: value}),
                    ValueError,
                    f"^{argument} {decay}{value}$",
                )
            yield (
                f"{name}-{argument}-rounded",
                lambda name=name, a=argument: _make(name, **{a: jnp.bfloat16(0.999)}),
                TypeError,
                f"^{argument} must be float32 or wider, got bfloat16, which rounds it",
            )
        for argument in _takes(name, "eps", "weight_decay"):
            yield (
                f"{name}-{argument}-negative",
                lambda name=name, a=argument: _make(name, **{a: -1e-3}),
                ValueError,
                rf"^{argument} must be in [\[(]0, inf\), got -0.001$",
            )
        for argument in _takes(name, "phi_bounds", "ratio_bounds"):
            for value, message in (
                ((2.0, 1.0), r"have low <= high, got \(2.0, 1.0\)"),
                ((-1.0, 2.0), r"be in \[0, inf\], got -1.0"),
                ((NAN, None), r"be in \[0, inf\], got nan"),
            ):
                yield (
                    f"{name}-{argument}-{value}",
                    lambda name=name, a=argument, value=value: _make(name, **{a: value}),
                    ValueError,
                    f"^{argument} must {message}$",
                )
            for value in (1.0, (1.0,), (1.0, 2.0, 3.0), "ab"):
                yield (
                    f"{name}-{argument}-{value}",
                    lambda name=name, a=argument, value=value: _make(name, **{a: value}),
                    TypeError,
                    rf"^{argument} must be a pair \(low, high\).*, got {re.escape(repr(value))}$",
                )


# Trees of every optimizer.


def _trees() -> Iterator[Row]:
    for name in registry.OPTIMIZERS:
        yield (
            f"{name}-shape",
            lambda name=name: _update(_make(name), WIDER, PARAMS),
            ValueError,
            r"gradient of dense/kernel has shape \(3, 3\), its parameter \(3, 2\)$",
        )
        yield (
            f"{name}-shape-that-broadcasts",
            lambda name=name: _update(_make(name), _tree(embed=jnp.ones((1, 1))), PARAMS),
            ValueError,
            r"gradient of embed has shape \(1, 1\), its parameter \(5, 2\)$",
        )
        for what, grads, path in (
            ("lacking", _tree(dense={"kernel": jnp.ones((3, 2))}), "dense/bias"),
            ("other", _tree(head=jnp.ones(2)), "head"),
            ("none", _tree(embed=None), "embed"),
            ("no", None, "dense/bias, dense/kernel, embed"),
        ):
            yield (
                f"{name}-{what}-leaf",
                lambda name=name, grads=grads: _update(_make(name), grads, PARAMS),
                ValueError,
                f"gradients must be a tree like the parameters; they differ at {path}$",
            )
        for dtype, advice in (
            ("int32", "leave it out with optax.masked"),
            ("complex64", "store the real and imaginary parts as separate arrays"),
        ):
            params = _tree(embed=jnp.ones((5, 2), dtype))
            yield (
                f"{name}-{dtype}",
                lambda name=name, params=params: _make(name).init(params),
                TypeError,
                f"^parameters must be floating-point, embed has dtype {dtype}: {advice}",
            )
            yield (
                f"{name}-{dtype}-gradient",
                lambda name=name, grads=params: _update(_make(name), grads, PARAMS),
                TypeError,
                f"gradients must be real and floating-point, that of embed has dtype {dtype}$",
            )
        for argument in _takes(name, "exclude_from_weight_decay", "exclude_from_layer_adaptation"):
            for what, value, error, message in (
                ("string", "bias", TypeError, r" must be a list .*, got the string 'bias'"),
                ("numbers", [3], TypeError, r" must be a list .*, got \[3\]$"),
                ("broken", ["("], ValueError, r": '\(' is not a regular expression: missing \)"),
                ("unmatched", ["kernle"], ValueError,
                 ": 'kernle' matches no leaf; the nearest paths are dense/kernel, dense/bias"),
            ):  # fmt: skip
                yield (
                    f"{name}-{argument}-{what}",
                    lambda name=name, a=argument, v=value: _make(name, **{a: v}).init(PARAMS),
                    error,
                    f"^{argument}{message}",
                )


# Pieces.


def _pieces() -> Iterator[Row]:
    for name in pieces.PIECES:
        declared = getattr(
            pieces.make(name), "leaf", None
        )  # None if it reads several leaves at once
        if declared and not declared.takes_rows:
            yield (
                f"{name}-sparse",
                lambda name=name: _update(pieces.make(name), SPARSE, PARAMS),
                TypeError,
                f"^{name} takes no SparseRows, which the gradient of embed is: use lazy_adam",
            )
        if declared and declared.params == "required":
            yield (
                f"{name}-without-parameters",
                lambda name=name: _update(pieces.make(name), PARAMS),
                ValueError,
                rf"^{name} needs the parameters: update\(grads, state, params\)$",
            )
    for name, needs in (
        ("adamw", "add_decayed_weights"),
        ("lamb", "add_decayed_weights"),
        ("lars", "scale_by_lars_trust_ratio"),
        ("layerwise_adaptive", "scale_by_trust_ratio"),
        ("lookahead", "lookahead"),
        ("ranger", "lookahead"),
    ):
        yield (
            f"{name}-without-parameters",
            lambda name=name: _update(_make(name), PARAMS),
            ValueError,
            f"^{needs} needs the parameters",
        )


SCHEDULE = oz.schedules.constant(0.1)
NO_MOMENTUM = "^nesterov needs a momentum above 0, got {}: set momentum"
TABLE: list[Row] = [
    *_numbers(),
    *_trees(),
    *_pieces(),
    # Momentum.
    ("sgd-nesterov", lambda: oz.sgd(0.1, nesterov=True), ValueError,
     NO_MOMENTUM.format(None)),
    ("nesterov-0", lambda: oz.nesterov(0.1, 0), ValueError, NO_MOMENTUM.format(0)),
    ("nesterov-array", lambda: oz.nesterov(0.1, jnp.asarray(0.0)), ValueError,
     NO_MOMENTUM.format(0)),
    ("rmsprop-nesterov", lambda: oz.rmsprop(0.1, nesterov=True), ValueError,
     NO_MOMENTUM.format(None)),
    ("lars-nesterov", lambda: oz.lars(0.1, 0.0, nesterov=True), ValueError,
     NO_MOMENTUM.format(0)),
    ("trace-nesterov", lambda: oz.trace_momentum(0.0, nesterov=True), ValueError,
     NO_MOMENTUM.format(0)),
    ("sgd-nesterov-dampening", lambda: oz.sgd(0.1, 0.9, True, 0.5), ValueError,
     "^nesterov cannot be combined with dampening, got 0.5"),
    ("trace-nesterov-ema", lambda: oz.trace_momentum(ema=True, nesterov=True), ValueError,
     "^nesterov cannot be combined with ema"),
    ("trace-ema-dampening", lambda: oz.trace_momentum(ema=True, dampening=0.5), ValueError,
     "^dampening cannot be combined with ema, got 0.5"),
    ("sgd-dampening", lambda: oz.sgd(0.1, 0.9, dampening=2), ValueError,
     r"^dampening must be in \[0, 1\], got 2"),
    # Lookahead and other wrappers.
    ("sync-0", lambda: oz.lookahead(oz.sgd(0.1), 0), ValueError,
     "^sync_period must be >= 1, got 0"),
    ("sync-2.5", lambda: oz.lookahead(oz.sgd(0.1), 2.5), TypeError,  # type: ignore[arg-type]
     "^sync_period must be a whole number >= 1, got 2.5"),
    ("sync-true", lambda: oz.lookahead(oz.sgd(0.1), True), TypeError,
     "^sync_period must be a whole number >= 1, got True"),
    ("sync-ranger", lambda: oz.ranger(0.1, sync_period=-1), ValueError, "^sync_period .*, got -1"),
    *((f"slow-{value}", lambda value=value: oz.lookahead(oz.sgd(0.1), 6, value), ValueError,
       rf"^slow_step_size must be in \(0, 1\], got {value}") for value in (0, 1.5, -1)),
    ("lookahead-3", lambda: oz.lookahead(3), TypeError,
     "^inner must be an optax.GradientTransformation, got 3"),
    ("lookahead-schedule", lambda: oz.lookahead(SCHEDULE), TypeError,
     "^inner must be an optax.GradientTransformation, got <function"),
    ("lookahead-constructor", lambda: oz.lookahead(oz.adam), TypeError,
     "^inner must be an optax.GradientTransformation, got <function adam"),
    ("layerwise-3", lambda: oz.layerwise_adaptive(3, 0.1), TypeError,
     "^base must be an optax.GradientTransformation, got 3"),
    ("layerwise-optimizer", lambda: oz.layerwise_adaptive(oz.adam(0.1), 0.1).init(PARAMS),
     ValueError, "^base must be a direction such as .*, got an optimizer"),
    ("layerwise-lookahead",
     lambda: oz.layerwise_adaptive(oz.lookahead(oz.adam(0.1)), 0.1).init(PARAMS),
     ValueError, "^base must be a direction such as .*, got an optimizer"),
    # Other numbers.
    ("radam-threshold", lambda: oz.radam(0.1, threshold=3.9), ValueError,
     r"^threshold must be in \[4, inf\], got 3.9"),
    ("ranger-threshold", lambda: oz.ranger(0.1, threshold=3), ValueError, "^threshold .* got 3"),
    ("adadelta-eps-0", lambda: oz.adadelta(0.1, eps=0), ValueError,
     r"^eps must be in \(0, inf\), got 0"),
    ("adagrad-accumulator", lambda: oz.adagrad(0.1, -1), ValueError,
     r"^initial_accumulator_value must be in \[0, inf\), got -1"),
    ("rmsprop-scale", lambda: oz.rmsprop(0.1, initial_scale=-1), ValueError,
     r"^initial_scale must be in \[0, inf\), got -1"),
    ("decay-none", lambda: oz.adamw(0.1, weight_decay=None), TypeError,  # type: ignore[arg-type]
     r"^weight_decay must be a number in \[0, inf\), got None"),
    ("decay-schedule", lambda: oz.adamw(0.1, weight_decay=SCHEDULE), TypeError,  # type: ignore[arg-type]
     r"^weight_decay must be a number in \[0, inf\), got <function"),
    ("trust-eps", lambda: oz.scale_by_trust_ratio(eps=INF), ValueError, r"^eps .*, got inf"),
    ("trust-coefficient", lambda: oz.lars(0.1, trust_coefficient=0), ValueError,
     r"^trust_coefficient must be in \(0, inf\), got 0"),
    ("clip-0", lambda: oz.clip_by_global_norm(0), ValueError, r"^max_norm .*, got 0"),
    ("clip-none", lambda: oz.clip_by_global_norm(None), TypeError,  # type: ignore[arg-type]
     r"^max_norm must be a number in \(0, inf\], got None"),
    ("rates", lambda: oz.adam(np.full(3, 0.1)), ValueError,
     r"^learning_rate must be one number, got an array of shape \(3,\)"),
    ("decay-rates", lambda: oz.adam(0.1, np.asarray([0.9, 0.8])), ValueError,
     r"^b1 must be one number, got an array of shape \(2,\)"),
    ("axis-2.5", lambda: centralize_gradients(2.5), TypeError,  # type: ignore[arg-type]
     "^output_axis must be a whole number, got 2.5"),
    ("axis-true", lambda: centralize_gradients(True), TypeError,
     "^output_axis must be a whole number, got True"),
    ("axis-5", lambda: centralize_gradients(5).init(PARAMS), ValueError,
     r"^output_axis must be an axis of every leaf, got 5: dense/kernel has shape \(3, 2\)"),
    # Layers.
    ("layers-3", lambda: oz.lamb(0.1, layers=[("kernel", 3)]), TypeError,
     r"^layers: the value of 'kernel' must be stacked\(axis\).*, got 3"),
    ("layers-dict", lambda: oz.lamb(0.1, layers={"kernel": oz.stacked(0)}), TypeError,  # type: ignore[arg-type]
     r"^layers must be a list of pairs \(path pattern, value\), got {'kernel'"),
    ("layers-unmatched", lambda: oz.lars(0.1, layers=[("kernle", oz.stacked(0))]).init(PARAMS),
     ValueError, "^layers: 'kernle' matches no leaf; the nearest paths are dense/kernel"),
    ("layers-parts", lambda: oz.lamb(0.1, layers=[("kernel", oz.split(0, 2))]).init(PARAMS),
     ValueError, "^layers: dense/kernel has 3 entries along axis 0, which do not divide into 2"),
    ("layers-axis", lambda: oz.lamb(0.1, layers=[("bias", oz.stacked(1))]).init(PARAMS),
     ValueError, r"^layers: dense/bias has shape \(2,\) and no axis 1"),
    # SparseRows.
    ("rows-of-another-table",
     lambda: _update(oz.lazy_adam(0.1), _tree(embed=SparseRows([1], np.ones((1, 2)), 6)), PARAMS),
     ValueError, r"gradient of embed has shape \(6, 2\), its parameter \(5, 2\)$"),
    ("rows-of-another-width",
     lambda: _update(oz.lazy_adam(0.1), _tree(embed=SparseRows([1], np.ones((1, 3)), 5)), PARAMS),
     ValueError, r"gradient of embed has shape \(5, 3\), its parameter \(5, 2\)$"),
    ("rows-applied-to-another-width",
     lambda: oz.apply_updates(PARAMS, _tree(embed=SparseRows([1], np.ones((1, 3)), 5))),
     ValueError,
     r"^apply_updates: the update of embed has shape \(5, 3\), its parameter \(5, 2\)$"),
    ("ids-too-large", lambda: SparseRows([1, 9], np.ones((2, 2)), 5), ValueError,
     r"ids must be in \[0, 5\], 5 being padding, got 9"),
    ("ids-negative", lambda: SparseRows([-1, 2], np.ones((2, 2)), 5), ValueError,
     r"ids must be in \[0, 5\], 5 being padding, got -1"),
    ("ids-float", lambda: SparseRows([1.0, 2.0], np.ones((2, 2)), 5), TypeError,
     "ids must be integers, got float64"),
    ("ids-2d", lambda: SparseRows([[1, 2]], np.ones((2, 2)), 5), ValueError,
     r"ids must have shape \(n,\) and rows \(n, ...\), got \(1, 2\) and \(2, 2\)"),
    ("ids-fewer-than-rows", lambda: SparseRows([1, 2], np.ones((3, 2)), 5), ValueError,
     r"ids must have shape \(n,\) and rows \(n, ...\), got \(2,\) and \(3, 2\)"),
    ("num-rows-negative", lambda: SparseRows([1, 2], np.ones((2, 2)), -5), ValueError,
     "num_rows must be .*, got -5"),
    ("num-rows-float", lambda: SparseRows([1, 2], np.ones((2, 2)), 5.0), TypeError,  # type: ignore[arg-type]
     "num_rows must be a whole number, got 5.0"),
    ("rows-scaled", lambda: _update(optax.scale(2.0), SPARSE), TypeError, "take SparseRows"),
    ("rows-under-a-schedule",
     lambda: _update(optax.scale_by_schedule(lambda step: 1.0), SPARSE), TypeError,
     "take SparseRows"),
    ("rows-in-stock-apply", lambda: optax.apply_updates(PARAMS, SPARSE), TypeError,
     "^SparseRows has no arithmetic: .* optim_zoo.apply_updates"),
    ("rows-in-lookahead", lambda: _update(oz.lookahead(oz.lazy_adam(0.1)), SPARSE, PARAMS),
     TypeError, "^lookahead takes no SparseRows, which the gradient of embed is"),
    # Ports: unsupported arguments, and errors that use the argument names of the source.
    ("torch-foreach", lambda: ports.torch.SGD(foreach=True), NotImplementedError,
     r"^torch.SGD of optim_zoo does not support foreach=True; .* default is None"),
    ("torch-fused", lambda: ports.torch.AdamW(fused=True), NotImplementedError, "fused=True"),
    ("torch-sparse-maximize", lambda: ports.torch.SparseAdam(maximize=True), NotImplementedError,
     "^torch.SparseAdam .* maximize=True"),
    ("tfa-lazy-amsgrad", lambda: ports.tensorflow_addons.LazyAdam(amsgrad=True),
     NotImplementedError, "^tensorflow_addons.LazyAdam .* amsgrad=True"),
    ("tfa-decay", lambda: ports.tensorflow_addons.SGDW(0.1, decay=0.1), NotImplementedError,
     "^tensorflow_addons.SGDW .* decay=0.1; .* default is 0.0"),
    ("tf1-use-locking", lambda: ports.tf1.AdamOptimizer(use_locking=True), NotImplementedError,
     "^tf1.AdamOptimizer .* use_locking=True"),
    ("keras-use-ema", lambda: ports.keras.Adam(use_ema=True), NotImplementedError,
     "^keras.Adam .* use_ema=True"),
    ("keras-unknown", lambda: ports.keras.Lamb(clip_norm=1), TypeError,
     "^keras.Lamb has no argument clip_norm; .* clipnorm"),
    ("tf-keras-unknown", lambda: ports.tf_keras.Nadam(clip_norm=1), TypeError,
     "^tf_keras.Nadam has no argument clip_norm; .* clipnorm"),
    ("tfa-unknown", lambda: ports.tensorflow_addons.LAMB(clip_norm=1), TypeError,
     "^tensorflow_addons.LAMB has no argument clip_norm; .* clipnorm"),
    ("bert-use-tpu", lambda: ports.bert.create_optimizer(0.1, 10, 2, True), NotImplementedError,
     "^bert.create_optimizer .* use_tpu=True"),
    ("apex-set-grad-none", lambda: ports.apex.FusedLAMB(set_grad_none=False), NotImplementedError,
     "^apex.FusedLAMB .* set_grad_none=False; .* default is True"),
    ("torch-lr", lambda: ports.torch.AdamW(lr=-1), ValueError,
     r"^lr must be in \[0, inf\), got -1"),
    ("timm-lr", lambda: ports.timm.Lamb(lr=None), TypeError,  # type: ignore[arg-type]
     "^lr must be a number .*, got None"),
    ("torch-betas", lambda: ports.torch.AdamW(betas=(0.9, 1.0)), ValueError,
     r"^betas\[1\] must be in \[0, 1\), got 1.0"),
    ("torch-beta", lambda: ports.torch.NAdam(betas=0.9), TypeError,  # type: ignore[arg-type]
     "^betas must be a pair of numbers, got 0.9"),
    ("apex-betas", lambda: ports.apex.FusedLAMB(1e-3, True, (0.9, 0.99, 0.999)), TypeError,  # type: ignore[arg-type]
     r"^betas must be a pair of numbers, got \(0.9, 0.99, 0.999\)"),
    ("lifeiteng-beta-1", lambda: ports.lifeiteng.RAdamOptimizer(beta_1=-1), ValueError,
     "^beta_1 must be in .*, got -1"),
    ("keras-rho", lambda: ports.keras.RMSprop(rho=1.0), ValueError, "^rho must be in .*, got 1.0"),
    ("keras-epsilon", lambda: ports.keras.Adam(epsilon=-1), ValueError, "^epsilon .*, got -1"),
    ("torch-momentum", lambda: ports.torch.RMSprop(momentum=None), TypeError,  # type: ignore[arg-type]
     "^momentum must be a number .*, got None"),
    ("torch-alpha", lambda: ports.torch.RMSprop(alpha=1.0), ValueError, "^alpha .*, got 1.0"),
    ("bert-decay", lambda: ports.bert.AdamWeightDecayOptimizer(0.1, -1), ValueError,
     "^weight_decay_rate must be in .*, got -1"),
    ("bert-init-lr", lambda: ports.bert.create_optimizer(-0.1, 10, 2), ValueError,
     "^init_lr must be in .*, got -0.1"),
    ("mlperf-eeta", lambda: ports.mlperf.LARSOptimizer(0.1, eeta=-1), ValueError,
     "^eeta must be in .*, got -1"),
    ("mlperf-skip-list", lambda: ports.mlperf.LARSOptimizer(0.1, skip_list="bias"), TypeError,
     "^skip_list must be a list of path patterns, got the string 'bias'"),
    ("tf1-use-nesterov", lambda: ports.tf1.MomentumOptimizer(0.1, 0.0, use_nesterov=True),
     ValueError, "^use_nesterov needs a momentum above 0, got 0"),
    ("tfa-total-steps", lambda: ports.tensorflow_addons.RectifiedAdam(total_steps=-1), ValueError,
     "^total_steps must be >= 0, got -1"),
    ("tfa-warmup", lambda: ports.tensorflow_addons.RectifiedAdam(-1.0, total_steps=9), ValueError,
     "^learning_rate must be in .*, got -1.0"),
    ("po-threshold", lambda: ports.pytorch_optimizer.RAdam(n_sma_threshold=3), ValueError,
     r"^n_sma_threshold must be in \[4, inf\], got 3"),
    ("timm-grad-norm", lambda: ports.timm.Lamb(max_grad_norm=-1), ValueError,
     "^max_grad_norm must be in .*, got -1"),
    ("timm-k", lambda: ports.timm.Lookahead(oz.sgd(0.1), k=0), ValueError,
     "^k must be >= 1, got 0"),
    ("po-k", lambda: ports.pytorch_optimizer.Lookahead(oz.sgd(0.1), k=0), ValueError,
     "^k must be >= 1, got 0"),
    ("po-ranger-alpha", lambda: ports.pytorch_optimizer.Ranger(alpha=2), ValueError,
     r"^alpha must be in \[0, 1\], got 2"),
    ("lifeiteng-alpha", lambda: ports.lifeiteng.LookaheadOptimizer(oz.sgd(0.1), alpha=2),
     ValueError, r"^alpha must be in \[0, 1\], got 2"),
    ("timm-base", lambda: ports.timm.Lookahead(3), TypeError,
     "^base_optimizer must be an optax.GradientTransformation, got 3"),
    ("mrz-pullback", lambda: ports.michaelrzhang.Lookahead(oz.sgd(0.1), pullback_momentum="x"),
     ValueError, "^unknown pullback_momentum 'x'; expected none, reset, pullback"),
    ("keras-decay-without-parameters",
     lambda: _update(ports.keras.SGD(weight_decay=0.1), PARAMS), ValueError,
     r"^weight decay needs the parameters: update\(grads, state, params\)"),
    ("keras-clipnorm-sparse", lambda: _update(ports.keras.SGD(clipnorm=1.0), SPARSE, PARAMS),
     TypeError, "^clipnorm takes no SparseRows, which the gradient of embed is"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "error", "message"), [pytest.param(*row, id=name) for name, *row in TABLE]
)
def test_bad_input_raises_a_helpful_error(
    call: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()


def test_the_rows_of_the_table_have_distinct_names() -> None:
    names = [name for name, *_ in TABLE]
    assert len(set(names)) == len(names) >= 60


# Ranges are not checked for traced arrays, because they have no value yet.


@pytest.mark.parametrize("name", registry.OPTIMIZERS)
def test_ranges_of_traced_hyperparameters_are_not_checked(name: str) -> None:
    """Traces each hyperparameter separately, with a value outside its range."""
    takes = inspect.signature(registry.OPTIMIZERS[name].constructor).parameters
    numbers = [k for k, p in takes.items() if isinstance(p.default, float) or k == "learning_rate"]
    assert numbers

    @jax.jit
    def make(value: jax.Array) -> Any:
        return [_make(name, **{number: value}).init(PARAMS) for number in numbers]

    make(-1.0)


@pytest.mark.parametrize(
    ("port", "names"),
    [
        (ports.torch.AdamW, ("lr", "eps", "weight_decay")),
        (ports.torch.RMSprop, ("lr", "alpha", "momentum")),
        (ports.keras.SGD, ("learning_rate", "momentum", "weight_decay")),
        (ports.keras.Lamb, ("learning_rate", "beta_1", "epsilon", "weight_decay")),
        (ports.timm.LaProp, ("lr", "eps", "weight_decay")),
        (ports.pytorch_optimizer.RAdam, ("lr", "eps", "weight_decay")),
        (ports.mlperf.LARSOptimizer, ("learning_rate", "momentum", "eeta", "epsilon")),
    ],
)
def test_ranges_of_traced_hyperparameters_of_ports_are_not_checked(
    port: Callable[..., Any], names: tuple[str, ...]
) -> None:
    @jax.jit
    def make(value: jax.Array) -> Any:
        return [port(**{names[0]: 0.1, name: value}).init(PARAMS) for name in names]

    make(-1.0)


def test_a_port_makes_the_same_chain_for_a_traced_zero() -> None:
    tx = optax.inject_hyperparams(ports.torch.RMSprop)(momentum=0.0, weight_decay=0.0)
    state = tx.init(PARAMS)
    updates, _ = jax.jit(tx.update)(PARAMS, state, PARAMS)
    plain = ports.torch.RMSprop()
    expected, _ = plain.update(PARAMS, plain.init(PARAMS), PARAMS)
    # 1 - alpha from a float32 array is off by 2e-6.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), updates, expected)


# Ports keep the names and arguments of their sources.


def test_ports_keep_their_signatures() -> None:
    assert list(inspect.signature(ports.nvidia.Lamb).parameters)[:2] == ["lr", "betas"]
    assert ports.torch.Adam.__module__ == "optim_zoo.ports.torch"
    with pytest.raises(TypeError, match="unexpected keyword argument 'learning_rate'"):
        ports.torch.Adam(learning_rate=0.1)


def _ports() -> Iterator[Callable[..., Any]]:
    for module in filter(inspect.ismodule, (getattr(ports, name) for name in ports.__all__)):
        for name, value in vars(module).items():
            own = inspect.isfunction(value) and value.__module__ == module.__name__
            if own and (name[0].isupper() or name == "create_optimizer"):
                yield value


@pytest.mark.parametrize(
    ("port", "name"),
    [
        pytest.param(port, name, id=f"{port.__module__.rpartition('.')[2]}-{port.__name__}")
        for port in _ports()
        for name in inspect.signature(port).parameters
        if name in ("learning_rate", "lr", "init_lr")
    ],
)
def test_ports_use_the_names_of_their_sources(port: Callable[..., Any], name: str) -> None:
    """An error about the learning rate uses the argument name of the port."""
    takes = inspect.signature(port).parameters
    # Arguments that some ports require.
    others = {"weight_decay": 0.1, "momentum": 0.9, "num_train_steps": 9, "num_warmup_steps": 2}
    arguments = {k: v for k, v in others.items() if k in takes}
    with pytest.raises(ValueError, match=rf"^{name} must be in \[0, inf\), got -2.0$"):
        port(**arguments, **{name: -2.0})

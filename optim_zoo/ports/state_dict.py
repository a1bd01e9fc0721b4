"""Carries a running torch job over: its ``state_dict`` becomes the state of a port."""

import warnings
from typing import Any

import jax.numpy as jnp
import optax

from optim_zoo import ranges
from optim_zoo.errors import ArgumentValueError
from optim_zoo.optimizers.lookahead import LookaheadState
from optim_zoo.ports._decay import DecayState, ScheduledDecayState
from optim_zoo.ports._laprop import LaPropState
from optim_zoo.ports._pieces import ScaleByAdamEpsilonHatState
from optim_zoo.ports._states import COUNTS, map_pieces
from optim_zoo.ports._torch_moments import TorchMoments
from optim_zoo.ports.param_groups import (
    Names,
    StateDict,
    from_param_groups,
)
from optim_zoo.transforms import (
    ScaleByAdadeltaState,
    ScaleByAdagradState,
    ScaleByAdamState,
    ScaleByAmsgradState,
    ScaleByLazyAdamState,
    ScaleByLearningRateState,
    ScaleByNadamState,
    ScaleByRadamState,
    ScaleByRmsState,
    ScaleByScheduledNadamState,
    ScaleByUncorrectedAdamState,
    ScaleByUncorrectedAmsgradState,
    TraceMomentumEmaState,
    TraceMomentumState,
    TraceNesterovMomentumState,
)
from optim_zoo.tree import Tree

Fields = dict[str, tuple[str, ...]]

# The names that the fields of our states have in torch, timm, pytorch_optimizer and Apex.
_MOMENTS: Fields = {"mu": ("exp_avg",), "nu": ("exp_avg_sq",)}
_LARGEST_MOMENTS: Fields = {**_MOMENTS, "nu_max": ("max_exp_avg_sq",)}
_MOMENTUM: Fields = {"momentum": ("momentum_buffer",)}
_FIELDS: dict[type, Fields] = {
    ScaleByAdamState: _MOMENTS,
    ScaleByAdamEpsilonHatState: _MOMENTS,
    ScaleByUncorrectedAdamState: _MOMENTS,
    ScaleByLazyAdamState: _MOMENTS,
    ScaleByRadamState: _MOMENTS,
    ScaleByNadamState: _MOMENTS,
    ScaleByScheduledNadamState: _MOMENTS,
    ScaleByAmsgradState: _LARGEST_MOMENTS,
    ScaleByUncorrectedAmsgradState: _LARGEST_MOMENTS,
    TraceMomentumState: _MOMENTUM,
    TraceNesterovMomentumState: _MOMENTUM,
    TraceMomentumEmaState: _MOMENTUM,
    ScaleByRmsState: {"nu": ("square_avg",), "mu": ("grad_avg",)},
    ScaleByAdagradState: {"sum_of_squares": ("sum",)},
    ScaleByAdadeltaState: {"e_g": ("square_avg",), "e_x": ("acc_delta",)},
    LaPropState: {"exp_avg": ("exp_avg",), "exp_avg_sq": ("exp_avg_sq",)},
    LookaheadState: {"slow": ("slow_buffer", "lookahead_slow_buff", "slow_params")},
    ScaleByLearningRateState: {},
    ScheduledDecayState: {},
    DecayState: {},
    optax.InjectStatefulHyperparamsState: {},
}
# Fields that hold one number for all parameters, and their names in the sources.
_SHARED = {"product": ("mu_product", "m_schedule"), "average_rate": ("exp_avg_lr_1",)}


def from_state_dict(
    source: str | optax.GradientTransformation,
    state: StateDict,
    params: Tree,
    *,
    names: Names,
    step: int | None = None,
) -> Any:
    """Returns the state of a port at the point of a torch run, so that JAX resumes from there.

    ::

        names = {"hidden.weight": ("hidden/kernel", (1, 0)), "hidden.bias": "hidden/bias"}
        tx = ports.from_param_groups("torch.AdamW", state_dict, names=names)
        state = ports.from_state_dict(tx, state_dict, params, names=names)

    A parameter without state in the ``state_dict`` (in torch, a parameter that never had a
    gradient) starts with the state of ``init``. Note that torch does not update such a parameter
    at all, whereas a gradient of zeros still decays it. torch counts the steps of every parameter
    or group separately, whereas a port has one count: where the counts differ, because a parameter
    was frozen at first, all take the largest.

    Args:
      source: the port, built with the arguments of the torch run, also inside ``optax.chain``,
        ``optax.partition`` or `timm.Lookahead`; or its name, such as ``"torch.AdamW"``, for the
        port that `from_param_groups` builds.
      state: ``optimizer.state_dict()``, with NumPy arrays in place of tensors: ``"state"``, keyed
        by the index of the parameter, and ``"param_groups"``. That of pytorch_optimizer's
        ``Lookahead``, which nests another, is accepted too.
      params: the parameters, already converted.
      names: the torch parameters in the order of their indices, which is the order in which the
        groups list them. The value of each is its path in ``params``, or ``(path, axes)`` where it
        must be transposed, with the axes as for ``np.transpose``. The shape of a square kernel
        cannot show that it must be.
      step: the number of steps made. Required where the state does not hold it (SGD); otherwise it
        replaces the number that the state holds.

    Returns:
      The state of the port. Values that only show what the last step did, such as trust ratios,
      are those of ``init``.

    Raises:
      ArgumentValueError: a parameter or a field is missing, no parameter has state, or a shape
        does not fit; it is named.
      NotImplementedError: the port keeps state whose name in torch is not known.

    Warns:
      UserWarning: a parameter has no state, or the numbers of steps differ; the warning lists the
        parameters, and says what is assumed. Also see `from_param_groups`.
    """
    state = _flat(state)
    if isinstance(source, str):
        source = from_param_groups(source, state, names=names)
    fresh = source.init(params)
    moments = TorchMoments(state, params, names)
    count = _steps_made(state, moments, step)
    rates = {group["lr"] for group in state["param_groups"]}

    def carried(piece: Any, after_rate: bool) -> Any:
        fields = _FIELDS.get(type(piece), {})
        new = {
            ours: moments.tree(theirs, getattr(piece, ours), negate=after_rate)
            for ours, theirs in fields.items()
            if getattr(piece, ours) is not None
        }
        for ours, theirs in _SHARED.items():
            if ours in piece._fields:
                new[ours] = jnp.asarray(moments.shared(theirs), getattr(piece, ours).dtype)
        for ours in COUNTS:
            if ours in piece._fields:
                new[ours] = jnp.asarray(count, getattr(piece, ours).dtype)
        if isinstance(piece, ScaleByLearningRateState) and len(rates) == 1:
            # Where the groups differ, each port of a partition has its own rate from `init`.
            new["rate"] = jnp.asarray(next(iter(rates)), piece.rate.dtype)
        return piece._replace(**new)

    return map_pieces(carried, fresh, _FIELDS, "torch")


def _flat(state: StateDict) -> StateDict:
    """Returns the ``state_dict`` of the inner optimizer of pytorch_optimizer's ``Lookahead``.

    The slow weights become one more field of each parameter.
    """
    if "base_optimizer" not in state:
        return state
    inner = state["base_optimizer"]
    members = [group["params"] for group in inner["param_groups"]]
    slow = {members[i][j]: fields for (i, j), fields in state["lookahead_state"].items()}
    indices = [index for inside in members for index in inside]
    together = {i: {**inner["state"].get(i, {}), **slow.get(i, {})} for i in indices}
    return {**inner, "state": together}


def _steps_made(state: StateDict, moments: TorchMoments, step: int | None) -> int:
    """Returns the number of steps that the run has made; warns where parameters differ in it."""
    if step is not None:
        ranges.check_count("step", step, 0)
        return step
    counts: dict[str, float] = {
        moments.names[path]: float(fields["step"])
        for path, fields in moments.fields.items()
        if "step" in fields
    }
    # timm, pytorch_optimizer and Apex count in the groups; timm's Lookahead counts there as well.
    for name in ("step", "lookahead_step", "counter"):
        if not counts:
            groups = enumerate(state["param_groups"])
            counts = {f"group {i}": float(g[name]) for i, g in groups if name in g}
    if not counts:
        expected = "say how many steps were made"
        raise ArgumentValueError(
            "state",
            expected,
            [],
            "give step=...",
            sentence=f"the state_dict must {expected}, but it does not hold it: give step=...",
            related=["step"],
        )
    largest = max(counts.values())
    fewer = {name: int(made) for name, made in counts.items() if made < largest}
    if fewer:
        warnings.warn(
            f"the state_dict holds {int(largest)} steps for most parameters, but "
            + ", ".join(f"{made} for {name}" for name, made in fewer.items())
            + f": {int(largest)} is taken for all, so that the bias correction of these differs "
            "from torch's until their averages have filled",
            stacklevel=3,
        )
    return int(largest)

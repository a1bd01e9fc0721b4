"""Carries the state of an optax optimizer over to the optimizer of the same name here."""

import importlib
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optim_zoo import optimizers, ranges
from optim_zoo.errors import ArgumentTypeError, ArgumentValueError
from optim_zoo.optimizers.lookahead import LookaheadState
from optim_zoo.ports._decay import DecayState, ScheduledDecayState
from optim_zoo.ports._states import COUNTS, map_pieces
from optim_zoo.transforms import (
    ScaleByAdadeltaState,
    ScaleByAdagradState,
    ScaleByAdamState,
    ScaleByLazyAdamState,
    ScaleByLearningRateState,
    ScaleByNadamState,
    ScaleByRadamState,
    ScaleByRmsState,
    TraceMomentumState,
    TraceNesterovMomentumState,
)
from optim_zoo.tree import Tree, by_path, leaf_paths

# The fields of optax's states, and the names that they have here. States without fields hold only
# the number of steps.
_MOMENTS = {"mu": "mu", "nu": "nu"}
_OPTAX: dict[type, dict[str, str]] = {
    optax.ScaleByAdamState: _MOMENTS,
    optax.ScaleByRmsState: {"nu": "nu"},
    optax.ScaleByRStdDevState: _MOMENTS,
    optax.ScaleByRssState: {"sum_of_squares": "sum_of_squares"},
    optax.ScaleByAdaDeltaState: {"e_g": "e_g", "e_x": "e_x"},
    optax.TraceState: {"trace": "momentum"},
    optax.ScaleByScheduleState: {},
}
# Our states, and the states of optax that hold the same numbers.
_ADAM = (optax.ScaleByAdamState,)
_TRACE = (optax.TraceState,)
_OURS: dict[type, tuple[type, ...]] = {
    ScaleByAdamState: _ADAM,
    ScaleByLazyAdamState: _ADAM,
    ScaleByNadamState: _ADAM,
    ScaleByRadamState: _ADAM,
    ScaleByRmsState: (optax.ScaleByRmsState, optax.ScaleByRStdDevState),
    ScaleByAdagradState: (optax.ScaleByRssState,),
    ScaleByAdadeltaState: (optax.ScaleByAdaDeltaState,),
    TraceMomentumState: _TRACE,
    TraceNesterovMomentumState: _TRACE,
    LookaheadState: (),
    ScaleByLearningRateState: (),
    ScheduledDecayState: (),
    DecayState: (),
    optax.InjectStatefulHyperparamsState: (),
}


def from_optax_state(
    source: str | optax.GradientTransformation, state: Any, params: Tree, *, step: int | None = None
) -> Any:
    """Returns the state of an optimizer at the point of a run with optax, so that it resumes there.

    ::

        theirs = optax.adamw(1e-3, weight_decay=0.01)             # the run with optax
        ours = optim_zoo.adamw(1e-3, weight_decay=0.01)           # continues it
        opt_state = ports.from_optax_state(ours, opt_state, params)

    Both must be the same optimizer with the same arguments: moments, momentum and the number of
    steps are copied, not converted. Supported are `sgd`, `momentum`, `nesterov`, `adagrad`,
    `adadelta`, `rmsprop`, `adam`, `adamw`, `nadam`, `radam`, `lamb`, `lars`, `lookahead` around one
    of them, and `lazy_adam` from ``optax.adam``, also inside ``optax.inject_hyperparams``. Note
    that `lars` computes another trust ratio than ``optax.lars``. ``optax.amsgrad`` is refused: it
    keeps the largest corrected second moment, and `amsgrad` the largest uncorrected one.

    Args:
      source: an optimizer of this package, or its name, such as ``"adamw"``; by name it has default
        arguments, with momentum or centering where the state holds them.
      state: the state of the optax optimizer.
      params: the parameters; ``optax.LookaheadParams`` where the state is that of
        ``optax.lookahead``, whose ``fast`` parameters are then those to continue with.
      step: the number of steps made. By default the number that the state holds, and 0 where it
        holds none (optax counts no steps for `sgd` with a constant learning rate).

    Returns:
      The state of the optimizer. Values that only show what the last step did, such as the
      learning rate and trust ratios, are those of ``init``. Moments have the dtype they have here,
      float32 or wider.

    Raises:
      ArgumentValueError: there is no optimizer of this name; the state lacks moments or momentum
        that the optimizer keeps, or has some that it does not keep; or their paths or shapes are
        not those of the parameters.
      ArgumentTypeError: ``source`` wraps another optimizer and is passed by name.
      NotImplementedError: the state, or that of the optimizer, holds arrays whose counterpart is
        not known.
    """
    theirs = list(_pieces(state))
    unused = [piece for piece in theirs if _OPTAX.get(type(piece))]
    if isinstance(source, str):
        source = _optimizer(source, unused)
    slow: Tree | None = None
    if isinstance(params, optax.LookaheadParams):
        params, slow = params.fast, params.slow
    count = _steps_made(theirs, step)

    def carried(piece: Any, after_rate: bool) -> Any:
        del after_rate  # the learning rate precedes momentum where it does so in optax
        new: dict[str, Any] = {}
        if accepted := _OURS.get(type(piece), ()):
            found = next((x for x in unused if isinstance(x, accepted)), None)
            if found is None:
                raise _unlike(f"hold the arrays of {accepted[0].__name__}", theirs)
            unused.remove(found)
            for name, ours in _OPTAX[type(found)].items():
                new[ours] = _fitted(name, getattr(found, name), getattr(piece, ours))
        made = count
        if isinstance(piece, LookaheadState):
            if slow is None:
                raise _unlike("be that of optax.lookahead, with optax.LookaheadParams", theirs)
            new["slow"] = _fitted("slow", slow, piece.slow)
            made = next(int(x.steps_since_sync) for x in theirs if _is_lookahead(x))
        for name in COUNTS:
            if name in piece._fields:
                new[name] = jnp.asarray(made, getattr(piece, name).dtype)
        return piece._replace(**new)

    made = map_pieces(carried, source.init(params), _OURS, "optax")
    if unused:
        raise _unlike("hold nothing that the optimizer does not keep", unused)
    return made


def _optimizer(name: str, theirs: list[Any]) -> optax.GradientTransformation:
    """Returns the optimizer of this name. No number changes the structure of its state."""
    folder = Path(optimizers.__file__).parent
    names = sorted(file.stem for file in folder.glob("*.py") if not file.stem.startswith("_"))
    ranges.check_choice("optimizer", name, names, argument="source")
    constructor = getattr(importlib.import_module(f"optim_zoo.optimizers.{name}"), name)
    takes = inspect.signature(constructor).parameters
    if "learning_rate" not in takes or next(iter(takes)) in ("inner", "base"):
        advice = f"pass {name}(...) around the inner optimizer"
        raise ArgumentTypeError("source", "be an optimizer that wraps no other", name, advice)
    held = {
        "momentum": 0.9 if any(isinstance(x, optax.TraceState) for x in theirs) else None,
        "centered": any(isinstance(x, optax.ScaleByRStdDevState) for x in theirs) or None,
    }
    options = {k: v for k, v in held.items() if k in takes and v is not None}
    made: optax.GradientTransformation = constructor(0.0, **options)
    return made


def _pieces(state: Any) -> Iterator[Any]:
    """Yields the states of optax's pieces, in the order of their chain.

    Raises:
      NotImplementedError: a state with arrays has no counterpart here.
    """
    if type(state) in _OPTAX:
        yield state
    elif _is_lookahead(state):
        yield state
        yield from _pieces(state.fast_state)
    elif isinstance(state, optax.InjectStatefulHyperparamsState):
        yield optax.ScaleByScheduleState(state.count)
        yield from _pieces(state.inner_state)
    elif isinstance(state, optax.MaskedState):
        yield from _pieces(state.inner_state)
    elif type(state) is tuple:
        for child in state:
            yield from _pieces(child)
    elif jax.tree.leaves(state):
        raise NotImplementedError(
            f"from_optax_state does not know {type(state).__name__}: pass the state of an optax "
            "optimizer of the same name"
        )


def _is_lookahead(state: Any) -> bool:
    return type(state).__name__ == "LookaheadState" and hasattr(state, "steps_since_sync")


def _steps_made(theirs: list[Any], step: int | None) -> int:
    if step is not None:
        ranges.check_count("step", step, 0)
        return step
    # As a field: every tuple has a method `count`.
    return max((int(piece.count) for piece in theirs if "count" in piece._fields), default=0)


def _fitted(name: str, theirs: Tree, like: Tree) -> Tree:
    """Returns ``theirs`` in the containers, dtypes and memory of ``like``."""
    values: Mapping[str, Any] = by_path(theirs)
    paths, leaves = leaf_paths(like), jax.tree.leaves(like)
    shapes = dict(zip(paths, map(jnp.shape, leaves), strict=True))
    found = {path: jnp.shape(x) for path, x in values.items()}
    if differing := sorted(p for p in {*shapes, *found} if shapes.get(p) != found.get(p)):
        expected = "have the paths and shapes of params"
        sentence = f"{name} of {{argument}} must {expected}; they differ at {differing}"
        raise ArgumentValueError(
            "state", expected, differing, sentence=sentence, related=["params"]
        )
    copied = [jnp.array(values[p], x.dtype) for p, x in zip(paths, leaves, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(like), copied)


def _unlike(expected: str, theirs: list[Any]) -> ArgumentValueError:
    advice = "pass the optimizer of the same name and arguments"
    return ArgumentValueError("state", expected, [type(x).__name__ for x in theirs], advice)

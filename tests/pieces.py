"""The public pieces, for the tests that cover every one of them."""

import inspect
from collections.abc import Callable, Mapping

import optax

import optim_zoo
from optim_zoo import registry

PIECES: Mapping[str, Callable[..., optax.GradientTransformation]] = {
    name: getattr(optim_zoo, name)
    for name in registry.__all__
    # A chain of other pieces has no rules.
    if name not in registry.OPTIMIZERS and name != "chain_leaf_by_leaf"
}


def make(name: str) -> optax.GradientTransformation:
    """Returns the piece with default arguments, and 0.1 for each argument without a default."""
    parameters = inspect.signature(PIECES[name]).parameters.values()
    return PIECES[name](*(0.1 for p in parameters if p.default is p.empty))

"""Lists the public pieces for the tests that cover all of them."""

import inspect
from collections.abc import Callable, Mapping

import optax

import optim_zoo
from optim_zoo import registry

PIECES: Mapping[str, Callable[..., optax.GradientTransformation]] = {
    name: getattr(optim_zoo, name)
    for name in registry.__all__
    # `chain_leaf_by_leaf` needs other pieces as arguments.
    if name not in registry.OPTIMIZERS and name != "chain_leaf_by_leaf"
}

# The arguments without a default that are not numbers.
_REQUIRED = {"factors": [("", 0.1)]}


def make(name: str) -> optax.GradientTransformation:
    """Makes the piece with its defaults, and with 0.1 for each number that has no default."""
    parameters = inspect.signature(PIECES[name]).parameters.values()
    return PIECES[name](*(_REQUIRED.get(p.name, 0.1) for p in parameters if p.default is p.empty))

"""Finds what a config names: something in this package, or the user's own import path."""

import importlib
from collections.abc import Mapping
from typing import Any

from optim_zoo import ranges
from optim_zoo.errors import ArgumentValueError


def find(kind: str, name: str, known: Mapping[str, str], *, argument: str) -> Any:
    """Imports and returns the object that a config names.

    Args:
      kind: what it is, for messages, such as ``task``.
      name: a key of ``known``, or an import path ``package.module:attribute``.
      known: the names of this package -> their import paths.
      argument: the key of the config, for messages.

    Raises:
      ArgumentValueError: there is no such name, module or attribute.
      ModuleNotFoundError: a name of this package needs a library that is not installed.
    """
    if ":" not in name:
        ranges.check_choice(argument, name, known)
    module_name, _, attribute = known.get(name, name).partition(":")
    expected = f"be the import path of a {kind}, package.module:Class"
    if not module_name.replace(".", "_").isidentifier() or not attribute.isidentifier():
        raise ArgumentValueError(argument, expected, name)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if name in known:
            raise
        missing = error.name or module_name
        advice = f"Python finds no module {missing}; set PYTHONPATH to the folder that holds it"
        raise ArgumentValueError(argument, expected, name, advice) from error
    if not hasattr(module, attribute):
        advice = f"the module {module_name} has no {attribute}"
        raise ArgumentValueError(argument, expected, name, advice)
    return getattr(module, attribute)

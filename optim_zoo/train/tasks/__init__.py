"""Finds tasks by name or by import path."""

import inspect
from collections.abc import Mapping
from types import MappingProxyType

from optim_zoo.errors import ArgumentTypeError
from optim_zoo.train import import_paths
from optim_zoo.train.tasks.base import Task

TASKS: Mapping[str, str] = MappingProxyType(
    {
        "byte_language": "optim_zoo.train.tasks.byte_language.task:ByteLanguage",
        "digits": "optim_zoo.train.tasks.digits:Digits",
        "masked_language": "optim_zoo.train.tasks.masked_language.task:MaskedLanguage",
        "token_tagging": "optim_zoo.train.tasks.token_tagging.task:TokenTagging",
    }
)
"""Name -> import path. A task is imported only when it is used, as each needs other libraries."""


def find(name: str) -> type[Task]:
    """Returns the task class of a name in `TASKS` or of an import path ``package.module:Class``.

    Raises:
      ArgumentValueError: there is no such task.
      ArgumentTypeError: the import path names something that is not a `Task`.
    """
    found = import_paths.find("task", name, TASKS, argument="name")
    if not (inspect.isclass(found) and issubclass(found, Task)):
        raise ArgumentTypeError("name", "name a subclass of optim_zoo.train.tasks.base.Task", name)
    return found

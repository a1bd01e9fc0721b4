"""Imports the programs of ``scripts/``, which are not installed."""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@contextlib.contextmanager
def imported(folder: str, *names: str) -> Iterator[list[ModuleType]]:
    """Imports modules of a folder of ``scripts/`` as Python does when it runs a program there.

    The folder is the first entry of ``sys.path`` inside the block. Its modules are removed from
    ``sys.modules`` at the end, because another folder may have modules of the same names.
    """
    path = SCRIPTS / folder
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(path))
        yield [importlib.import_module(name) for name in names]
    for name, module in list(sys.modules.items()):
        if path in Path(getattr(module, "__file__", None) or "/").parents:
            del sys.modules[name]

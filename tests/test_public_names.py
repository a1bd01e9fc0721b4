import ast
import importlib
import inspect
import pkgutil
from pathlib import Path
from types import ModuleType

import pytest

import optim_zoo

WITH_ALL = ("optim_zoo", "optim_zoo.transforms", "optim_zoo.optimizers", "optim_zoo.sharding")
CORE = [
    importlib.import_module(info.name)
    for info in pkgutil.walk_packages(optim_zoo.__path__, "optim_zoo.")
    # The main job needs the extras and has no names for others to build on.
    if not info.name.startswith(("optim_zoo.train", "optim_zoo.lab", "optim_zoo.cli"))
]


@pytest.mark.parametrize("name", WITH_ALL)
def test_all_is_what_is_imported(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__file__
    source = ast.parse(Path(module.__file__).read_text("utf-8"))
    imported = {
        alias.asname or alias.name
        for node in source.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(imported) == module.__all__
    assert all(hasattr(module, public) for public in module.__all__)


def test_pieces_and_optimizers_are_at_top_level() -> None:
    pieces = [name for name in optim_zoo.transforms.__all__ if name[0].islower()]
    assert set(pieces) | set(optim_zoo.optimizers.__all__) <= set(optim_zoo.__all__)


@pytest.mark.parametrize("module", CORE, ids=lambda module: module.__name__)
def test_everything_public_says_what_it_is(module: ModuleType) -> None:
    assert module.__doc__
    for name, value in vars(module).items():
        own = getattr(value, "__module__", None) == module.__name__
        if (
            not own
            or name.startswith("_")
            or not (inspect.isfunction(value) or inspect.isclass(value))
        ):
            continue
        # A dataclass or NamedTuple without one gets its signature as docstring.
        assert value.__doc__, f"{name} has no docstring"
        assert not value.__doc__.startswith(f"{name}("), f"{name} has no docstring"
        if inspect.isclass(value):
            for method_name, method in vars(value).items():
                if inspect.isfunction(method) and not method_name.startswith("_"):
                    generated = issubclass(
                        value, tuple
                    ) and not method.__code__.co_filename.endswith(".py")
                    assert method.__doc__ or generated, f"{name}.{method_name} has no docstring"

import ast
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import optim_zoo
from optim_zoo import registry

WITH_ALL = ("optim_zoo", "optim_zoo.transforms", "optim_zoo.sharding")
OPTIMIZERS_AND_PIECES = ("optim_zoo.optimizers.", "optim_zoo.transforms.")
CORE = [
    importlib.import_module(info.name)
    for info in pkgutil.walk_packages(optim_zoo.__path__, "optim_zoo.")
    # The training job needs optional dependencies and has no public names.
    if not info.name.startswith(("optim_zoo.train", "optim_zoo.lab", "optim_zoo.cli"))
]


def _imported(module: ModuleType) -> Iterator[tuple[str, str]]:
    """Yields (module, name) for every name that ``module`` imports from another module."""
    assert module.__file__
    for node in ast.parse(Path(module.__file__).read_text("utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            assert node.module
            for alias in node.names:
                every = importlib.import_module(node.module).__all__ if alias.name == "*" else None
                for name in every or [alias.asname or alias.name]:
                    yield node.module, name


@pytest.mark.parametrize("name", WITH_ALL)
def test_all_lists_what_the_module_imports(name: str) -> None:
    module = importlib.import_module(name)
    assert sorted(module.__all__) == sorted(name for _, name in _imported(module))
    assert all(hasattr(module, public) for public in module.__all__)


def test_the_registry_exports_the_optimizers_and_the_pieces_that_it_imports() -> None:
    imported = [
        name for module, name in _imported(registry) if module.startswith(OPTIMIZERS_AND_PIECES)
    ]
    assert sorted(registry.__all__) == sorted(imported)
    assert set(registry.OPTIMIZERS) <= set(registry.__all__)


def test_the_package_has_no_other_public_names() -> None:
    public = {
        name
        for name, value in vars(optim_zoo).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public <= set(optim_zoo.__all__)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True], ids=["default", "strict"])
def test_mypy_knows_the_signatures(strict: bool, tmp_path: Path) -> None:
    """mypy sees the signatures of names that ``optim_zoo`` gets from a star import."""
    user = tmp_path / "user.py"
    user.write_text(
        "import optim_zoo\n"
        "from optim_zoo import lamb\n"
        "optim_zoo.lamb('x', b9=1)\n"
        "lamb(0.1, b9=1)\n"
        "optim_zoo.scale_by_adam(b9=1)\n"
        "optim_zoo.registry.get(1)\n"
        "optim_zoo.get\n"
        "optim_zoo.lamb(0.1, b1=0.8)\n"
    )
    options = ["--strict"] if strict else []
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path), *options, str(user)],
        env=os.environ | {"MYPYPATH": str(Path(optim_zoo.__file__).parents[1])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    found = re.findall(r"^user\.py:(\d+): error: .*\[([\w-]+)\]$", done.stdout, flags=re.MULTILINE)
    expected = ["call-arg", "call-arg", "call-arg", "arg-type", "attr-defined"]
    assert found == [(str(line), code) for line, code in enumerate(expected, 3)], done.stdout


def test_the_piece_of_an_optimizer_is_public() -> None:
    """The piece of an optimizer ``x`` is ``scale_by_x``."""
    found = []
    for module in CORE:
        if module.__name__.startswith(OPTIMIZERS_AND_PIECES):
            for name in registry.OPTIMIZERS:
                if hasattr(module, f"scale_by_{name}"):
                    found.append(f"scale_by_{name}")
    assert found
    assert set(found) <= set(registry.__all__)


@pytest.mark.parametrize("module", CORE, ids=lambda module: module.__name__)
def test_everything_public_has_a_docstring(module: ModuleType) -> None:
    assert module.__doc__
    for name, value in vars(module).items():
        own = getattr(value, "__module__", None) == module.__name__
        if (
            not own
            or name.startswith("_")
            or not (inspect.isfunction(value) or inspect.isclass(value))
        ):
            continue
        # Python gives a dataclass or NamedTuple without a docstring its signature instead.
        assert value.__doc__, f"{name} has no docstring"
        assert not value.__doc__.startswith(f"{name}("), f"{name} has no docstring"
        if inspect.isclass(value):
            for method_name, method in vars(value).items():
                if inspect.isfunction(method) and not method_name.startswith("_"):
                    generated = issubclass(
                        value, tuple
                    ) and not method.__code__.co_filename.endswith(".py")
                    assert method.__doc__ or generated, f"{name}.{method_name} has no docstring"

"""Adding an optimizer takes the files that ``docs/architecture.md`` lists and no other change.

The tests add an optimizer with its own piece to a copy of the package and run the shared tests
there.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("optim_zoo", "tests")
FILES = ("pyproject.toml", "CHANGELOG.md")

NEW = {
    "optim_zoo/transforms/toy.py": '''\
"""Sign of momentum (Bernstein et al., arXiv 1802.04434)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from optim_zoo import ranges
from optim_zoo.transforms.leafwise import Declaration, Leaf, Leafwise, leafwise, zeros
from optim_zoo.transforms.moments import moment
from optim_zoo.tree import Tree


class ScaleByToyState(NamedTuple):
    """State of `scale_by_toy`."""

    momentum: Tree  # like the parameters, in float32 or wider


def scale_by_toy(b1: jax.typing.ArrayLike = 0.9) -> Leafwise:
    """Turns gradients g into the sign of their average.

    ::

        m <- b1 m + (1 - b1) g
        u  = sign(m)

    Args:
      b1: decay rate, in [0, 1).

    Raises:
      ValueError: b1 is out of its range.
      TypeError: a parameter is not floating-point.
    """
    ranges.check_decay("b1", b1)

    def update(
        g: jax.Array, state: ScaleByToyState, leaf: Leaf
    ) -> tuple[jax.Array, ScaleByToyState]:
        del leaf
        m = moment(g, state.momentum, b1)
        return jnp.sign(m), state._replace(momentum=m)

    return leafwise(
        Declaration(
            name="scale_by_toy",
            update=update,
            state=ScaleByToyState,
            like_params=("momentum",),
            init=lambda path, x: {"momentum": zeros(x)},
        )
    )
''',
    "optim_zoo/optimizers/toy.py": '''\
"""Signum (Bernstein et al., arXiv 1802.04434)."""

import jax
import optax

from optim_zoo.transforms import scale_by_learning_rate
from optim_zoo.transforms.toy import scale_by_toy


def toy(
    learning_rate: optax.ScalarOrSchedule, b1: jax.typing.ArrayLike = 0.9
) -> optax.GradientTransformation:
    """Steps of one size along the sign of the averaged gradient.

    ::

        m <- b1 m + (1 - b1) g
        x <- x - learning_rate sign(m)

    Args:
      learning_rate: a number or a schedule: step -> learning rate, the first step being 0.
      b1: see `scale_by_toy`.

    Raises:
      ValueError: see `scale_by_toy` and `scale_by_learning_rate`.
    """
    return optax.chain(scale_by_toy(b1), scale_by_learning_rate(learning_rate))
''',
    "tests/reference/toy.py": '''\
"""Signum (Bernstein et al., arXiv 1802.04434) in float64 NumPy."""

from collections.abc import Callable, Iterable

import numpy as np

Arrays = dict[str, np.ndarray]


def toy(
    params: Arrays,
    grads: Iterable[Arrays],
    *,
    learning_rate: Callable[[int], float],
    b1: float = 0.9,
) -> list[Arrays]:
    """The parameters after each step."""
    x = {name: value.astype(np.float64) for name, value in params.items()}
    m = {name: np.zeros_like(value) for name, value in x.items()}
    trajectory = []
    for t, g in enumerate(grads):
        m = {name: b1 * m[name] + (1 - b1) * g[name].astype(np.float64) for name in x}
        x = {name: x[name] - learning_rate(t) * np.sign(m[name]) for name in x}
        trajectory.append(x)
    return trajectory
''',
    "tests/optimizers/test_toy.py": """\
import numpy as np
import pytest

from optim_zoo import toy
from tests.optimizers.problems import assert_same_path, problem, schedule, train_in_float64
from tests.reference import toy as reference


@pytest.mark.parametrize("arguments", [{}, {"b1": 0.0}, {"b1": 0.5}])
def test_steps_follow_the_reference(rng: np.random.Generator, arguments: dict) -> None:
    params, grads = problem(rng)
    trajectory = train_in_float64(lambda: toy(schedule, **arguments), params, grads)
    assert_same_path(trajectory, reference.toy(params, grads, learning_rate=schedule, **arguments))
""",
}
ENTRY = """\
    Entry(
        constructor=toy,
        description="steps of one size along the sign of the averaged gradient",
        paper="arXiv 1802.04434",
        variant="Signum, without weight decay",
        example="optim_zoo.toy(1e-3)",
    ),
"""
# (anchor, text) pairs: the text is inserted before the first occurrence of the anchor.
INSERTED: Mapping[str, tuple[tuple[str, str], ...]] = {
    "optim_zoo/registry.py": (
        (
            "from optim_zoo.transforms.adadelta import",
            "from optim_zoo.optimizers.toy import toy\n",
        ),
        (
            "from optim_zoo.transforms.trust_ratio import",
            "from optim_zoo.transforms.toy import scale_by_toy\n",
        ),
        ('    "scale_by_trust_ratio",\n', '    "scale_by_toy",\n'),
        ('    "trace_momentum",\n', '    "toy",\n'),
        (")\n\nOPTIMIZERS:", ENTRY),
    ),
    "CHANGELOG.md": (("- ", "- `toy`.\n"),),
}


def test_the_documentation_lists_the_files_to_touch() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    _, _, after = page.partition("## To add an optimizer, touch these files\n")
    documented = re.findall(r"^\d\. `([^`]+)`", after.partition("\n## ")[0], flags=re.MULTILINE)
    assert [path.replace("NAME", "toy") for path in documented] == [
        "optim_zoo/transforms/toy.py",
        "optim_zoo/optimizers/toy.py",
        "optim_zoo/registry.py",
        "tests/reference/toy.py",
        "tests/optimizers/test_toy.py",
        "CHANGELOG.md",
    ]
    assert {path.replace("NAME", "toy") for path in documented} == NEW.keys() | INSERTED.keys()


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a copy of the package and its tests with the new optimizer added."""
    root = tmp_path_factory.mktemp("copy")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, root / folder)
    for file in FILES:
        shutil.copy(ROOT / file, root / file)
    for path, text in NEW.items():
        assert not (root / path).exists()
        (root / path).write_text(text, "utf-8")
    for path, insertions in INSERTED.items():
        text = (root / path).read_text("utf-8")
        for before, inserted in insertions:
            found = text.index(before)
            text = text[:found] + inserted + text[found:]
        (root / path).write_text(text, "utf-8")
    return root


def _python(copy: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=copy,
        env=os.environ | {"PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
    )


def test_the_new_optimizer_is_public(copy: Path) -> None:
    code = (
        "import optim_zoo\n"
        "print(optim_zoo.__file__)\n"
        "assert {'toy', 'scale_by_toy'} <= set(optim_zoo.__all__)\n"
        "print(optim_zoo.toy(0.1), optim_zoo.scale_by_toy())\n"
    )
    done = _python(copy, "-c", code)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.splitlines()[0]).is_relative_to(copy)


def test_the_commands_list_and_show_the_new_optimizer(copy: Path) -> None:
    commands = [["list"], ["show", "toy"], ["verify", "toy"]]
    code = f"from optim_zoo import cli\nfor c in {commands}: print(cli.main(c), flush=True)\n"
    done = _python(copy, "-c", code)
    assert done.returncode == 0, done.stderr
    listed, shown, verified = re.split(r"^\d\n", done.stdout, flags=re.MULTILINE)[:3]
    assert re.search(r"^toy +steps of one size along .*  arXiv 1802\.04434$", listed, re.MULTILINE)
    assert shown.startswith("toy: steps of one size along the sign of the averaged gradient\n")
    assert "    x <- x - learning_rate sign(m)\n" in shown
    assert "No trajectory is recorded for it" in shown
    assert not verified
    assert "no trajectory is recorded for toy" in done.stderr


@pytest.mark.slow
def test_the_tests_of_the_new_optimizer_and_the_shared_tests_pass(copy: Path) -> None:
    """Runs the shared tests of this optimizer, of the registry and of the public names."""
    done = _python(
        copy, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-n", "0",
        "tests/optimizers/test_toy.py", "tests/test_bad_input.py", "tests/test_catalogue.py",
        "tests/test_contract.py", "tests/test_errors.py", "tests/test_public_names.py",
        "tests/test_registry.py",
        "-k", "toy or test_public_names or (test_registry and not proof and not default_arguments)",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    # Each of these files has at least one test of the optimizer and one of its piece.
    passed = [line for line in done.stdout.splitlines() if " PASSED " in line]
    for file in ("bad_input", "contract", "errors"):
        for name in ("toy", "scale_by_toy"):
            assert any(re.search(rf"test_{file}\.py::.*[\[-]{name}[\]-]", line) for line in passed)
    for test in ("test_registry.py::test_every_optimizer_follows_its_reference", "test_toy.py::"):
        assert any(test in line and "toy" in line for line in passed)

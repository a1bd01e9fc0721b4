"""Runs the code of the documentation, and checks that the reference has every public name once.

The Python blocks of a page are executed in one namespace. A comment in front of a block keeps it
from being run, or from being run by default::

    <!-- not run: needs a TPU -->
    <!-- slow: trains for a minute -->

``mkdocs build --strict``, which continuous integration runs, checks the links between the pages.
"""

import contextlib
import inspect
import io
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import pytest

import optim_zoo
from optim_zoo import catalogue, registry, transforms
from optim_zoo.train import loop, records, summary
from optim_zoo.train.config import Config
from optim_zoo.train.sinks import base as sinks
from optim_zoo.train.tasks import base as tasks
from tests.scripts.importing import imported
from tests.train.saved_run import write_run

pytestmark = pytest.mark.usefixtures("quick_to_compile")

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
REFERENCE = sorted((DOCS / "reference").glob("*.md"))


class Block(NamedTuple):
    """A block of code, with the marker from the comment in front of it."""

    code: str
    line: int
    marker: str  # "", "not run" or "slow"


def blocks(text: str, language: str) -> list[Block]:
    """Returns the blocks of one language, including those indented in a list."""
    found = re.finditer(
        r"^(?:<!-- (not run|slow): [^\n]*-->\n\n?)?(?P<indent> *)```(?P<language>\w+)[^\n]*\n"
        r"(?P<code>.*?)^(?P=indent)```$",
        text,
        flags=re.MULTILINE | re.DOTALL,
    )
    made = []
    for match in found:
        if match["language"] == language:
            lines = match["code"].splitlines(keepends=True)
            code = "".join(line.removeprefix(match["indent"]) for line in lines)
            made.append(Block(code, text.count("\n", 0, match.start("code")), match[1] or ""))
    return made


def run(page: Path, text: str, slow: bool) -> str:
    """Executes the blocks of a page and returns what they print.

    Code is compiled with the line numbers of the page, so that a failure names the right line.
    """
    # `dataclasses` looks annotations up in the module of the class.
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for block in blocks(text, "python"):
            if block.marker == "" or (slow and block.marker == "slow"):
                exec(compile("\n" * block.line + block.code, str(page), "exec"), namespace)
    return printed.getvalue()


def with_python(marker: str) -> list[Path]:
    return [p for p in PAGES if any(b.marker == marker for b in blocks(p.read_text(), "python"))]


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Changes to an empty folder for what a page writes, and sets JAX's default options."""
    monkeypatch.chdir(tmp_path)
    with jax.numpy_rank_promotion("allow"):
        yield


WITH_TESTS_OF_THEIR_OWN = {"README.md", "using_a_run.md"}


@pytest.mark.parametrize(
    "page",
    [p for p in with_python("") if p.name not in WITH_TESTS_OF_THEIR_OWN],
    ids=lambda page: page.name,
)
def test_python_blocks_run(page: Path, empty_folder: None) -> None:
    run(page, page.read_text(), slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", with_python("slow"), ids=lambda page: page.name)
def test_slow_python_blocks_run(page: Path, empty_folder: None) -> None:
    run(page, page.read_text(), slow=True)


def test_the_readmes_example_trains(empty_folder: None) -> None:
    before, after, trust_ratio = map(float, run(README, README.read_text(), slow=False).split())
    assert after < 0.1 * before
    assert trust_ratio > 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
def test_a_run_fills_in_masked_words_and_extracts_sentence_vectors(empty_folder: None) -> None:
    sizes = ("model.num_layers=1", "model.hidden_size=8", "model.intermediate_size=8")
    write_run(Path("runs/smoke"), *sizes, "schedule.learning_rate=1", "schedule.warmup_steps=0")
    page = DOCS / "using_a_run.md"
    after, *filled, vectors = run(page, page.read_text(), slow=False).split("\n", 3)
    assert after == "MaskedLanguage after 6 steps"
    assert [line.count("', '") for line in filled] == [2, 2]  # three words each
    assert len(re.findall(r"\b1\. ", vectors)) >= 3  # a vector is similar to itself


def test_the_examples_of_the_gallery_run(empty_folder: None) -> None:
    with imported("docs", "gallery_text") as (gallery,):
        for entry in registry.OPTIMIZERS.values():
            (block,) = blocks(gallery.example(entry), "python")
            exec(block.code, {})


def test_marked_blocks_are_skipped_and_failures_name_the_line_of_the_page() -> None:
    text = "one\n\n```python\nx = 1\n```\n\n<!-- not run: no -->\n```python\n1 / 0\n```\n"
    text += "- a list\n\n    ```python\n    print(x)\n    raise KeyError\n    ```\n"
    assert [b.marker for b in blocks(text, "python")] == ["", "not run", ""]
    with pytest.raises(KeyError) as error:
        run(Path("page.md"), text, slow=False)
    assert error.traceback[-1].lineno == text.splitlines().index("    raise KeyError")


def commands() -> Iterator[tuple[str, list[str]]]:
    for page in PAGES:
        for block in blocks(page.read_text(), "sh"):
            joined = block.code.replace("\\\n", " ")
            for line in joined.splitlines():
                for command in re.split(r"&&|\|\||[;|&]\s*$", line.partition(" #")[0]):
                    words = shlex.split(command, comments=True)
                    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                        words = words[1:]
                    if words:
                        yield page.name, words


KNOWN = {"cd", "git", "mkdocs", "mypy", "pip", "pre-commit", "pytest", "python", "ruff", "source"}
# The names of files that the pages ask the reader to write.
WRITTEN_BY_THE_READER = {"line.toml"}


def test_shell_blocks_name_existing_commands_and_files() -> None:
    subcommands = {"list", "show", "verify", "train", "report", "export", "sweep", "lr-find"}
    subcommands |= {"evaluate", "predict", "reproduce"}
    checked = 0
    for page, (program, *arguments) in commands():
        where = f"{page}: {program} {' '.join(arguments)}"
        if program == "optim-zoo":
            assert arguments[0] in subcommands, where
        elif "/" in program:
            assert (ROOT / program).exists(), where
        else:
            assert program in KNOWN, where
        for argument in arguments:
            is_file = re.fullmatch(r"[\w./-]+\.(?:toml|py|sh|txt|md)", argument)
            if is_file and "NAME" not in argument and argument not in WRITTEN_BY_THE_READER:
                assert (ROOT / argument).exists(), where
                checked += 1
        if program == "optim-zoo" and arguments[0] in ("show", "verify"):
            assert set(arguments[1:]) <= {*catalogue.names(), "NAME"}, where
    assert checked > 5


def objects(directive: str, members: str | None) -> list[str]:
    """Returns the public names that a directive of mkdocstrings shows."""
    thing = resolved(directive)
    if not inspect.ismodule(thing):
        return [directive]
    if members is not None:
        return [f"{directive}.{name}" for name in members.split(", ")]
    return [f"{directive}.{name}" for name in defined(thing)]


def resolved(path: str) -> Any:
    thing: Any = optim_zoo
    for name in path.split(".")[1:]:
        if not hasattr(thing, name):
            __import__(path)
        thing = getattr(thing, name)
    return thing


def defined(module: ModuleType) -> list[str]:
    """Returns the names of the functions and classes that a module defines, without its imports."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]


def shown() -> list[Any]:
    found = []
    for page in REFERENCE:
        for match in re.finditer(
            r"^::: ([\w.]+)(?:\n    options:(?:\n      (?:members: \[(.*)\]|\w+: .*))*)?$",
            page.read_text(),
            re.MULTILINE,
        ):
            found += objects(match[1], match[2])
    return found


def public() -> set[str]:
    """Returns every public name with the path that users write."""
    names = {f"optim_zoo.{name}" for name in optim_zoo.__all__}
    modules = {name for name in names if inspect.ismodule(resolved(name))}
    names -= modules
    for name in modules - {"optim_zoo.ports", "optim_zoo.registry"}:
        module = resolved(name)
        names |= {f"{name}.{member}" for member in getattr(module, "__all__", defined(module))}
    names |= {f"optim_zoo.registry.{name}" for name in ("Entry", "OPTIMIZERS", "get")}
    names |= {f"optim_zoo.transforms.{name}" for name in transforms.__all__}
    names |= {f"optim_zoo.ports.{name}" for name in ("from_param_groups", "from_state_dict")}
    names |= {
        f"optim_zoo.ports.{library}.{name}"
        for library, made in catalogue.libraries().items()
        for name in made
    }
    for module in (tasks, sinks, loop, records, summary, inspect.getmodule(Config)):
        names |= {f"{module.__name__}.{name}" for name in defined(module)}
    return names


def identity(path: str) -> str | int:
    """Identifies functions and classes across re-exports; other values only by their path."""
    thing = resolved(path)
    return id(thing) if callable(thing) else path


def test_the_reference_has_every_public_name_once() -> None:
    pages = shown()
    times = Counter(map(identity, pages))
    assert [name for name in pages if times[identity(name)] > 1] == []
    assert {name for name in public() if identity(name) not in times} == set()


def test_the_navigation_has_every_page_of_the_reference() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    assert [p.name for p in REFERENCE if f"reference/{p.name}" not in text] == []
    assert os.path.isfile(DOCS / "gallery" / "index.md")

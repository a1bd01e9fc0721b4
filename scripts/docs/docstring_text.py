"""An extension of Griffe: turns the plain text of docstrings into the Markdown of the site.

A formula or an example behind ``::`` becomes a block of code, and a name in single backticks
becomes a link to its place in the reference. A field without a docstring gets the comment behind
it or above it, which is where this package describes fields.
"""

import io
import itertools
import re
import textwrap
import tokenize
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from griffe import Attribute, Class, Docstring, Extension, Function, Object

_FOR_TOOLS = re.compile(r"^#\s*(type:|noqa|fmt:|pragma)")
_ITEM_OF_SEVERAL = re.compile(
    r"^( +)(\w+(?:, \w+)+):((?: .*)?\n?(?:\1 +.*(?:\n|$))*)", re.MULTILINE
)
REFERENCE = Path(__file__).parents[2] / "docs" / "reference"


class DocstringText(Extension):
    """Rewrites every docstring of the package."""

    def __init__(self) -> None:
        self.targets = targets(REFERENCE)

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrites the docstring of one object; Griffe calls this after it has read the object."""
        if not obj.path.startswith("optim_zoo"):
            return
        if isinstance(obj, Class) and obj.docstring is not None:
            obj.docstring.value = _with_fields(obj, obj.docstring.value)
        if isinstance(obj, Attribute) and obj.docstring is None and obj.lineno and obj.endlineno:
            source = Path(str(obj.filepath)).read_text("utf-8").splitlines()
            if text := comment(source, obj.lineno, obj.endlineno):
                obj.docstring = Docstring(text, parent=obj)
        if obj.docstring is not None:
            text = separated(obj.docstring.value)
            if isinstance(obj, Function) and obj.returns is not None:
                text = typed(text, str(obj.returns))
            obj.docstring.value = markdown(text, self.targets)


def _with_fields(described: Class, docstring: str) -> str:
    """Returns the docstring of a class, whose section "Attributes:" has the types of the fields.

    The fields that the section describes are not shown a second time.
    """
    section = re.search(r"^Attributes:\n((?: .*\n?|\n)*)", docstring, re.MULTILINE)
    for name in re.findall(r"^ +(\w+):", section[1] if section else "", re.MULTILINE):
        field = described.members.get(name)
        if isinstance(field, Attribute) and field.docstring is None:
            docstring = docstring.replace(f" {name}:", f" {name} ({field.annotation}):", 1)
            described.del_member(name)
    return docstring


def comment(source: Sequence[str], first: int, last: int) -> str:
    """Returns the comment behind a statement, or else the lines of comment above it, as a sentence.

    Args:
      source: the lines of a module.
      first, last: the numbers of the first and the last line of the statement, from 1.
    """
    text = "\n".join(source[first - 1 : last])
    read = tokenize.generate_tokens(io.StringIO(textwrap.dedent(text)).readline)
    found = [x.string for x in read if x.type == tokenize.COMMENT]
    if not found:
        above = itertools.takewhile(
            lambda line: line.lstrip().startswith("#"), reversed(source[: first - 1])
        )
        found = [line.strip() for line in above][::-1]
    words = " ".join(x.lstrip("# ") for x in found if not _FOR_TOOLS.search(x)).strip()
    return f"{words[0].upper()}{words[1:]}{'' if words.endswith('.') else '.'}" if words else ""


def targets(folder: Path) -> Mapping[str, str]:
    """Returns where each name in docstrings leads: identifiers of the reference, by short name."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.md")):
        for identifier in re.findall(r"^::: ([\w.]+)", path.read_text("utf-8"), re.MULTILINE):
            parts = identifier.split(".")
            for first in range(len(parts) - 1, -1, -1):
                name = ".".join(parts[first:])
                # Two of one name: the shorter path, which users write, keeps it.
                if name not in found or len(identifier) < len(found[name]):
                    found[name] = identifier
    return found


def separated(text: str) -> str:
    """Returns a docstring in which every argument has an item: ``a, b: text`` becomes two."""
    return _ITEM_OF_SEVERAL.sub(
        lambda item: "".join(f"{item[1]}{name}:{item[3]}" for name in item[2].split(", ")), text
    )


def typed(text: str, returned: str) -> str:
    """Returns a docstring whose section "Returns:" begins with the type that is returned.

    Griffe would take the text before the first colon of the section for the type.
    """
    return re.sub(
        r"^(Returns:\n +)(?=\S)", lambda match: f"{match[1]}{returned}: ", text, flags=re.MULTILINE
    )


def markdown(text: str, links: Mapping[str, str]) -> str:
    """Returns a docstring as Markdown.

    Args:
      text: the docstring, without the indentation that its lines share.
      links: identifiers of the reference, by the names that lead to them.
    """
    lines: list[str] = []
    block: list[str] = []  # the lines of the block that is being read
    indent: int | None = None  # of the line that announced it
    fenced = False
    for line in [*text.splitlines(), "\0"]:
        depth = len(line) - len(line.lstrip())
        if indent is not None:
            if line != "\0" and (not line.strip() or depth > indent):
                block.append(line)
                continue
            lines += _fence(block, indent)
            block, indent = [], None
        if line.lstrip().startswith("```"):
            fenced = not fenced
        if not fenced and line.rstrip().endswith("::"):
            indent = depth
            announced = line.rstrip().removesuffix("::")
            lines += [f"{announced}:", ""] if announced.strip() else []
        elif line != "\0":
            lines.append(line if fenced else _linked(line, links))
    return "\n".join(lines)


def _fence(block: list[str], indent: int) -> list[str]:
    """Returns the lines of a block of code. Its fence is indented like the line before it."""
    while block and not block[0].strip():
        block = block[1:]
    while block and not block[-1].strip():
        block = block[:-1]
    inner = min((len(x) - len(x.lstrip()) for x in block if x.strip()), default=0)
    code = [" " * indent + x[inner:] if x.strip() else "" for x in block]
    language = "python" if _is_python(code) else "text"
    return [f"{' ' * indent}```{language}", *code, f"{' ' * indent}```", ""]


def _is_python(code: list[str]) -> bool:
    try:
        compile("\n".join(x[len(code[0]) - len(code[0].lstrip()) :] for x in code), "", "exec")
    except SyntaxError:
        return False
    return "<-" not in "\n".join(code)


def _linked(line: str, links: Mapping[str, str]) -> str:
    def link(match: re.Match[str]) -> str:
        name = match[1]
        target = links.get(name) or links.get(f"optim_zoo.{name}")
        return f"[`{name}`][{target}]" if target else match[0]

    # Single backticks that are neither part of double ones nor of a link.
    return re.sub(r"(?<![`\[])`([\w.]+)`(?![`\]])", link, line)

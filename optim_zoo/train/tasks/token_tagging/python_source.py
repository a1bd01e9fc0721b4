"""What every word of Python source is: tagged text that any machine has.

The words are the tokens of `tokenize`; strings and comments are cut at blanks. Their tags, found
with `ast`, are ``B-<class>``, and ``I-<class>`` for the second and further words of a string or a
comment:

- ``keyword``, ``number``, ``operator``, ``string``, ``comment``: by the token.
- ``class``: the name in a class statement, a use of a class of the same file or of a built-in one.
- ``function``: the name in a def statement, a use of a function of the same file or of a built-in
  one, and any other name that is called.
- ``parameter``: the name of a parameter in a def or lambda, or of a keyword argument in a call.
- ``attribute``: the name after a dot.

All other names, such as variables, have the tag ``O``.
"""

import ast
import builtins
import io
import keyword
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from optim_zoo.errors import UserError
from optim_zoo.train.files import replace_file
from optim_zoo.train.tasks import text_files
from optim_zoo.train.tasks.bert.vocabulary import digest_of
from optim_zoo.train.tasks.token_tagging import conll
from optim_zoo.train.tasks.token_tagging.conll import Sentence

MOST_WORDS = 32  # words in a sentence: as many whole logical lines as fit

_FORMAT = 1  # increased whenever the same files give other sentences than before
_BYTES = 1_500_000  # of source: enough to learn from, and prepared in a few seconds
_MOST_BYTES_OF_FILE = 120_000
_TABLES = "encodings"  # a folder of the library that mostly holds tables of characters

_Place = tuple[int, int]  # row from 1, column from 0 in bytes of UTF-8: as in ast
_Tagged = list[tuple[str, str]]

_BUILT_IN = {
    name: "class" if isinstance(value, type) else "function"
    for name, value in vars(builtins).items()
    if callable(value) and not name.startswith("_")
}
# From Python 3.12 (3.14) the parts of an f-string (t-string) are tokens of their own.
_STRING_STARTS = {getattr(tokenize, f"{kind}STRING_START", None) for kind in "FT"}
_STRING_ENDS = {getattr(tokenize, f"{kind}STRING_END", None) for kind in "FT"}
_NO_WORDS = {tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER}


class Parts(NamedTuple):
    """Sentences to train on and sentences to evaluate on."""

    train: list[Sentence]
    held_out: list[Sentence]


def load(cache: Path, held_out: float) -> Parts:
    """Returns sentences of the standard library, which ``cache`` keeps as CoNLL files.

    The files of the library come in the order of a hash of their paths, until their size is 1.5 MB.
    The first of them are held out, so that no file is in both parts.

    Args:
      cache: a folder; it is created.
      held_out: the fraction of the words to hold out, in (0, 1).

    Raises:
      UserError: Python was installed without its source, or the cache cannot be written.
    """
    sources = _library()
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    digest = digest_of([str(_FORMAT), version, repr(float(held_out)), *sources])
    names = {part: cache / f"python_{digest[:16]}_{part}.conll" for part in Parts._fields}
    if not all(path.exists() for path in names.values()):
        parts = split([_sentences_of_module(source) for source in sources], held_out)
        cache.mkdir(parents=True, exist_ok=True)
        for part, path in names.items():
            replace_file(path, conll.write(getattr(parts, part)).encode())
    return Parts(
        *(
            list(conll.parse(path.read_text(encoding="utf-8"), str(path), "text"))
            for path in names.values()
        )
    )


def split(files: Sequence[list[Sentence]], held_out: float) -> Parts:
    """Holds out the first files, until these have the fraction ``held_out`` of all words.

    Each part has at least one file.
    """
    sizes = [sum(len(sentence.words) for sentence in file) for file in files]
    cut = 1
    while cut < len(files) - 1 and sum(sizes[:cut]) < held_out * sum(sizes):
        cut += 1
    return Parts(
        [sentence for file in files[cut:] for sentence in file],
        [sentence for file in files[:cut] for sentence in file],
    )


def sentences(source: str, *, tagged: bool = True) -> list[Sentence]:
    """Returns the sentences of a Python file.

    A sentence is as many whole logical lines as have at most 32 words together, or 32 words of a
    longer line.

    Args:
      source: the text of the file.
      tagged: if false, all tags are "O", and the source need not be valid beyond its tokens.

    Raises:
      SyntaxError: the source is not valid.
    """
    try:
        classes = _classes(source) if tagged else {}
        lines = list(_logical_lines(source, classes))
    except (tokenize.TokenError, ValueError, RecursionError) as error:
        raise SyntaxError(f"{error}") from error
    found: list[_Tagged] = [[]]
    for line in lines:
        for start in range(0, len(line), MOST_WORDS):
            words = line[start : start + MOST_WORDS]
            if len(found[-1]) + len(words) > MOST_WORDS:
                found.append([])
            found[-1] += words
    return [
        Sentence(tuple(word for word, _ in words), tuple(tag for _, tag in words))
        for words in found
        if words
    ]


def _library() -> list[str]:
    """Returns the source of files of the standard library, about 1.5 MB in all."""
    root = Path(sysconfig.get_path("stdlib"))
    modules = {
        path.relative_to(root).as_posix(): path
        for path in text_files.library_modules(root)
        if _TABLES not in path.relative_to(root).parts
    }
    sources: dict[str, None] = {}  # without duplicates
    size = 0
    for name in sorted(modules, key=lambda name: digest_of([name])):
        try:
            with tokenize.open(modules[name]) as file:
                source = file.read()
        except (OSError, SyntaxError, ValueError):  # unreadable, or of another encoding
            continue
        if source.strip() and len(source) <= _MOST_BYTES_OF_FILE and source not in sources:
            sources[source] = None
            size += len(source)
        if size >= _BYTES:
            break
    if len(sources) < 2:
        raise UserError(
            f"text: expected the standard library's source files in {root}, but found "
            f"{len(sources)}; name your own CoNLL files instead."
        )
    return list(sources)


def _sentences_of_module(source: str) -> list[Sentence]:
    """Returns the sentences of a file of the library; none if it is not meant to be valid."""
    try:
        return sentences(source)
    except SyntaxError:
        return []


def _classes(source: str) -> dict[_Place, str]:
    """Returns the class of names by the place where they begin."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escapes in the strings of the source
        nodes = list(ast.walk(ast.parse(source)))
    known = dict(_BUILT_IN)
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            known[node.name] = "function"
    known |= {node.name: "class" for node in nodes if isinstance(node, ast.ClassDef)}
    found: dict[_Place, str] = {}
    for node in nodes:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found[node.func.lineno, node.func.col_offset] = known.get(node.func.id, "function")
        elif isinstance(node, ast.Name) and node.id in known:
            found[node.lineno, node.col_offset] = known[node.id]
        elif isinstance(node, ast.arg) or (isinstance(node, ast.keyword) and node.arg):
            found[node.lineno, node.col_offset] = "parameter"
        elif isinstance(node, ast.Attribute) and node.end_col_offset is not None:
            start = node.end_col_offset - len(node.attr.encode())
            found[node.end_lineno or node.lineno, start] = "attribute"
    return found


def _logical_lines(source: str, classes: dict[_Place, str]) -> Iterator[_Tagged]:
    """Yields the tagged words of each logical line, and of each line with only a comment."""
    line: _Tagged = []
    statement = False  # whether the line has more than a comment
    previous = ""
    for token in _whole_strings(source):
        if token.type == tokenize.NEWLINE or (token.type == tokenize.NL and not statement):
            if line:
                yield line
            line, statement, previous = [], False, ""
        elif token.type in _NO_WORDS or token.type == tokenize.NL:
            continue
        else:
            statement = statement or token.type != tokenize.COMMENT
            line += _tagged(token, previous, classes)
            previous = token.string
    if line:
        yield line


def _tagged(
    token: tokenize.TokenInfo, previous: str, classes: dict[_Place, str]
) -> Iterator[tuple[str, str]]:
    """Yields the words of a token with their tags."""
    name = {
        tokenize.STRING: "string",
        tokenize.COMMENT: "comment",
        tokenize.NUMBER: "number",
        tokenize.OP: "operator",
    }.get(token.type, "")
    if token.type == tokenize.NAME:
        row, column = token.start
        place = row, len(token.line[:column].encode())
        if keyword.iskeyword(token.string):
            name = "keyword"
        elif previous in ("def", "class"):
            name = "function" if previous == "def" else "class"
        else:
            name = classes.get(place, "")
    for number, word in enumerate(token.string.split()):
        yield word, f"{'I' if number else 'B'}-{name}" if name else "O"


def _whole_strings(source: str) -> Iterator[tokenize.TokenInfo]:
    """Yields the tokens of a source, with one token for each f-string."""
    rows = io.StringIO(source).readlines()
    depth = 0
    start = (0, 0)
    for token in tokenize.generate_tokens(iter(rows).__next__):
        if token.type in _STRING_STARTS:
            start = start if depth else token.start
            depth += 1
        elif token.type in _STRING_ENDS:
            depth -= 1
            if not depth:
                text = _between(rows, start, token.end)
                yield tokenize.TokenInfo(tokenize.STRING, text, start, token.end, token.line)
        elif not depth:
            yield token


def _between(rows: Sequence[str], start: tuple[int, int], end: tuple[int, int]) -> str:
    """Returns the text between two places, each a row from 1 and a column from 0."""
    (first, left), (last, right) = start, end
    text = "".join(rows[first - 1 : last])
    return text[left : len(text) - len(rows[last - 1]) + right]

"""Text files that tasks read: those that a glob matches, and Python's standard library."""

import glob
import gzip
import os
import zlib
from pathlib import Path

from optim_zoo.errors import UserError

# Folders without modules of the library: installed packages, tests, and programs whose comments
# are mostly test data.
_EXCLUDED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "pydoc_data",
    "__pycache__",
}
_GZIP = b"\x1f\x8b"  # how a file compressed with gzip begins


def matches(pattern: str) -> list[str]:
    """Returns the files that a glob matches, sorted. A file name may contain brackets."""
    pattern = os.path.expanduser(pattern)
    found = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
    return sorted(path for path in set(found) if os.path.isfile(path))


def read(path: str, key: str = "text") -> str:
    """Returns the text of one UTF-8 file, decompressed if necessary.

    Args:
      path: the file.
      key: the key of the config that names it, for messages.

    Raises:
      UserError: the file cannot be read, is not UTF-8, or is a damaged gzip file.
    """
    try:
        content = Path(path).read_bytes()
        return (gzip.decompress(content) if content.startswith(_GZIP) else content).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{key}: expected UTF-8, but {path} has an invalid byte at offset {error.start}; "
            "convert the file or leave it out of the pattern."
        ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{key}: expected a whole file compressed with gzip, but {path} is damaged ({error}); "
            "write it again or leave it out of the pattern."
        ) from error
    except OSError as error:
        raise UserError(
            f"{key}: expected a readable file, but {path} cannot be read ({error.strerror}); "
            "change its permissions or leave it out of the pattern."
        ) from error


def library_modules(root: Path) -> list[Path]:
    """Returns the source files of a standard library under ``root``, by their relative paths."""
    paths = [path.relative_to(root) for path in root.rglob("*.py")]
    return [root / path for path in sorted(paths) if _EXCLUDED_FOLDERS.isdisjoint(path.parts)]

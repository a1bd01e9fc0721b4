"""A hook of mkdocs: makes the pages of the gallery, and puts them into the navigation."""

from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import gallery_numbers
import gallery_text
from optim_zoo.registry import OPTIMIZERS

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "gallery.json"
TABLE = "<!-- the table of all optimizers -->"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds a page for each optimizer below gallery/index.md in the navigation."""
    nav: list[Any] = config.nav or []
    for entry in nav:
        if isinstance(entry, dict) and "gallery/index.md" in (entry.get("Gallery") or ()):
            entry["Gallery"] = ["gallery/index.md", *(f"gallery/{name}.md" for name in OPTIMIZERS)]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of the optimizers."""
    numbers = gallery_numbers.numbers(list(OPTIMIZERS), CACHE)
    for name, entry in OPTIMIZERS.items():
        content = gallery_text.page(entry, numbers[name])
        files.append(File.generated(config, f"gallery/{name}.md", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Puts the table of all optimizers into the first page of the gallery."""
    if page.file.src_uri != "gallery/index.md":
        return markdown
    numbers = gallery_numbers.numbers(list(OPTIMIZERS), CACHE)
    return markdown.replace(TABLE, gallery_text.overview(OPTIMIZERS.values(), numbers))

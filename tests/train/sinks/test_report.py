import base64
import html.parser
import json
import pathlib
from collections.abc import Mapping

import numpy as np
import pytest

from optim_zoo import errors
from optim_zoo.train import records
from optim_zoo.train.sinks import plots, report
from optim_zoo.train.sinks.base import opened
from optim_zoo.train.sinks.plots import lines
from tests.train.sinks.run_info import run_info

VOID = {"meta", "img", "wbr"}
EVIL = "<script>alert('\"&')</script>"


class Page(html.parser.HTMLParser):
    """Parses a page: elements with attributes, texts, and whether elements are closed in order."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def pictures(tmp_path: pathlib.Path) -> list[pathlib.Path]:
    steps = np.arange(3.0)
    train = {"loss": (steps, steps + 1), "learning_rate": (steps, steps)}
    return plots.write_all(
        records.Records(steps, train, {}, {}), tmp_path, baseline=None, loss_unit="nats"
    )


def write(
    folder: pathlib.Path,
    title: str = "bert_tiny",
    config: Mapping[str, Mapping[str, object]] | None = None,
    machine: Mapping[str, str] | None = None,
    figures: Mapping[str, str] | None = None,
    pictures: list[pathlib.Path] | None = None,
) -> str:
    path = report.write(
        folder,
        title=title,
        config=config or {},
        machine=machine or {},
        figures=figures or {},
        plots=pictures or [],
    )
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


def test_the_page_is_valid_html_with_language_width_and_colour_schemes(
    tmp_path: pathlib.Path, pictures: list[pathlib.Path]
) -> None:
    source = write(tmp_path, pictures=pictures, config={"run": {"steps": 1}}, figures={"a": "b"})
    assert source.startswith("<!DOCTYPE html>\n")
    page = Page(source)
    assert page.all("html") == [{"lang": "en"}]
    assert {"charset": "utf-8"} in page.all("meta")
    assert [m["content"] for m in page.all("meta") if m.get("name") == "viewport"] == [
        "width=device-width, initial-scale=1"
    ]
    for rule in ("prefers-color-scheme: dark", "@media print"):
        assert rule in source


def test_the_page_is_self_contained(tmp_path: pathlib.Path, pictures: list[pathlib.Path]) -> None:
    source = write(tmp_path, pictures=pictures)
    page = Page(source)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.elements}
    assert all(not {"href", "srcset"} & attributes.keys() for _, attributes in page.elements)
    assert "url(" not in source
    assert "://" not in source
    images = page.all("img")
    assert len(images) == len(pictures) == 2
    for image, path in zip(images, pictures, strict=True):
        head, _, data = str(image["src"]).partition(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(data) == path.read_bytes()


def test_plots_have_a_size_alt_text_and_a_caption(
    tmp_path: pathlib.Path, pictures: list[pathlib.Path]
) -> None:
    page = Page(write(tmp_path, pictures=pictures))
    images = page.all("img")
    assert [image["alt"] for image in images] == [
        "Plot of the loss by step",
        "Plot of the learning rate by step",
    ]
    # 9.0 x 4.2 inches at 96 CSS pixels per inch.
    assert (images[0]["width"], images[0]["height"]) == ("864", "403")
    assert plots.CAPTIONS["loss.png"] in page.texts


def test_a_run_resumed_after_its_last_step_shows_the_plots_of_its_metrics(
    tmp_path: pathlib.Path,
) -> None:
    """It evaluates nothing. Plots of classes come last."""
    values = {"loss": 1.0, "confusion/a/a": 1.0, "f1": 0.5, "f1/a": 0.5, "recall": 0.5}
    line = {"kind": "held_out", "step": 20, **values}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    read = records.read(tmp_path / "metrics.jsonl")
    plots.write_all(read, tmp_path, baseline=None, loss_unit="nats")
    with opened([report.Report()], run_info(tmp_path, start=20)):
        pass
    page = Page((tmp_path / "report.html").read_text())
    assert [str(image["alt"]).removeprefix("Plot of the ") for image in page.all("img")] == [
        *("loss by step", "held out f1 by step", "held out recall by step"),
        *("held out f1 by class by step", "held out confusion by step"),
    ]
    assert {"held-out F1", "F1 on the held-out data, at every evaluation."} <= set(page.texts)


def test_figures_come_first_then_plots_config_and_machine(
    tmp_path: pathlib.Path, pictures: list[pathlib.Path]
) -> None:
    source = write(
        tmp_path,
        figures={"held-out loss": "2.617 nats"},
        pictures=pictures,
        config={"optimizer": {"learning_rate": 1e-6, "exclude": ["bias"], "on": True}},
        machine={"device": "1 cpu"},
    )
    expected = [
        "held-out loss",
        "2.617 nats",
        plots.CAPTIONS["loss.png"],
        "optimizer",
        "rate",
        "1e-06",
        '["bias"]',
        "true",
        "device",
        "1 cpu",
    ]
    texts = iter(Page(source).texts)
    assert [text for text in expected if text in texts] == expected


def test_text_from_the_user_is_escaped(tmp_path: pathlib.Path) -> None:
    source = write(
        tmp_path,
        title=EVIL,
        config={EVIL: {EVIL: EVIL, "list": [EVIL]}},
        machine={EVIL: EVIL},
        figures={EVIL: EVIL},
    )
    page = Page(source)
    assert page.all("script") == []
    assert page.texts.count(EVIL) == 9  # the title, the heading and seven values


def test_the_name_of_a_plot_is_escaped(tmp_path: pathlib.Path) -> None:
    steps = np.arange(2.0)
    recorded = records.Records(steps, {"loss": (steps, steps)}, {}, {})
    path = tmp_path / 'a"><b>.png'
    lines.loss(recorded, path, baseline=None, unit="nats")
    page = Page(write(tmp_path, pictures=[path]))
    assert page.all("b") == []
    assert page.all("img")[0]["alt"] == 'Plot of the a"><b> by step'


def test_empty_sections_are_left_out(tmp_path: pathlib.Path) -> None:
    page = Page(write(tmp_path))
    assert page.all("h2") == []
    assert page.all("h1") == [{}]


def test_a_report_replaces_the_previous_one_and_leaves_no_other_file(
    tmp_path: pathlib.Path,
) -> None:
    write(tmp_path, title="first")
    assert "first" not in write(tmp_path, title="second")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_missing_plot_or_folder_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(errors.UserError, match=r"expected the plot .*absent\.png"):
        write(tmp_path, pictures=[tmp_path / "absent.png"])
    with pytest.raises(errors.UserError, match=r"expected to write .*report\.html"):
        write(tmp_path / "absent")

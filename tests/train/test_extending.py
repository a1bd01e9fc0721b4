"""Custom tasks and sinks, taken from the pages in ``docs``."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from optim_zoo.errors import UserError
from optim_zoo.train import config_file, job, tasks

pytestmark = pytest.mark.usefixtures("quick_to_compile")

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def block(page: str, language: str, number: int = 0) -> str:
    """Returns the content of a code block of a page."""
    text = (DOCS / page).read_text("utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)[number]


def run(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    """Runs a command of a page in ``folder``, on one device.

    ``-P`` keeps the folder out of ``sys.path``, as with the installed command.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    command = command.replace("optim-zoo ", f"{sys.executable} -P -m optim_zoo.cli ")
    return subprocess.run(
        command, shell=True, cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with the files of the page about tasks."""
    folder = tmp_path_factory.mktemp("line")
    (folder / "line_task.py").write_text(block("your_own_task.md", "python"))
    (folder / "fine_line_task.py").write_text(block("your_own_task.md", "python", 1))
    (folder / "line.toml").write_text(block("your_own_task.md", "toml"))
    return folder


def test_the_task_of_the_page_learns_and_resumes(line: Path) -> None:
    done = run(line, block("your_own_task.md", "sh"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "held-out loss: 0.0001" in done.stdout  # the variance of the noise: 0.01 squared
    assert "points: 12,800" in done.stdout
    folder = line / "runs" / "line"
    records = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["points"] == 640
    config = (folder / "config.toml").read_text()
    assert "[points]\nslope = 2.0\nnoise = 0.01\n" in config
    again = run(line, block("your_own_task.md", "sh"))
    assert again.stdout.startswith("resuming from the checkpoint of step 200 in runs/line\n")


@pytest.fixture(scope="module")
def trained(line: Path) -> Path:
    """Returns the same folder after the first command of the page: it has the run ``line``."""
    done = run(line, block("your_own_task.md", "sh"))
    assert (done.returncode, done.stderr) == (0, "")
    return line


def held_out(folder: Path) -> list[dict[str, float]]:
    """Returns the held-out metrics of a run in the order in which they were logged."""
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["kind"] == "held_out"]


@pytest.mark.slow
def test_the_task_of_the_page_starts_from_another_run_and_has_a_metric(trained: Path) -> None:
    fine_tune, evaluate = block("your_own_task.md", "sh", 1).splitlines()
    short = "train.steps=1 output.evaluate_every=1"
    done = run(trained, f"{fine_tune} {short}")
    assert (done.returncode, done.stderr) == (0, "")
    [first] = held_out(trained / "runs" / "fine")
    # One step of Adam moves the slope by the learning rate, 0.1, from 2 towards 2.5. The run that
    # it starts from has found 2 to 0.01, a tenth of its noise.
    assert first["slope_error"] == pytest.approx(0.4, abs=0.02)
    assert re.search(r"held-out slope_error: 0\.[34]\d+", done.stdout)
    scratch = run(trained, f"{fine_tune} {short} run.dir=runs/scratch start.run=unset")
    assert (scratch.returncode, scratch.stderr) == (0, "")
    assert held_out(trained / "runs" / "scratch")[0]["slope_error"] > 2
    evaluated = run(trained, evaluate)
    assert (evaluated.returncode, evaluated.stderr) == (0, "")
    loss, error = evaluated.stdout.splitlines()
    assert error == f"slope_error: {first['slope_error']:.4f}"
    assert float(loss.removeprefix("loss: ")) > first["loss"] + 0.1  # the noise: 0.5 squared
    (trained / "runs" / "line").rename(trained / "runs" / "moved")
    resumed = run(trained, f"{fine_tune} {short}")
    (trained / "runs" / "moved").rename(trained / "runs" / "line")
    assert (resumed.returncode, resumed.stderr) == (0, "")
    assert resumed.stdout.startswith("resuming from the checkpoint of step 1 in runs/fine\n")


def test_a_run_to_start_from_that_does_not_exist_is_reported_in_one_sentence(line: Path) -> None:
    fine_tune, _ = block("your_own_task.md", "sh", 1).splitlines()
    done = run(line, f"{fine_tune} run.dir=runs/none start.run=runs/nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("optim-zoo: expected the folder of a run, but ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("points.nois=1", "unknown key in [points] 'nois'; did you mean noise?"),
        ("points.noise=loud", "points.noise must be a number, got 'loud'"),
        ("data.text=x", "unknown section 'data'"),
        ("task.name=line_task:Lime", "[task] name must be the import path of a task"),
        ("task.name=lime_task:Line", "Python finds no module lime_task"),
        ("task.name=line_task:Points", "a subclass of optim_zoo.train.tasks.base.Task"),
    ],
)
def test_a_mistake_in_a_config_of_the_page_names_the_override(
    override: str, expected: str, line: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(line))
    with pytest.raises(UserError) as caught:
        config_file.load(line / "line.toml", [override])
    assert str(caught.value).startswith(f"command line ({override}): ")
    assert expected in str(caught.value)


def test_a_task_may_return_a_plain_pair_as_its_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = block("your_own_task.md", "python")
    plain = page.replace("WeightedLoss(jnp.sum", "(jnp.sum")
    assert plain != page
    steps = []
    for name, text in (("weighted_task", page), ("plain_task", plain)):
        (tmp_path / f"{name}.py").write_text(text)
        (tmp_path / "line.toml").write_text(block("your_own_task.md", "toml"))
        monkeypatch.syspath_prepend(str(tmp_path))
        config = config_file.load(tmp_path / "line.toml", [f"task.name={name}:Line"])
        prepared = job.prepare(config, tmp_path)
        params, _, loss = prepared.step(0, *prepared.init())
        steps.append((jax.device_get(params), float(loss), prepared.evaluate(params)))
    assert steps[0] == steps[1]


def _prepared(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, found: str) -> job.Job:
    """Returns the job of the page's task with a method `pretrained` that returns ``found``."""
    method = f"    def pretrained(self, params):\n        return {found}\n\n    def loss("
    page = block("your_own_task.md", "python").replace("    def loss(", method)
    (folder / f"{name}.py").write_text(page)
    (folder / "line.toml").write_text(block("your_own_task.md", "toml"))
    monkeypatch.syspath_prepend(str(folder))
    overrides = [f"task.name={name}:Line", "precision.parameters=bfloat16"]
    return job.prepare(config_file.load(folder / "line.toml", overrides), folder)


def test_a_run_starts_from_pretrained_parameters_in_its_own_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = "{**params, 'slope': np.float64(1.5)}"
    prepared = _prepared(tmp_path, monkeypatch, "pretrained_task", found)
    params = prepared.plain(prepared.init()[0])
    assert {name: float(x) for name, x in params.items()} == {"slope": 1.5, "offset": 0.0}
    assert {str(x.dtype) for x in params.values()} == {"bfloat16"}
    resumed = prepared.plain(prepared.init(anew=False)[0])
    assert float(resumed["slope"]) == 0.0


def test_pretrained_parameters_of_other_shapes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = _prepared(tmp_path, monkeypatch, "misshaped_task", "{**params, 'slope': np.ones(2)}")
    with pytest.raises(ValueError, match="structure and shapes of params"):
        prepared.init()


def test_the_command_exits_with_2_if_the_task_does_not_exist(line: Path) -> None:
    done = run(line, "optim-zoo train line.toml task.name=lime_task:Line")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("optim-zoo: command line (task.name=lime_task:Line): [task] ")
    assert done.stderr.count("\n") == 1


def test_the_sink_of_the_page_receives_what_a_run_logs(tmp_path: Path) -> None:
    (tmp_path / "csv_sink.py").write_text(block("your_own_sink.md", "python"))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    command = block("your_own_sink.md", "sh").rstrip()
    done = run(tmp_path, f"{command} train.steps=40 output.evaluate_every=20")
    assert (done.returncode, done.stderr) == (0, "")
    lines = (tmp_path / "runs/digits_lars/loss.csv").read_text().splitlines()
    assert lines[0] == "step,loss"
    assert [int(text.split(",")[0]) for text in lines[1:]] == list(range(5, 41, 5))
    assert re.search(r"^step 20: loss=\d\.\d{4}, accuracy=0\.\d{4}$", done.stdout, re.MULTILINE)
    made = {path.name for path in (tmp_path / "runs/digits_lars").iterdir()}
    assert "report.html" in made
    assert "loss.png" not in made  # plots are not among the sinks of this command


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("masked_langage", "unknown name 'masked_langage'; did you mean masked_language"),
        ("json:Task", "the module json has no Task"),
        ("json:JSONDecoder", "must name a subclass of optim_zoo.train.tasks.base.Task"),
        ("no_such_package.task:Task", "Python finds no module no_such_package"),
        ("json:", "must be the import path of a task, package.module:Class"),
    ],
)
def test_a_task_that_does_not_exist_is_named(name: str, expected: str) -> None:
    with pytest.raises(ValueError if "JSON" not in name else TypeError) as caught:
        tasks.find(name)
    assert expected in str(caught.value)


def test_a_section_that_every_config_has_cannot_belong_to_a_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "greedy_task.py").write_text(
        "import dataclasses\nfrom optim_zoo.train.tasks.digits import Digits\n"
        "@dataclasses.dataclass(frozen=True)\nclass Train:\n    x: int = 1\n"
        'class Greedy(Digits):\n    sections = {"train": Train}\n'
    )
    (tmp_path / "run.toml").write_text("[schedule]\nlearning_rate = 1\nwarmup_steps = 2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="a task without a section train, which every config has"):
        config_file.load(tmp_path / "run.toml", ["task.name=greedy_task:Greedy"])

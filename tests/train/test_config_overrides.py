"""Overrides: another optimizer with the same file, removed keys, nested keys, numbers too large."""

import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest

from optim_zoo import catalogue, registry
from optim_zoo.errors import UserError
from optim_zoo.train import config, config_file, optimization, saved_config
from optim_zoo.train.config_values import arguments_of
from optim_zoo.train.tasks.digits import Digits
from optim_zoo.train.tasks.masked_language.task import MaskedLanguage

CONFIGS = sorted((Path(__file__).parent.parent.parent / "configs").glob("*.toml"))
ALONE = [name for name, entry in registry.OPTIMIZERS.items() if not entry.wraps]
PORTS = [f"{library}.{port}" for library, made in catalogue.libraries().items() for port in made]
WRAPPING_PORTS = [name for name in PORTS if "Lookahead" in name]
SCHEDULING_PORTS = [name for name in PORTS if name.endswith(".create_optimizer")]
TOO_LARGE = 99999999999999999999
SMALL = """
[optimizer]
name = "lamb"
b1 = 0.8
exclude_from_layer_adaptation = ["bias"]
[schedule]
name = "warmup_polynomial"
learning_rate = 0.01
warmup_steps = 4
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(SMALL)
    return path


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        config_file.load(path, overrides)
    return str(caught.value)


# Another optimizer, schedule or task with the same file


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_shipped_config_works_with_every_optimizer(file: Path, name: str) -> None:
    notes: list[str] = []
    loaded = config_file.load(file, [f"optimizer.name={name}"], notes)
    assert loaded.optimizer.name == name
    optimization.make_optimizer(loaded, ())
    file_keys = config_file.read(file)["optimizer"].keys() - {"name"}
    unknown = file_keys - arguments_of("optimizer", name).keys()
    assert {note.split()[1] for note in notes} == {f"optimizer.{key}" for key in unknown}
    for key in file_keys - unknown:  # arguments of both optimizers are kept
        value = config_file.read(file)["optimizer"][key]
        assert loaded.optimizer.arguments[key] == (tuple(value) if type(value) is list else value)


# Arguments without a default, which a config must set.
REQUIRED = {
    "tensorflow_addons.AdamW": ["optimizer.weight_decay=0.1"],
    "tensorflow_addons.SGDW": ["optimizer.weight_decay=0.1"],
    "tf1.MomentumOptimizer": ["optimizer.momentum=0.9"],
}


@pytest.mark.parametrize("name", sorted({*PORTS} - {*WRAPPING_PORTS} - {*SCHEDULING_PORTS}))
def test_ports_can_be_named_in_a_config(name: str, path: Path, tmp_path: Path) -> None:
    needed = REQUIRED.get(name, [])
    loaded = config_file.load(path, [f'optimizer.name="{name}"', *needed])
    assert loaded.optimizer.name == name
    assert config_file.load(path, [f"optimizer.name=ports.{name}", *needed]) == loaded
    (tmp_path / "again.toml").write_text(saved_config.to_toml(loaded))
    assert config_file.load(tmp_path / "again.toml") == loaded
    if needed:
        key = needed[0].partition("=")[0]
        error = refused(path, f"optimizer.name={name}")
        assert error == f"command line (optimizer.name={name}): {key} is missing; {name} needs it"


@pytest.mark.parametrize("name", [*WRAPPING_PORTS, *SCHEDULING_PORTS])
def test_ports_that_a_config_cannot_express_are_refused(name: str, path: Path) -> None:
    error = refused(path, f"optimizer.name={name}")
    assert error.startswith(f"command line (optimizer.name={name}): ")
    assert "schedule of its own" in error if name in SCHEDULING_PORTS else "wraps another" in error


def test_an_unsupported_argument_of_a_port_is_refused(path: Path) -> None:
    error = refused(path, "optimizer.name=apex.FusedLAMB", "optimizer.amsgrad=true")
    assert "command line (optimizer.amsgrad=true)" in error


def test_an_override_that_the_new_optimizer_lacks_is_refused(
    path: Path,
) -> None:
    override = 'optimizer.exclude_from_layer_adaptation=["x"]'
    error = refused(path, "optimizer.name=adamw", override)
    assert error.startswith(f"command line ({override}): unknown key in [optimizer] for adamw")


def test_a_misspelled_key_of_the_file_is_refused_for_every_optimizer(path: Path) -> None:
    path.write_text(SMALL.replace("b1 =", "b_1 ="))
    for overrides in ((), ("optimizer.name=adamw",), ("optimizer.name=lamb",)):
        assert refused(path, *overrides).startswith(f"{path}: unknown key in [optimizer] for ")


def test_an_override_with_the_same_optimizer_drops_nothing(path: Path) -> None:
    notes: list[str] = []
    assert config_file.load(path, ["optimizer.name=lamb"], notes) == config_file.load(path)
    assert notes == []


def test_another_schedule_drops_unknown_arguments_also_in_stages(path: Path) -> None:
    path.write_text(SMALL + "[[stages]]\nsteps = 9\nwarmup_steps = 2\n[[stages]]\nsteps = 5\n")
    notes: list[str] = []
    loaded = config_file.load(path, ["schedule.name=constant"], notes)
    assert [dict(stage.table) for stage in loaded.stages] == [{"steps": 9}, {"steps": 5}]
    assert loaded.schedule.arguments["learning_rate"] == 0.01
    assert [note.split()[1] for note in notes] == ["schedule.warmup_steps", "stages.0.warmup_steps"]
    override = "stages.1.warmup_steps=2"
    assert override in refused(path, "schedule.name=constant", override)


def test_another_task_drops_unknown_keys(path: Path) -> None:
    path.write_text(
        SMALL + "[data]\nsequence_length = 64\n[model]\nhidden_size = 8\nnum_heads = 2\n"
    )
    notes: list[str] = []
    loaded = config_file.load(path, ["task.name=digits"], notes)
    assert loaded.task_sections["model"].hidden_size == 8
    assert {note.split()[1] for note in notes} == {"data.sequence_length", "model.num_heads"}
    assert f"{path} is ignored: digits does not have it" in notes[0]
    assert "model.num_heads=2" in refused(path, "task.name=digits", "model.num_heads=2")


# unset


def test_unset_removes_a_key(path: Path) -> None:
    plain = config_file.load(path)
    assert plain.optimizer.arguments["b1"] == 0.8
    assert config_file.load(path, ["optimizer.b1=unset"]).optimizer.arguments["b1"] == 0.9
    assert config_file.load(path, ["optimizer.b2=unset"]) == plain  # nothing to remove
    assert config_file.load(path, ["train.steps=5", "train.steps=unset"]) == plain
    assert config_file.load(path, ["optimizer.b1=unset", "optimizer.b1=0.8"]) == plain
    assert config_file.load(path, ["optimizer.name=unset"]) == plain
    assert config_file.load(path, ["run.dir=unset"]) == plain
    assert config_file.load(path, ["run.dir='unset'"]).run.dir == "unset"


def test_unset_removes_a_key_of_a_stage(path: Path) -> None:
    path.write_text(SMALL + "[[stages]]\nsteps = 9\n[[stages]]\nwarmup_steps = 2\n")
    loaded = config_file.load(path, ["stages.0.steps=unset", "stages.1.warmup_steps=unset"])
    assert [dict(stage.table) for stage in loaded.stages] == [{}, {}]


@pytest.mark.parametrize(
    "override", ["optimizer.b_1=unset", "train.stepz=unset", "stages.0.stepz=unset"]
)
def test_unset_of_an_unknown_key_is_refused(override: str, path: Path) -> None:
    assert refused(path, override).startswith(f"command line ({override}): unknown key in [")


def test_unset_of_a_required_key_is_refused(path: Path) -> None:
    assert refused(path, "schedule.learning_rate=unset") == (
        "command line (schedule.learning_rate=unset): schedule.learning_rate is missing; "
        "warmup_polynomial needs it"
    )


# Misspelled names


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("adamW", "adamw"),
        ("LAMB", "lamb"),
        ("torch.adamw", "torch.AdamW"),
        ("FusedLAMB", "apex.FusedLAMB"),
        ("lamp", "lamb"),
    ],
)
def test_the_nearest_name_ignores_case(name: str, near: str, path: Path) -> None:
    assert f"unknown optimizer {name!r}; did you mean {near}" in refused(
        path, f"optimizer.name={name}"
    )


# Values in tables and lists, and values that are too large


def test_a_key_of_a_table_can_be_overridden(path: Path) -> None:
    loaded = config_file.load(path, ["precision.state.nu=bfloat16", "precision.state.mu=bfloat16"])
    assert loaded.precision.state == {"nu": "bfloat16", "mu": "bfloat16"}
    path.write_text(SMALL + '[precision]\nstate = {mu = "bfloat16"}\n')
    loaded = config_file.load(path, ["precision.state.nu=bfloat16"])
    assert loaded.precision.state == {"nu": "bfloat16", "mu": "bfloat16"}
    assert config_file.load(path, ["precision.state.mu=unset"]).precision.state == {}
    for override in ("precision.state.nu=float64", "precision.state.nu=float16"):
        assert refused(path, override).startswith(f"command line ({override}): [precision] ")


def integer_keys() -> list[str]:
    sections: dict[str, Any] = {**config_file.SECTIONS, **MaskedLanguage.sections}
    return [
        f"{section}.{field}"
        for section, kind in sections.items()
        if kind is not config.Choice
        for field, type_ in typing.get_type_hints(kind).items()
        if type_ in (int, float)
    ]


@pytest.mark.parametrize(
    "key",
    [
        *integer_keys(),
        "schedule.warmup_steps",
        "schedule.learning_rate",
        "optimizer.weight_decay",
        "stages.1.steps",
        "stages.1.sequence_length",
        "stages.1.learning_rate",
    ],
)
def test_a_number_that_is_too_large_names_the_override(key: str, path: Path) -> None:
    for number in (TOO_LARGE, -TOO_LARGE):
        override = f"{key}={number}"
        error = refused(path, override)
        assert error.startswith(f"command line ({override}): {key} must be at most ")
        assert str(number) in error


def test_a_number_in_a_list_that_is_too_large_names_the_override(path: Path) -> None:
    override = f"optimizer.phi_bounds=[0, {TOO_LARGE}]"
    assert refused(path, override).startswith(f"command line ({override}): optimizer.phi_bounds ")


def test_stages_that_are_too_long_together_are_refused(path: Path) -> None:
    longest = 2**31 - 1
    assert config_file.load(path, [f"train.steps={longest}"]).total_steps == longest
    error = refused(path, f"train.steps={longest}", "stages.1.steps=5")
    assert "together, got 2147483652" in error


@pytest.mark.parametrize("sections", [MaskedLanguage.sections, Digits.sections])
def test_model_sizes_have_an_upper_limit(sections: Any, tmp_path: Path) -> None:
    """XLA aborts if the number of elements of an array does not fit in 64 bits."""
    model = sections["model"]
    for field in dataclasses.fields(model):
        if isinstance(field.default, int) and not isinstance(field.default, bool):
            with pytest.raises(ValueError, match=f"{field.name} must be at most"):
                model(**{field.name: 2**21})


def test_a_stage_that_is_shorter_than_its_warmup_names_keys_of_the_config(path: Path) -> None:
    assert refused(path, "train.steps=2") == (
        "command line (train.steps=2): schedule.warmup_steps must be at most train.steps, got 4 "
        "and 2: lower schedule.warmup_steps or raise train.steps"
    )
    error = refused(path, "train.steps=9", "stages.1.steps=3")
    assert error.startswith(
        "command line (stages.1.steps=3): schedule.warmup_steps must be at most "
    )
    path.write_text(SMALL.replace("= 4", "= 4000"))
    assert refused(path).startswith(f"{path}: schedule.warmup_steps must be at most train.steps")

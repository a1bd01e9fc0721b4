"""Config files: defaults, types, ranges, names, overrides, round trips, stages and schedules."""

import dataclasses
import inspect
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w

from optim_zoo import ranges, registry, schedules
from optim_zoo.errors import ArgumentValueError, UserError
from optim_zoo.train import config, config_file, optimization, saved_config, tasks
from optim_zoo.train.by_path import ByPath
from optim_zoo.train.config import Config
from optim_zoo.train.tasks.masked_language.task import MaskedLanguage, sequence_length

LEAST = "[schedule]\nlearning_rate = 0.01\nwarmup_steps = 4\n"
TWO_STAGES = (
    "train.steps=10",
    "train.batch_size=8",
    "data.sequence_length=16",
    "schedule.warmup_steps=4",
    "stages.1.steps=6",
    "stages.1.batch_size=4",
    "stages.1.sequence_length=32",
    "stages.1.learning_rate=0.002",
    "stages.1.warmup_steps=2",
)

# A value of the right type, out of range, for every key that has a range.
OUT_OF_RANGE: dict[str, Any] = {
    "run.seed": -1,
    "task.name": "masked_langage",
    "data.held_out": 1.0,
    "data.sequence_length": 7,
    "model.num_layers": 0,
    "model.hidden_size": 0,
    "model.num_heads": 0,
    "model.intermediate_size": 0,
    "data.masking_rate": 0.0,
    "model.max_positions": 7,
    "model.activation": "relu",
    "model.dropout": 1.0,
    "model.dtype": "float16",
    "model.resize_positions": True,
    "train.steps": 0,
    "train.batch_size": 0,
    "train.micro_batches": 0,
    "train.clip_norm": 0.0,
    "precision.parameters": "float16",
    "precision.wrapper": "master",
    "precision.state": {"mu": "float64"},
    "accumulation.every": 0,
    "averaging.decay": 1.0,
    "guards.window": 1,
    "guards.factor": 1.0,
    "guards.max_consecutive": 0,
    "output.log_every": 0,
    "output.evaluate_every": 0,
    "output.evaluation_batches": 0,
    "output.checkpoint_every": 0,
    "output.keep_checkpoints": 0,
    "output.stop_after": -1,
    "output.sinks": ["prgress"],
    "parallel.mode": "threads",
    "distributed.coordinator": "here",
    "distributed.processes": -1,
    "distributed.index": -2,
    "distributed.heartbeat_seconds": 1,
    "distributed.start_seconds": 0,
}
WITHOUT_RANGE = {"run.dir", "run.accept_changes", "data.text", "data.vocabulary"} | {
    "data.whole_word_masking",
    "data.field",
    "model.scan_layers",
    "model.init_from",
    "parallel.zero1",
    "train.noise_scale",
    "guards.nonfinite",
    "guards.spikes",
    "averaging.evaluate",
    "output.keep_best",  # the task is asked whether it measures the metric
}
SECTIONS: dict[str, Any] = {
    name: kind
    for name, kind in {**config_file.SECTIONS, **MaskedLanguage.sections}.items()
    if kind is not config.Choice
}
DEFAULTS = {
    f"{name}.{field.name}": getattr(kind(), field.name)
    for name, kind in SECTIONS.items()
    for field in dataclasses.fields(kind)
}
# The name of every type in messages, and values of other types.
WRONG_TYPES: dict[type, tuple[str, list[Any]]] = {
    int: ("a whole number", ["5", True, 5.0, [5]]),
    float: ("a number", ["0.5", True, [0.5]]),
    str: ("a string", [5, True, ["x"]]),
    bool: ("true or false", [1, "true", [True]]),
    dict: ("a table", ["mu", 1, ["mu"]]),
    tuple: ("a list of strings", ["plots", 1, [1]]),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "run.toml", LEAST)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def section_file(path: Path, key: str, value: Any) -> Path:
    """Writes a config file that sets one key."""
    section, name = key.split(".")
    tree: dict[str, Any] = {"schedule": {"learning_rate": 0.01, "warmup_steps": 4}}
    tree.setdefault(section, {})[name] = value
    return write(path, tomli_w.dumps(tree))


def section_of(loaded: Config, name: str) -> Any:
    own = loaded.task_sections
    return own[name] if name in own else getattr(loaded, name)


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        config_file.load(path, overrides)
    error = str(caught.value)
    assert error
    assert "\n" not in error
    assert "Traceback" not in error
    return error


def test_defaults_are_those_of_the_dataclasses(path: Path) -> None:
    loaded = config_file.load(path)
    for name, kind in SECTIONS.items():
        assert section_of(loaded, name) == kind()
    assert loaded.optimizer.name == "lamb"
    assert loaded.schedule.name == "warmup_polynomial"
    parameters = {
        **inspect.signature(registry.get("lamb").constructor).parameters,
        **inspect.signature(ByPath).parameters,
    }
    for key, value in loaded.optimizer.arguments.items():
        assert value == parameters[key].default


def test_every_key_is_listed_with_a_range_or_without_one() -> None:
    assert OUT_OF_RANGE.keys() | WITHOUT_RANGE == DEFAULTS.keys()


@pytest.mark.parametrize("key", OUT_OF_RANGE)
def test_a_value_out_of_range_names_key_value_and_file(key: str, tmp_path: Path) -> None:
    value = OUT_OF_RANGE[key]
    error = message(section_file(tmp_path / "run.toml", key, value))
    section, name = key.split(".")
    assert error.startswith(f"{tmp_path / 'run.toml'}: [{section}] ")
    assert name in error
    for part in value if isinstance(value, list) else [value]:
        assert str(part) in error


@pytest.mark.parametrize("key", OUT_OF_RANGE)
def test_an_override_out_of_range_is_named(key: str, path: Path) -> None:
    override = f"{key}={OUT_OF_RANGE[key]}"
    assert message(path, override).startswith(f"command line ({override}): ")


@pytest.mark.parametrize("key", DEFAULTS)
def test_a_value_of_the_wrong_type_names_key_type_and_value(key: str, tmp_path: Path) -> None:
    name, wrong = WRONG_TYPES[type(DEFAULTS[key])]
    for value in wrong:
        error = message(section_file(tmp_path / "run.toml", key, value))
        assert error == f"{tmp_path / 'run.toml'}: {key} must be {name}, got {value!r}"


@pytest.mark.parametrize("key", [k for k, v in DEFAULTS.items() if type(v) is float])
def test_whole_numbers_are_accepted_as_floats(key: str, tmp_path: Path) -> None:
    if key in ("data.held_out", "data.masking_rate", "model.dropout", "averaging.decay"):
        return  # the only whole numbers, 0 and 1, are the default or out of range
    section, name = key.split(".")
    loaded = config_file.load(section_file(tmp_path / "run.toml", key, 2))
    value = getattr(section_of(loaded, section), name)
    assert value == 2.0
    assert type(value) is float


def test_contradictory_guards_are_refused(path: Path) -> None:
    error = message(path, "guards.spikes=true", "guards.nonfinite=false")
    assert "[guards] spikes=true also skips steps that are not finite" in error


def test_a_section_may_contain_a_table(path: Path) -> None:
    """The table can be set, saved and loaded, and its values are checked."""
    loaded = config_file.load(path, ['precision.state={mu="bfloat16", nu="bfloat16"}'])
    assert loaded.precision.state == {"mu": "bfloat16", "nu": "bfloat16"}
    again = config_file.load(write(path, saved_config.to_toml(loaded)))
    assert again == loaded
    assert "precision.state.mu must be a string, got 1" in message(path, "precision.state={mu=1}")
    error = message(path, 'precision.state={nu="float16"}')
    assert "[precision] unknown dtype for nu 'float16'; did you mean bfloat16?" in error


@pytest.mark.parametrize("value", ["nan", "-nan"])
def test_nan_is_refused(value: str, path: Path) -> None:
    for key in ("train.clip_norm", "schedule.learning_rate", "optimizer.eps"):
        assert key.split(".")[1] in message(path, f"{key}={value}")


@pytest.mark.parametrize(
    ("override", "near"),
    [
        ("trian.steps=5", "did you mean train"),
        ("train.stepz=5", "did you mean steps"),
        ("optimizer.weight_decy=0.1", "did you mean weight_decay"),
        ("schedule.warmup=5", "did you mean warmup_steps"),
        ("optimizer.name=lamp", "did you mean lamb"),
        ("schedule.name=warmup_cosin", "did you mean warmup_cosine"),
        ("task.name=masked_langage", "did you mean masked_language"),
        ("model.dtype=bfloat61", "did you mean bfloat16"),
    ],
)
def test_unknown_names_are_reported_with_the_nearest_name_and_their_source(
    override: str, near: str, path: Path
) -> None:
    error = message(path, override)
    assert error.startswith(f"command line ({override}): ")
    assert near in error
    key, value = override.split("=")
    section, name = key.split(".")
    unknown = section if section == "trian" else value if name in ("name", "dtype") else name
    assert f"unknown {'section' if section == 'trian' else ''}" in error
    assert repr(unknown) in error
    # The same in the file.
    number = value if value == "5" or "." in value else f'"{value}"'
    lines = f"[{section}]\n{name} = {number}\n"
    if section == "schedule":
        lines += LEAST.removeprefix("[schedule]\n")
    else:
        lines += LEAST
    error = message(write(path, lines))
    assert error.startswith(f"{path}: ")
    assert near in error


def test_every_task_has_a_name_in_the_config(path: Path) -> None:
    for name, import_path in tasks.TASKS.items():
        assert config_file.load(path, [f"task.name={name}"]).task.name == name
        assert config_file.load(path, [f"task.name={import_path}"]).task.name == import_path


@pytest.mark.parametrize("key", ["optimizer.learning_rate", "optimizer.layers", "optimizer.axis"])
def test_arguments_that_the_job_sets_cannot_be_configured(key: str, path: Path) -> None:
    assert f"unknown key in [optimizer] for lamb '{key.split('.')[1]}'" in message(path, f"{key}=1")
    assert "total_steps" in message(path, "schedule.total_steps=5")


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("optimizer.b1=1.5", "b1"),
        ("optimizer.weight_decay=high", "weight_decay"),
        ("optimizer.bias_correction=flase", "bias_correction"),
        ("optimizer.exclude_from_weight_decay=bias", "exclude_from_weight_decay"),
        ("optimizer.exclude_from_weight_decay=['(']", "exclude_from_weight_decay"),
        ("optimizer.phi_bounds=[2, 1]", "phi_bounds"),
        ("optimizer.phi_bounds=3", "phi_bounds"),
        ("schedule.learning_rate=fast", "learning_rate"),
        ("schedule.learning_rate=-1", "learning_rate"),
        ("schedule.learning_rate=inf", "learning_rate"),
        ("schedule.learning_rate=true", "learning_rate"),
        ("schedule.warmup_steps=2.5", "warmup_steps"),
        ("schedule.warmup_steps=5000", "warmup_steps"),
        ("schedule.power=0", "power"),
    ],
)
def test_arguments_of_optimizer_and_schedule_are_checked_when_loaded(
    override: str, word: str, path: Path
) -> None:
    """They are checked before the text is read and before a run folder is made."""
    error = message(path, override)
    assert error.startswith(f"command line ({override}): ")
    assert override.split(".")[0] in error
    assert word in error.removeprefix(f"command line ({override})")


@pytest.mark.parametrize("name", [n for n, e in registry.OPTIMIZERS.items() if not e.wraps])
def test_every_optimizer_can_be_configured(name: str, path: Path) -> None:
    parameters = inspect.signature(registry.get(name).constructor).parameters
    values = {
        k: 0.5 if p.default == 0 else p.default * 0.9
        for k, p in parameters.items()
        if isinstance(p.default, float) and k != "learning_rate"
    }
    settings = [f"optimizer.{k}={value!r}" for k, value in values.items()]
    loaded = config_file.load(path, [f"optimizer.name={name}", *settings])
    assert values.items() <= loaded.optimizer.arguments.items()
    optimization.make_optimizer(loaded, ())


@pytest.mark.parametrize("name", [n for n, e in registry.OPTIMIZERS.items() if e.wraps])
def test_an_optimizer_that_wraps_another_is_refused(name: str, path: Path) -> None:
    error = message(path, f"optimizer.name={name}")
    assert f"(optimizer.name={name}): {name} wraps another transformation" in error


@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_every_schedule_can_be_configured(name: str, path: Path) -> None:
    lines = f'[schedule]\nname = "{name}"\nlearning_rate = 0.5\n'
    others = {"constant": "", "exponential": "end_learning_rate = 0.25\n"}
    loaded = config_file.load(write(path, lines + others.get(name, "warmup_steps = 10\n")))
    rates = [float(optimization.make_schedule(loaded)(step)) for step in (0, 10, 999)]
    assert rates[1] == pytest.approx(0.5, rel=0.02)
    assert (rates[0] == 0) == (name not in others)
    assert name != "exponential" or rates[2] == pytest.approx(0.25, rel=1e-5)  # float32


def test_a_missing_learning_rate_names_schedule_and_key(path: Path) -> None:
    error = message(write(path, ""))
    assert error == f"{path}: schedule.learning_rate is missing; warmup_polynomial needs it"
    error = message(write(path, "[schedule]\nlearning_rate = 1\n"))
    assert "schedule.warmup_steps is missing" in error


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("run.dir=runs/one", "runs/one"),
        ("run.dir=123", "123"),
        ("run.dir=true", "true"),
        ("run.dir=[a]", "[a]"),
        ("run.dir=a=b/c d", "a=b/c d"),
        ('run.dir="a b"', "a b"),
        ("run.dir='a b'", "a b"),
        ("run.dir=it's", "it's"),
        ("run.dir=the boys'", "the boys'"),
        ("run.dir=", ""),
        ("run.dir=läufe/ß", "läufe/ß"),
        ("data.text=docs/**/*.txt", "docs/**/*.txt"),
        ("train.steps=5", 5),
        ("train.steps = 5", 5),
        ("train.steps=1_000", 1000),
        ("train.clip_norm=inf", math.inf),
        ("train.clip_norm=1e-3", 1e-3),
        ("run.accept_changes=true", True),
        ("optimizer.name=adamw", "adamw"),
        ("optimizer.exclude_from_weight_decay=['bias', \"Norm=x\"]", ("bias", "Norm=x")),
        ("optimizer.phi_bounds=[0, inf]", (0, math.inf)),
        ("schedule.learning_rate=1", 1),
    ],
)
def test_overrides_are_toml_values_or_bare_strings(override: str, value: Any, path: Path) -> None:
    loaded = config_file.load(path, [override])
    section, key = override.partition("=")[0].strip().split(".")
    chosen = section_of(loaded, section)
    if isinstance(chosen, config.Choice) and key != "name":
        assert chosen.arguments[key] == value
    else:
        assert getattr(chosen, key) == value
        assert type(getattr(chosen, key)) is type(value)


@pytest.mark.parametrize("override", ["train", "train=5", "steps=5", "=5", ".steps=5", "train.=5"])
def test_overrides_of_another_form_are_refused_with_an_example(override: str, path: Path) -> None:
    error = message(path, override)
    assert error.startswith(f"expected section.key=value, got {override!r}")
    assert "train.steps=100" in error


@pytest.mark.parametrize("override", ["train.steps=", "train.steps=-5", "train.steps=five"])
def test_an_invalid_value_names_the_override(override: str, path: Path) -> None:
    assert message(path, override).startswith(f"command line ({override}): ")


def test_the_last_override_of_a_key_replaces_earlier_ones_and_the_file(path: Path) -> None:
    write(path, LEAST + "[train]\nsteps = 7\n")
    assert config_file.load(path).train.steps == 7
    assert config_file.load(path, ["train.steps=8", "train.steps=9"]).train.steps == 9


def test_errors_in_keys_without_an_override_name_the_file(path: Path) -> None:
    write(path, LEAST + "[train]\nbatch_size = -7\n")
    assert message(path, "train.steps=8").startswith(f"{path}: ")


@pytest.mark.parametrize("text", ["train = 5\n", "[[train]]\nsteps = 5\n", 'train = "x"\n'])
def test_a_section_that_is_not_a_table_is_refused(text: str, path: Path) -> None:
    for overrides in ([], ["train.steps=5"]):
        error = message(write(path, text + LEAST), *overrides)
        assert error.startswith(f"{path}: [train] must be a section")


def test_unreadable_files_are_refused(path: Path, tmp_path: Path) -> None:
    assert message(tmp_path / "none.toml") == (
        f"cannot read the config {tmp_path / 'none.toml'}: No such file or directory"
    )
    assert "Is a directory" in message(tmp_path)
    error = message(write(path, "[train\nsteps = 5"))
    assert error.startswith(f"{path} is not valid TOML: ")
    assert "line 1" in error
    path.write_bytes(b"[run]\ndir = '\xff'\n")
    assert "utf-8" in message(path)
    assert "Cannot overwrite a value" in message(write(path, "[run]\nseed=1\nseed=2\n"))


ROUND_TRIPS = [
    (),
    TWO_STAGES,
    ("optimizer.phi_bounds=[0.5, 10.0]", "optimizer.ratio_bounds=[0, inf]"),
    ("train.clip_norm=inf", "run.dir=läufe/日本 \"x\"\\y", "data.text=~/τ/**/*.txt"),
    ("optimizer.exclude_from_weight_decay=['bias$', '\\\\d']", "optimizer.bias_correction=false"),
    ("optimizer.name=bert_adamw",),
    ("optimizer.name=adamw", "schedule.name=warmup_cosine", "schedule.learning_rate=1"),
    ("run.accept_changes=true", "run.seed=1234567890"),
]  # fmt: skip


@pytest.mark.parametrize("overrides", ROUND_TRIPS)
def test_a_saved_config_is_loaded_as_the_same_config(
    overrides: tuple[str, ...], path: Path, tmp_path: Path
) -> None:
    loaded = config_file.load(path, overrides)
    again = config_file.load(write(tmp_path / "again.toml", saved_config.to_toml(loaded)))
    assert again == loaded
    assert saved_config.differences(loaded, again) == []
    assert saved_config.to_toml(again) == saved_config.to_toml(loaded)


def test_launch_settings_are_not_saved_and_not_compared(path: Path, tmp_path: Path) -> None:
    where = ("coordinator=host:1", "processes=2", "index=1", "heartbeat_seconds=7")
    loaded = config_file.load(path, [f"distributed.{setting}" for setting in where])
    assert saved_config.differences(config_file.load(path), loaded) == []
    again = config_file.load(write(tmp_path / "again.toml", saved_config.to_toml(loaded)))
    assert again.distributed == config.Distributed()


@pytest.mark.parametrize("mode", ["shard_map", "pmap"])
def test_zero1_needs_mode_jit(mode: str, path: Path) -> None:
    error = message(path, f"parallel.mode={mode}", "parallel.zero1=true")
    assert error.endswith(f"zero1 belongs to mode 'jit', got it with mode '{mode}'")


def test_optional_patterns_stay_optional_after_saving_and_loading(
    path: Path, tmp_path: Path
) -> None:
    """The defaults of bert_adamw name layer_norm and LayerNorm; a model has only one of them."""
    loaded = config_file.load(path, ["optimizer.name=bert_adamw"])
    again = config_file.load(write(tmp_path / "again.toml", saved_config.to_toml(loaded)))
    patterns = again.optimizer.arguments["exclude_from_weight_decay"]
    assert patterns.is_optional
    params = {"kernel": np.ones(3), "bias": np.ones(3)}
    optimization.make_optimizer(again, ()).init(params)


def test_differences_name_the_key_and_both_values(path: Path) -> None:
    before = config_file.load(path, ["optimizer.phi_bounds=[0, 1]"])
    now = config_file.load(path, ["train.steps=7", "optimizer.weight_decay=0.5"])
    assert saved_config.differences(before, now) == [
        "optimizer.weight_decay: 0.0 -> 0.5",
        "optimizer.phi_bounds: [0, 1] -> unset",
        "train.steps: 1000 -> 7",
    ]
    assert saved_config.differences(before, before) == []


def test_the_run_folder_is_not_compared(path: Path) -> None:
    before, now = (
        config_file.load(path),
        config_file.load(path, ["run.dir=x", "run.accept_changes=true"]),
    )
    assert saved_config.differences(before, now) == []
    assert saved_config.differences(before, config_file.load(path, ["run.seed=1"])) == [
        "run.seed: 0 -> 1"
    ]


def shapes(loaded: Config) -> list[tuple[int, int, int, int]]:
    return [
        (stage.steps, stage.batch_size, stage.micro_batches, sequence_length(stage))
        for stage in loaded.stages
    ]


def test_without_tables_there_is_one_stage(path: Path) -> None:
    one = config_file.load(path)
    assert shapes(one) == [(1000, 256, 1, 128)]
    assert one.total_steps == 1000
    assert [one.stage_of(step) for step in (0, 999, 1000, 2000)] == [0, 0, 0, 0]


def test_a_table_overrides_train_schedule_and_the_task_in_its_stage(path: Path) -> None:
    two = config_file.load(path, TWO_STAGES)
    assert shapes(two) == [(10, 8, 1, 16), (6, 4, 1, 32)]
    assert two.total_steps == 16
    assert [two.stage_of(step) for step in (0, 9, 10, 15)] == [0, 0, 1, 1]
    rates = [(s.schedule["learning_rate"], s.schedule["warmup_steps"]) for s in two.stages]
    assert rates == [(0.01, 4), (0.002, 2)]


def test_a_file_may_define_three_stages(path: Path, tmp_path: Path) -> None:
    write(
        path,
        LEAST + "[train]\nsteps = 20\nbatch_size = 16\n[[stages]]\n[[stages]]\nbatch_size = 8\n"
        "micro_batches = 4\nlearning_rate = 0.5\n[[stages]]\nsteps = 7\nsequence_length = 64\n",
    )
    three = config_file.load(path)
    assert shapes(three) == [(20, 16, 1, 128), (20, 8, 4, 128), (7, 16, 1, 64)]
    assert [s.schedule["learning_rate"] for s in three.stages] == [0.01, 0.5, 0.01]
    assert [three.stage_of(step) for step in (19, 20, 39, 40, 46, 47)] == [0, 1, 1, 2, 2, 2]
    again = saved_config.load(write(tmp_path / "again.toml", saved_config.to_toml(three)))
    assert again == three
    assert shapes(config_file.load(path, ["stages.2.steps=9", "train.steps=30"])) == [
        (30, 16, 1, 128),
        (30, 8, 4, 128),
        (9, 16, 1, 64),
    ]


def test_empty_stages_are_saved_and_loaded(path: Path, tmp_path: Path) -> None:
    two = config_file.load(write(path, LEAST + "[[stages]]\n[[stages]]\n"))
    assert two.total_steps == 2000
    assert saved_config.load(write(tmp_path / "again.toml", saved_config.to_toml(two))) == two
    one = config_file.load(write(path, LEAST + "[[stages]]\n"))
    assert saved_config.differences(two, one)[0] == "stages: 2 -> 1"


def test_batches_are_counted_over_stages_and_accumulation(path: Path) -> None:
    two = config_file.load(path, TWO_STAGES)
    assert [two.batches_after(steps) for steps in (0, 9, 10, 11, 16)] == [
        [0, 0],
        [9, 0],
        [10, 0],
        [10, 1],
        [10, 6],
    ]
    assert config_file.load(path, (*TWO_STAGES, "accumulation.every=3")).batches_after(11) == [
        30,
        3,
    ]


def test_each_stage_warms_up_from_zero(path: Path) -> None:
    two = config_file.load(path, TWO_STAGES)
    schedule = optimization.make_schedule(two)
    rates = np.array([schedule(step) for step in range(17)])
    first = [0, 0.0025, 0.005, 0.0075, *(0.01 * (1 - i / 6) for i in range(6))]
    second = [0, 0.001, *(0.002 * (1 - i / 4) for i in range(4)), 0]
    np.testing.assert_allclose(rates, first + second, rtol=1e-6, atol=1e-9)  # float32


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages.1.steps=0", "[stages.1] steps must be >= 1, got 0"),
        ("stages.1.batch_size=0", "[stages.1] batch_size must be >= 1, got 0"),
        ("stages.1.micro_batches=0", "[stages.1] micro_batches must be >= 1, got 0"),
        ("stages.1.sequence_length=7", "[stages.1] sequence_length must be >= 8, got 7"),
        ("stages.1.learning_rate=-0.1", "[stages.1] learning_rate must be in [0, inf), got -0.1"),
        ("stages.1.warmup_steps=-1", "[stages.1] warmup_steps must be >= 0, got -1"),
        ("stages.1.warmup_steps=7", "stages.1.warmup_steps must be at most stages.1.steps, got 7"),
        ("stages.1.steps=five", "stages.1.steps must be a whole number, got 'five'"),
        ("stages.1.sequence_length=2.5", "stages.1.sequence_length must be a whole number"),
        ("stages.1.stepz=5", "unknown key in [[stages]] 1 'stepz'; did you mean steps"),
        ("stages.1.clip_norm=5", "unknown key in [[stages]] 1 'clip_norm'"),
    ],
)
def test_a_wrong_value_of_a_stage_names_the_stage_and_the_override(
    override: str, expected: str, path: Path
) -> None:
    error = message(path, *TWO_STAGES, override)
    assert error.startswith(f"command line ({override}): ")
    assert expected in error


def test_a_stage_accepts_only_arguments_of_its_schedule(path: Path) -> None:
    path.write_text('[schedule]\nname = "constant"\nlearning_rate = 0.01\n')
    assert "unknown key in [[stages]] 1 'warmup_steps'" in message(path, "stages.1.warmup_steps=2")
    assert config_file.load(path, ["stages.1.steps=5"]).stages[1].steps == 5


@pytest.mark.parametrize(
    "override",
    ["stages.steps=5", "stages.1=5", "stages.x.steps=5", "stages.-1.steps=5", "stages=[]"],
)
def test_overrides_of_stages_need_a_number_and_a_key(override: str, path: Path) -> None:
    error = message(path, override)
    assert error.startswith(f"expected section.key=value, got {override!r}")
    assert "stages.1.steps=100" in error


def test_a_stage_number_beyond_the_next_one_is_refused(path: Path) -> None:
    assert "the config has 1 stages, and a new one has the number 1" in message(
        path, "stages.2.steps=5"
    )


@pytest.mark.parametrize("text", ["stages = 5\n", 'stages = "x"\n', "stages = [1]\n", "[stages]\n"])
def test_stages_that_are_not_tables_are_refused(text: str, path: Path) -> None:
    for overrides in ([], ["stages.0.steps=5"]):
        error = message(write(path, text + LEAST), *overrides)
        assert "[[stages]] must be an array of tables" in error


def test_the_removed_section_second_stage_is_refused_with_its_replacement(path: Path) -> None:
    error = message(write(path, LEAST + "[second_stage]\nsteps = 5\n"))
    assert error == (
        f"{path}: [second_stage] is replaced by [[stages]], one table per stage with what differs "
        "from [train], [schedule] and the task's sections"
    )


def test_a_saved_config_of_version_0_1_is_read(path: Path, tmp_path: Path) -> None:
    old = LEAST + (
        '[task]\nname = "bert_mlm"\n[train]\nsteps = 10\nbatch_size = 8\n[second_stage]\n'
        "steps = {}\nbatch_size = 4\nmicro_batches = 1\nsequence_length = 32\n"
        "learning_rate = 0.002\nwarmup_steps = 2\n[data]\nsequence_length = 16\n"
    )
    saved = write(tmp_path / "old.toml", old.format(0))
    tanh = "model.activation=gelu_tanh"  # the only one that these versions had
    short = ("train.steps=10", "train.batch_size=8", "data.sequence_length=16", tanh)
    assert saved_config.differences(saved_config.load(saved), config_file.load(path, short)) == []
    saved = write(tmp_path / "old.toml", old.format(6))
    two = config_file.load(path, [*TWO_STAGES, tanh])
    assert saved_config.differences(saved_config.load(saved), two) == []


def test_a_saved_config_without_an_activation_keeps_the_one_of_its_version(path: Path) -> None:
    """A config of the user without the key has the default of this version."""
    write(path, LEAST + "[model]\nnum_layers = 2\n")
    saved, now = saved_config.load(path), config_file.load(path)
    assert saved_config.differences(saved, now) == ["model.activation: gelu_tanh -> gelu"]
    again = saved_config.load(write(path, saved_config.to_toml(now)))
    assert saved_config.differences(again, now) == []


def test_max_positions_must_cover_the_longest_sequence(path: Path) -> None:
    assert (
        config_file.load(path, ["data.sequence_length=512"]).task_sections["data"].sequence_length
        == 512
    )
    error = message(path, "data.sequence_length=513")
    assert "model.max_positions must be at least the sequence length 513, got 512" in error
    error = message(path, *TWO_STAGES, "stages.1.sequence_length=1024")
    assert "1024" in error


def test_hidden_size_must_divide_by_heads(path: Path) -> None:
    error = message(path, "model.num_heads=3")
    assert "hidden_size must be divisible by num_heads, got 128 and 3" in error


def test_seeds_have_at_most_32_bits(path: Path) -> None:
    assert config_file.load(path, [f"run.seed={2**32 - 1}"]).run.seed == 2**32 - 1
    assert "seed" in message(path, f"run.seed={2**32}")


def test_check_choice_accepts_a_registry() -> None:
    with pytest.raises(ValueError, match="did you mean lamb"):
        ranges.check_choice("optimizer", "lam", registry.OPTIMIZERS)


@pytest.mark.parametrize(
    ("override", "argument"),
    [
        ("model.num_heads=3", "hidden_size"),
        ("guards.nonfinite=false", "spikes"),
        ("parallel.mode=pmap", "zero1"),
        ("distributed.processes=2", "index"),
    ],
)
def test_an_override_that_contradicts_another_key_is_named(
    override: str, argument: str, path: Path
) -> None:
    write(
        path,
        LEAST + "[guards]\nspikes = true\n[parallel]\nzero1 = true\n"
        '[distributed]\ncoordinator = "here:1"\nindex = 5\nprocesses = 6\n',
    )
    with pytest.raises(UserError) as caught:
        config_file.load(path, [override])
    assert str(caught.value).startswith(f"command line ({override}): [{override.split('.')[0]}] ")
    assert isinstance(caught.value.__cause__, ArgumentValueError)
    assert caught.value.__cause__.argument == argument


def test_an_override_whose_key_only_occurs_in_a_message_is_not_named(path: Path) -> None:
    """The invalid pattern of the file contains the name of a key that is overridden."""
    write(path, LEAST + '[optimizer]\nexclude_from_weight_decay = ["(b1"]\n')
    error = message(path, "optimizer.b1=0.8")
    assert error.startswith(
        f"{path}: [optimizer] exclude_from_weight_decay: '(b1' is not a regular"
    )


def test_the_cause_of_a_user_error_carries_the_argument(path: Path) -> None:
    with pytest.raises(UserError) as caught:
        config_file.load(path, ['precision.state={nu="float16"}'])
    cause = caught.value.__cause__
    assert isinstance(cause, ArgumentValueError)
    assert (cause.argument, cause.received) == ("state", "float16")


def test_a_saved_config_has_absolute_paths(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This applies to all paths of a config, so that the run resumes from any directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    overrides = ["data.text=text/*.txt", "data.vocabulary=~/vocab.txt"]
    loaded = config_file.load(path, overrides)
    saved = tmp_path / "config.toml"
    saved.write_text(saved_config.of_run(loaded, Path("runs/one")))
    again = saved_config.load(saved)
    assert again.run.dir == str(tmp_path / "runs/one")
    assert again.task_sections["data"].text == str(tmp_path / "text/*.txt")
    assert again.task_sections["data"].vocabulary == "/home/me/vocab.txt"
    assert saved_config.differences(loaded, again) == []
    defaults = saved_config.of_run(config_file.load(path), Path("/x"))
    assert 'text = ""' in defaults  # the default is not a path


def test_a_changed_optimizer_is_named_before_its_arguments(path: Path) -> None:
    before = config_file.load(path)
    now = config_file.load(path, ["optimizer.name=lars"])
    assert saved_config.differences(before, now) == [
        "optimizer.name: lamb -> lars",
        "optimizer.eps: 1e-06 -> 0.0",
        "optimizer.weight_decay: 0.0 -> 0.0001",
    ]

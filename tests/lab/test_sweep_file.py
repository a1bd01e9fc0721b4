import pytest

from optim_zoo.errors import UserError
from optim_zoo.lab import sweep_file, trials
from tests.lab.conftest import Load

TWO = """
[grid]
train.batch_size = [8, 16]
run.seed = [0, 1]
[[grid.optimizer]]
name = "lamb"
learning_rate = [0.1, 0.2]
[[grid.optimizer]]
name = "momentum"
momentum = { grid = [0.8, 0.9] }
learning_rate = 0.5
"""


def test_a_grid_has_every_combination_with_the_rates_of_each_optimizer(load: Load) -> None:
    runs = trials.grid(load(TWO))
    assert len({run.id for run in runs}) == len(runs) == 16
    found = {(t.optimizer, t.rate, t.batch_size, t.seed) for t in runs if t.optimizer == "lamb"}
    assert found == {("lamb", r, b, s) for r in (0.1, 0.2) for b in (8, 16) for s in (0, 1)}
    rest = [run.config.optimizer.arguments["momentum"] for run in runs[8:]]
    assert {run.rate for run in runs[8:]} == {0.5}
    assert rest == [0.8] * 4 + [0.9] * 4


def test_an_optimizer_table_replaces_the_one_of_the_config(load: Load) -> None:
    text = '[grid]\n[[grid.optimizer]]\nname = "momentum"\n'
    (run,) = trials.grid(load(text))
    assert run.config.optimizer.arguments["momentum"] == 0.9  # its own default, not the file's 0.5
    (kept,) = trials.grid(load('[grid]\noptimizer.name = ["momentum"]'))
    assert kept.config.optimizer.arguments["momentum"] == 0.5


def test_the_command_line_sets_keys_of_the_sweep_and_of_all_runs(load: Load) -> None:
    sweep = load(TWO, "jobs=3", "dir=there", "run.seed=7", "schedule.learning_rate=2.5")
    assert (sweep.jobs, str(sweep.folder)) == (3, "there")
    runs = trials.grid(sweep)
    assert {(run.seed, run.rate) for run in runs} == {(7, 2.5)}
    assert len(runs) == 2 * 1 + 2 * 2


def test_the_id_of_a_run_depends_on_what_it_sets_alone(load: Load) -> None:
    first = {run.id for run in trials.grid(load(TWO))}
    fewer = {run.id for run in trials.grid(load(TWO.replace("[8, 16]", "[16]")))}
    assert fewer < first
    assert not {run.id for run in trials.grid(load(TWO, "train.steps=5"))} & first


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[grid]\ntrain.stepz = [1]", "trial.toml.*unknown key in .train. 'stepz'.*steps"),
        ("[grid]\ntrain.steps = []", "grid.train.steps must have at least one value"),
        ("[grid]\ntrain.steps = 5", "grid.train.steps must be a list of values, got 5"),
        ("[grid]\ntrain.steps = [5, 5]", "must have distinct values"),
        ('[grid]\ntrain.steps = ["x"]', "train.steps must be a whole number, got 'x'"),
        ("[grid]\nrun.dir = ['x']", "run.dir cannot be a key"),
        ("", r"needs \[grid\].* or \[search\]"),
        ("jobs = 0\n[grid]\nrun.seed = [1]", "jobs must be >= 1, got 0"),
        ("job = 2\n[grid]\nrun.seed = [1]", "unknown key of a sweep 'job'; did you mean jobs"),
        ('config = "no.toml"\n[grid]\nrun.seed = [1]', "cannot read the config no.toml"),
        ('[grid]\n[[grid.optimizer]]\nname = "lam"', "unknown optimizer 'lam'; did you mean lamb"),
        ("[grid]\n[[grid.optimizer]]\nmomentum = 1", "name must name an optimizer in every"),
        ('[grid]\n[[grid.optimizer]]\nname = "lamb"\nb1 = {grd = [1]}', "grid = .values"),
        ("[search]\nlearning_rates = [1.0]", "at least two rates"),
        ("[search]\nlearning_rates = [0.0, 1.0]", r"must be in \(0, inf\), got 0.0"),
        ("[search]\nlearning_rates = [1, 2, 3]\nruns = 2", "runs must be at least the 3 rates"),
        ("[search]\nlearning_rates = [1, 2]\n[grid]\nrun.seed = [1]", "use search.seeds"),
        ("[search]\nlearning_rate = [1, 2]", "unknown key in .search. 'learning_rate'"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_the_key(load: Load, text: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected) as caught:
        trials.grid(load(text))
    assert "\n" not in str(caught.value)


def test_a_larger_accuracy_and_a_smaller_loss_are_better() -> None:
    better = {name: sweep_file.higher_is_better(name) for name in ("loss", "accuracy", "f1")}
    assert better == {"loss": False, "accuracy": True, "f1": True}

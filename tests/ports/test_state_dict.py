"""Tests that recorded torch runs resume in JAX from the state of their optimizer."""

import copy
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optim_zoo
from optim_zoo import ports, recorded, tree
from optim_zoo.recorded.agreement import REFERENCE_NOISE, as_fed, make
from optim_zoo.transforms import ScaleByAdamState, ScaleByLearningRateState

pytestmark = pytest.mark.usefixtures("quick_to_compile")

FOLDER = Path(__file__).parent.parent / "recorded_torch"
SOURCES = {
    "adam": "torch.Adam",
    "adam_amsgrad": "torch.Adam",
    "adamw": "torch.AdamW",
    "lamb": "timm.Lamb",
    "sgd_momentum": "torch.SGD",
    "sgd_nesterov": "torch.SGD",
}
TARGETS: dict[str, Any] = {
    "hidden.weight": (
        "hidden/kernel",
        (1, 0),
    ),  # square, so that its shape does not reveal the transpose
    "hidden.bias": "hidden/bias",
    "norm.weight": "norm/scale",
    "norm.bias": "norm/bias",
    "out.weight": ("out/kernel", (1, 0)),
    "out.bias": "out/bias",
}


class Run:
    """A recorded torch run, with its arrays in the layout of Flax."""

    def __init__(self, name: str) -> None:
        self.about = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))
        with np.load(FOLDER / f"{name}.npz") as archive:
            self.arrays = dict(archive)
        self.names = {n: TARGETS[n] for n in self.about["names"]}
        self.step = self.about["steps_before"] if name.startswith("sgd") else None
        state: dict[int, dict[str, np.ndarray]] = {}
        for key, value in self.arrays.items():
            if key.startswith("state/"):
                _, index, field = key.split("/")
                state.setdefault(int(index), {})[field] = value
        self.state_dict = {"state": state, "param_groups": self.about["param_groups"]}

    def flax(self, prefix: str, at: int | None = None) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for name, target in TARGETS.items():
            x = self.arrays[f"{prefix}/{name}"]
            x = x if at is None else x[at]
            path, axes = (target, None) if isinstance(target, str) else target
            layer, leaf = path.split("/")
            x = x if axes is None else np.transpose(x, axes)
            made.setdefault(layer, {})[leaf] = jnp.asarray(x)
        return made

    def loss(self, params: Any) -> jax.Array:
        x = jnp.tanh(self.arrays["X"] @ params["hidden"]["kernel"] + params["hidden"]["bias"])
        mean = x.mean(-1, keepdims=True)
        x = (x - mean) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
        x = x * params["norm"]["scale"] + params["norm"]["bias"]
        x = x @ params["out"]["kernel"] + params["out"]["bias"]
        return jnp.mean((x - self.arrays["Y"]) ** 2)


def _bias_broadcasts() -> Any:
    return jax.numpy_rank_promotion("allow")


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("own_gradients", [False, True], ids=["recorded-gradients", "own"])
def test_a_resumed_run_makes_the_steps_of_torch(name: str, own_gradients: bool) -> None:
    run = Run(name)
    with jax.enable_x64(True), _bias_broadcasts():
        tx = ports.from_param_groups(SOURCES[name], run.state_dict, names=run.names)
        params = run.flax("params0")
        state = ports.from_state_dict(tx, run.state_dict, params, names=run.names, step=run.step)
        assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))
        update = jax.jit(tx.update)
        gradient = jax.jit(jax.grad(run.loss))
        # The same float64 arithmetic. Own gradients differ by 3e-15, which 20 steps amplify.
        rtol = 1e-9 if own_gradients else 1e-12
        for i in range(run.about["steps_after"]):
            grads = gradient(params) if own_gradients else run.flax("grads", i)
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
            jax.tree.map(
                lambda x, y: np.testing.assert_allclose(x, y, rtol, rtol),
                params,
                run.flax("params", i),
            )


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_a_fresh_state_makes_other_steps(name: str) -> None:
    """With zero moments the first step differs, so that the state matters."""
    run = Run(name)
    with jax.enable_x64(True):
        tx = ports.from_param_groups(SOURCES[name], run.state_dict, names=run.names)
        params = run.flax("params0")
        updates, _ = tx.update(run.flax("grads", 0), tx.init(params), params)
        moved = optax.apply_updates(params, updates)
        differences = np.abs(moved["hidden"]["kernel"] - run.flax("params", 0)["hidden"]["kernel"])
        assert differences.max() > 1e-5


def test_the_state_holds_the_moments_the_step_and_the_learning_rate() -> None:
    run = Run("adamw")
    params = run.flax("params0")
    state = ports.from_state_dict("torch.AdamW", run.state_dict, params, names=run.names)
    adam = optax.tree.get(state, "ScaleByAdamState")
    rate = optax.tree.get(state, "ScaleByLearningRateState")
    assert isinstance(adam, ScaleByAdamState)
    assert isinstance(rate, ScaleByLearningRateState)
    assert adam.count == rate.step == 10
    assert rate.rate == np.float32(0.01)
    first = run.about["names"].index("hidden.weight")
    np.testing.assert_allclose(
        adam.mu["hidden"]["kernel"], run.state_dict["state"][first]["exp_avg"].T, rtol=1e-6
    )


def test_the_state_of_apex_is_converted() -> None:
    """The groups of apex hold the number of steps, and no boolean options."""
    run = Run("lamb")
    params = run.flax("params0")
    kept = ("lr", "bias_correction", "betas", "eps", "weight_decay", "grad_averaging",
            "max_grad_norm", "step", "params")  # fmt: skip
    groups = [{k: g[k] for k in kept} for g in run.state_dict["param_groups"]]
    of_apex = {**run.state_dict, "param_groups": groups}
    names = run.names
    apex = ports.from_param_groups("apex.FusedLAMB", of_apex, names=names)
    state = ports.from_state_dict("apex.FusedLAMB", of_apex, params, names=names)
    timm = ports.from_param_groups("timm.Lamb", run.state_dict, names=names)
    expected = ports.from_state_dict(timm, run.state_dict, params, names=names)
    grads = run.flax("grads", 0)
    jax.tree.map(
        np.testing.assert_array_equal,
        apex.update(grads, state, params),
        timm.update(grads, expected, params),
    )


def test_a_port_with_other_arguments_accepts_the_state() -> None:
    """A port made with other arguments, here a schedule, accepts the same state."""
    run = Run("adamw")
    params = run.flax("params0")
    tx = ports.torch.AdamW(
        optim_zoo.schedules.constant(0.01),
        weight_decay=0.1,
        exclude_from_weight_decay=["bias$", "norm"],
    )
    by_hand = ports.from_state_dict(tx, run.state_dict, params, names=run.names)
    by_name = ports.from_state_dict("torch.AdamW", run.state_dict, params, names=run.names)
    jax.tree.map(np.testing.assert_array_equal, by_hand, by_name)


def test_the_state_of_lamb_with_decoupled_decay_is_converted() -> None:
    """timm's Lamb with decoupled decay keeps the state of its chain in an inner state."""
    run = Run("lamb")
    params = run.flax("params0")
    tx = ports.timm.Lamb(decoupled_decay=True)
    state = ports.from_state_dict(tx, run.state_dict, params, names=run.names)
    assert state.step == 10
    assert optax.tree.get(state, "ScaleByAdamState").count == 10


def _wrong(change: Any) -> tuple[Run, dict[str, Any]]:
    run = Run("adam")
    run.state_dict = copy.deepcopy(run.state_dict)
    arguments = {"params": run.flax("params0"), "names": dict(run.names)}
    change(run, arguments)
    return run, arguments


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda run, a: a["names"].update({"out.weight": "out/kernel"}),
            r"exp_avg of out.weight has shape \(3, 5\), out/kernel has \(5, 3\); give "
            r'\("out/kernel", axes\) to transpose it',
        ),
        (lambda run, a: a["names"].pop("out.bias"), "must list the 6 parameters .* got 5"),
        (
            lambda run, a: a["names"].update({"out.bias": "out/bais"}),
            r"differ at \['out/bais', 'out/bias'\]",
        ),
        (
            lambda run, a: [s.pop("exp_avg_sq") for s in run.state_dict["state"].values()],
            "has no exp_avg_sq for hidden/bias, only",
        ),
        (
            lambda run, a: [s.pop("step") for s in run.state_dict["state"].values()],
            "how many steps .* does not hold it: give step=",
        ),
        (
            lambda run, a: (run.state_dict["state"].clear(), a.update(step=10)),
            r"has no exp_avg for hidden/bias, only \[\]: has the run made a step",
        ),
    ],
)
def test_errors_name_what_does_not_fit(change: Any, message: str) -> None:
    run, arguments = _wrong(change)
    with pytest.raises(ValueError, match=message):
        ports.from_state_dict("torch.Adam", run.state_dict, **arguments)


def test_a_parameter_without_state_starts_with_zero_moments() -> None:
    """In torch, a parameter that never had a gradient, such as BERT's pooler, has no state."""
    run = Run("adam")
    params = run.flax("params0")
    del run.state_dict["state"][run.about["names"].index("out.bias")]
    with pytest.warns(UserWarning, match="no state for out.bias: assumed that they never had a"):
        state = ports.from_state_dict("torch.Adam", run.state_dict, params, names=run.names)
    mu = optax.tree.get(state, "ScaleByAdamState").mu
    assert not mu["out"]["bias"].any()
    assert mu["out"]["kernel"].any()
    assert optax.tree.get(state, "ScaleByAdamState").count == 10


def test_the_largest_step_count_of_the_parameters_is_used() -> None:
    """torch counts steps per parameter; one that was frozen at first has a lower count."""
    run = Run("adam")
    params = run.flax("params0")
    run.state_dict["state"][1]["step"] = np.float32(3)
    with pytest.warns(UserWarning, match="10 steps for most parameters, but 3 for hidden.bias"):
        state = ports.from_state_dict("torch.Adam", run.state_dict, params, names=run.names)
    assert optax.tree.get(state, "ScaleByAdamState").count == 10


def test_the_largest_step_count_of_the_groups_is_used() -> None:
    run = Run("lamb")
    run.state_dict["param_groups"][1]["step"] = 4
    params = run.flax("params0")
    with pytest.warns(UserWarning, match="10 steps for most parameters, but 4 for group 1"):
        state = ports.from_state_dict("timm.Lamb", run.state_dict, params, names=run.names)
    assert optax.tree.get(state, "ScaleByAdamState").count == 10


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_groups_keep_different_learning_rates(name: str) -> None:
    """Each group uses its own learning rate; timm's Lamb clips all groups together."""
    run = Run(name)
    port = {"adamw": ports.torch.AdamW, "lamb": ports.timm.Lamb}[name]
    groups = run.state_dict["param_groups"]
    common = {k: v for k, v in groups[0].items() if k in ("betas", "eps", "weight_decay")}
    undecayed = ["bias", "norm"]
    params, grads = run.flax("params0"), jax.tree.map(lambda g: 1e3 * g, run.flax("grads", 0))
    steps = {}
    for lr in (0.1, 0.2):
        tx = port(lr=lr, **common, exclude_from_weight_decay=undecayed)
        state = ports.from_state_dict(tx, run.state_dict, params, names=run.names)
        steps[lr], _ = tx.update(grads, state, params)
    groups[0]["lr"], groups[1]["lr"] = 0.1, 0.2
    with pytest.warns(UserWarning, match=r"differ in lr \(0.1, 0.2\).*constant learning rate"):
        tx = ports.from_param_groups(SOURCES[name], run.state_dict, names=run.names)
    state = ports.from_state_dict(tx, run.state_dict, params, names=run.names)
    updates, after = tx.update(grads, state, params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    for path, u in tree.by_path(updates).items():
        lr = 0.1 if "kernel" in path else 0.2
        np.testing.assert_array_equal(u, tree.by_path(steps[lr])[path], err_msg=path)


def test_groups_with_different_norm_limits_are_refused() -> None:
    """The gradients of all groups are clipped together, to one norm."""
    run = Run("lamb")
    run.state_dict["param_groups"][1]["max_grad_norm"] = 0.5
    with pytest.raises(ValueError, match=r"must have one max_grad_norm, got \[1.0, 0.5\]"):
        ports.from_param_groups("timm.Lamb", run.state_dict, names=run.names)


# One case of every recorded optimizer that has a state_dict.
CARRIED = {
    case.constructor: pytest.param(case, id=case.id)
    for case in recorded.cases()
    if case.id.split("_")[0] in ("torch", "timm", "po", "apex")
    and case.id not in ("po_lookahead_sgd_pullback", *REFERENCE_NOISE)
}.values()


@pytest.mark.parametrize("case", CARRIED)
def test_every_port_accepts_the_state_of_its_source(case: recorded.Case) -> None:
    """The converted state after one step equals the state of the port after one step."""
    trajectory = case.load()
    paths = tree.leaf_paths(trajectory.params0)
    fields: dict[int, dict[str, Any]] = {i: {} for i in range(len(paths))}
    for name, by_step in trajectory.extras.items():
        name = {"m": "exp_avg", "v": "exp_avg_sq"}.get(name, name)
        for i, path in enumerate(paths):
            fields[i][name] = tree.by_path(by_step[0])[path]
    lr = 0.01
    for field in fields.values():
        field |= {"step": 1, "weight_norm": 2.0, "exp_avg_lr_1": 0.1 * lr}
        field.setdefault("mu_product", 0.9 * (1 - 0.5 * 0.96**0.004))
    group = {"lr": lr, "params": list(range(len(paths)))}
    state: dict[str, Any] = {"state": fields, "param_groups": [group]}
    if case.constructor.endswith("timm.Lookahead"):
        group["lookahead_step"] = 1
    if case.constructor.endswith("pytorch_optimizer.Lookahead"):
        start = tree.by_path(trajectory.params0)
        slow = {(0, i): {"slow_params": start[path]} for i, path in enumerate(paths)}
        state = {"lookahead_state": slow, "base_optimizer": state}
    with jax.enable_x64(case.dtype == "float64"), jax.disable_jit(), _bias_broadcasts():
        tx = make(case.constructor, case.arguments, case.inner, trajectory)
        carried = ports.from_state_dict(
            tx, state, trajectory.params0, names={path: path for path in paths}
        )
        fed = tree.map_with_path(lambda path, g: as_fed(case, path, g), trajectory.grads[0])
        _, own = tx.update(fed, tx.init(trajectory.params0), trajectory.params0)
    assert jax.tree.structure(carried) == jax.tree.structure(own)
    shown = ("trust_ratio", "parameter_norm", "update_norm", "gradient_norm", "clipped_norm")
    for (path, x), (_, y) in zip(
        jax.tree.leaves_with_path(carried), jax.tree.leaves_with_path(own), strict=True
    ):
        name = jax.tree_util.keystr(path)
        if not any(field in name for field in (*shown, "rate")):
            np.testing.assert_allclose(x, y, case.rtol, case.atol, err_msg=name)


def test_a_state_without_a_counterpart_in_torch_is_refused() -> None:
    inner = ports.torch.SGD(lr=0.1, momentum=0.9)
    tx = ports.michaelrzhang.Lookahead(inner, pullback_momentum="pullback")
    run = Run("sgd_momentum")
    with pytest.raises(NotImplementedError, match="CachedMomentumState keeps state whose name in"):
        ports.from_state_dict(tx, run.state_dict, run.flax("params0"), names=run.names, step=10)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("torch.AdmW", "unknown port of torch 'AdmW'; did you mean AdamW"),
        ("keras.Adam", "unknown library with a state_dict 'keras'"),
        ("torch", "unknown port of torch ''"),
        ("timm.Lookahead", "unknown port of timm 'Lookahead'"),
    ],
)
def test_an_unknown_source_raises(source: str, message: str) -> None:
    run = Run("adam")
    with pytest.raises(ValueError, match=message):
        ports.from_param_groups(source, run.state_dict, names=run.names)


def test_the_targets_are_the_paths_of_the_parameters() -> None:
    run = Run("adam")
    targets = [t if isinstance(t, str) else t[0] for t in TARGETS.values()]
    assert sorted(tree.leaf_paths(run.flax("params0"))) == sorted(targets)

"""Torch runs, recorded with the optimizer's state in the middle, go on in JAX with its numbers."""

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
from optim_zoo import ports, tree
from optim_zoo.transforms import ScaleByAdamState, ScaleByLearningRateState

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
    "hidden.weight": ("hidden/kernel", (1, 0)),  # square: its shape does not show it
    "hidden.bias": "hidden/bias",
    "norm.weight": "norm/scale",
    "norm.bias": "norm/bias",
    "out.weight": ("out/kernel", (1, 0)),
    "out.bias": "out/bias",
}


class Run:
    """A recorded torch run and its parts in the layout of Flax."""

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
def test_goes_on_as_torch_did(name: str, own_gradients: bool) -> None:
    run = Run(name)
    with jax.enable_x64(True), _bias_broadcasts():
        tx = ports.from_param_groups(SOURCES[name], run.state_dict, names=run.names)
        params = run.flax("params0")
        state = ports.from_state_dict(tx, run.state_dict, params, names=run.names, step=run.step)
        assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))
        update = jax.jit(tx.update)
        gradient = jax.jit(jax.grad(run.loss))
        # The same float64 arithmetic; own gradients differ by 3e-15, which 20 steps magnify.
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
def test_starting_afresh_would_not(name: str) -> None:
    """That the state matters: from zero moments the first step is another."""
    run = Run(name)
    with jax.enable_x64(True):
        tx = ports.from_param_groups(SOURCES[name], run.state_dict, names=run.names)
        params = run.flax("params0")
        updates, _ = tx.update(run.flax("grads", 0), tx.init(params), params)
        moved = optax.apply_updates(params, updates)
        apart = np.abs(moved["hidden"]["kernel"] - run.flax("params", 0)["hidden"]["kernel"])
        assert apart.max() > 1e-5


def test_the_pieces_are_filled() -> None:
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


def test_own_arguments() -> None:
    """A port made by hand, here with a schedule, takes the same state."""
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


def test_decay_before_the_step_and_its_inner_state() -> None:
    """timm's decoupled Lamb keeps its chain inside another state."""
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
            lambda run, a: run.state_dict["state"][0].update(step=np.float32(3)),
            r"holds \[3.0, 10.0\]",
        ),
    ],
)
def test_what_does_not_fit_is_named(change: Any, message: str) -> None:
    run, arguments = _wrong(change)
    with pytest.raises(ValueError, match=message):
        ports.from_state_dict("torch.Adam", run.state_dict, **arguments)


def test_groups_that_no_port_can_be() -> None:
    run = Run("adamw")
    run.state_dict["param_groups"][1]["lr"] = 0.5
    with pytest.raises(ValueError, match="must differ in nothing but a weight decay of 0"):
        ports.from_param_groups("torch.AdamW", run.state_dict, names=run.names)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("torch.AdmW", "unknown port of torch 'AdmW'; did you mean AdamW"),
        ("keras.Adam", "unknown library with a state_dict 'keras'"),
        ("torch", "unknown port of torch ''"),
    ],
)
def test_unknown_source(source: str, message: str) -> None:
    run = Run("adam")
    with pytest.raises(ValueError, match=message):
        ports.from_param_groups(source, run.state_dict, names=run.names)


def test_paths_are_those_of_the_tree() -> None:
    run = Run("adam")
    targets = [t if isinstance(t, str) else t[0] for t in TARGETS.values()]
    assert sorted(tree.leaf_paths(run.flax("params0"))) == sorted(targets)

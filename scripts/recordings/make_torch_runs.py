"""Makes tests/recorded_torch: runs in torch, with the optimizer's state_dict after 10 steps.

    pip install -e '.[references]'
    python scripts/recordings/make_torch_runs.py

A run trains a small model for 10 steps, stores `optimizer.state_dict()`, and trains for 20 more
steps. tests/recorded_torch/README.md describes the files. Prints one JSON line per run.
"""

import dataclasses
import importlib
import importlib.metadata
import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parents[2] / "tests" / "recorded_torch"
STEPS_BEFORE, STEPS_AFTER = 10, 20
EXAMPLES, INPUTS, OUTPUTS = 8, 5, 3


@dataclasses.dataclass(frozen=True)
class Run:
    """An optimizer of a library, and its arguments."""

    optimizer: str
    arguments: Mapping[str, Any]
    two_groups: bool = False  # biases and the norm are a second group without weight decay


RUNS = {
    "adam": Run("torch.optim.Adam", {"lr": 0.01, "weight_decay": 0.01}),
    "adam_amsgrad": Run("torch.optim.Adam", {"lr": 0.01, "amsgrad": True}),
    "adamw": Run("torch.optim.AdamW", {"lr": 0.01, "weight_decay": 0.1}, two_groups=True),
    "lamb": Run("timm.optim.Lamb", {"weight_decay": 0.01}, two_groups=True),
    "sgd_momentum": Run("torch.optim.SGD", {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}),
    "sgd_nesterov": Run(
        "torch.optim.SGD", {"lr": 0.05, "momentum": 0.9, "dampening": 0, "nesterov": True}
    ),
}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, run in RUNS.items():
        arrays, description = record(run)
        np.savez_compressed(FOLDER / f"{name}.npz", allow_pickle=False, **arrays)
        text = json.dumps(description, indent=1)
        (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        size = (FOLDER / f"{name}.npz").stat().st_size
        print(json.dumps({"run": name, "arrays": len(arrays), "bytes": size}))


def record(run: Run) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns the arrays of a run, and the description for its JSON file."""
    import torch

    rng = np.random.default_rng(0)
    model = _model(rng)
    inputs = torch.tensor(rng.normal(size=(EXAMPLES, INPUTS)))
    targets = torch.tensor(rng.normal(size=(EXAMPLES, OUTPUTS)))
    by_name = dict(model.named_parameters())
    members = [list(by_name)]
    if run.two_groups:
        weights = [name for name, x in by_name.items() if x.ndim == 2]
        members = [weights, [name for name in by_name if name not in weights]]
    groups: list[dict[str, Any]] = [{"params": [by_name[x] for x in names]} for names in members]
    if run.two_groups:
        groups[1]["weight_decay"] = 0.0
    module, _, kind = run.optimizer.rpartition(".")
    optimizer = getattr(importlib.import_module(module), kind)(groups, **run.arguments)

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()

    for _ in range(STEPS_BEFORE):
        step()
    saved = optimizer.state_dict()
    arrays = {"X": inputs.numpy(), "Y": targets.numpy()}
    arrays |= {f"params0/{name}": _copied(x) for name, x in by_name.items()}
    for index, state in saved["state"].items():
        arrays |= {f"state/{index}/{name}": _copied(x) for name, x in state.items()}
    # A deep copy, because timm's Lamb counts its steps there, in a tensor.
    param_groups = json.loads(json.dumps(saved["param_groups"], default=lambda x: x.tolist()))

    grads, params = [], []
    for _ in range(STEPS_AFTER):
        step()  # leaves the gradients unchanged: timm's Lamb clips copies
        grads.append({name: _copied(x.grad) for name, x in by_name.items()})
        params.append({name: _copied(x) for name, x in by_name.items()})
    for name in by_name:
        arrays[f"grads/{name}"] = np.stack([x[name] for x in grads])
        arrays[f"params/{name}"] = np.stack([x[name] for x in params])

    return arrays, {
        "optimizer": run.optimizer,
        "arguments": dict(run.arguments),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "timm")},
        "names": [name for names in members for name in names],
        "param_groups": param_groups,
        "steps_before": STEPS_BEFORE,
        "steps_after": STEPS_AFTER,
    }


def _model(rng: np.random.Generator) -> Any:
    """Returns a float64 model whose first kernel is square: its shape cannot show a transpose."""
    import torch

    layers = OrderedDict(
        hidden=torch.nn.Linear(INPUTS, INPUTS),
        tanh=torch.nn.Tanh(),
        norm=torch.nn.LayerNorm(INPUTS),
        out=torch.nn.Linear(INPUTS, OUTPUTS),
    )
    model = torch.nn.Sequential(layers).double()
    for name, x in model.named_parameters():  # independent of torch's seed
        start = rng.normal(size=x.shape) + (name == "norm.weight")
        x.data = torch.tensor(start)
    return model


def _copied(x: Any) -> np.ndarray:
    return x.detach().numpy().copy()


if __name__ == "__main__":
    main()

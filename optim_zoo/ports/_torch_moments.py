"""The moments in a torch ``state_dict``, as trees in the layout of the parameters."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optim_zoo.errors import ArgumentValueError
from optim_zoo.ports.param_groups import Names, StateDict, check_names, target_paths
from optim_zoo.tree import Tree, leaf_paths, map_with_path


class TorchMoments:
    """The state of every parameter, keyed by its path in ``params``."""

    def __init__(self, state: StateDict, params: Tree, names: Names) -> None:
        paths = leaf_paths(params)
        self.shapes = dict(zip(paths, map(jnp.shape, jax.tree.leaves(params)), strict=True))
        indices = sorted(index for group in state["param_groups"] for index in group["params"])
        check_names(names, state)
        differing = sorted(set(target_paths(names)) ^ set(paths))
        if differing:
            raise ArgumentValueError(
                "names",
                "have the paths of params",
                differing,
                sentence="{argument} and params must have the same paths; they differ at "
                f"{differing}",
                related=["params"],
            )
        self.names: dict[str, str] = {}
        self.axes: dict[str, Sequence[int] | None] = {}
        self.fields: dict[str, Mapping[str, Any]] = {}
        for index, (name, target) in zip(indices, names.items(), strict=True):
            path, axes = (target, None) if isinstance(target, str) else target
            fields = state["state"].get(index, {})
            self.names[path], self.axes[path] = name, axes
            self.fields[path] = {k: v for k, v in fields.items() if v is not None}
        self.missing = [path for path, fields in self.fields.items() if not fields]
        if self.missing and len(self.missing) < len(self.fields):
            warnings.warn(
                f"the state_dict has no state for {self._listed(self.missing)}: assumed that they "
                "never had a gradient, so that their state is that of init; leave them out with "
                "optax.masked if they must stay unchanged",
                stacklevel=3,
            )
        else:
            self.missing = []

    def _listed(self, paths: Sequence[str]) -> str:
        return ", ".join(self.names[path] for path in paths)

    def tree(self, theirs: Sequence[str], like: Tree, *, negate: bool) -> Tree:
        """Returns the field with one of these names, of every parameter, in the layout of ``like``.

        Args:
          theirs: the names that the field has in the sources.
          like: the field as ``init`` made it.
          negate: whether the field has the other sign here: momentum of steps, not of gradients.
        """
        is_slow = "slow_buffer" in theirs

        def at(path: str, x: jax.Array) -> jax.Array:
            if path in self.missing:
                return x
            names = [name for name in theirs if name in self.fields[path]]
            if not names:
                if is_slow:  # timm makes the slow weights at the first synchronization
                    return x
                raise self._lacks(theirs[0], path)
            value = jnp.asarray(self._fitted(names[0], path), x.dtype)
            return -value if negate else value

        return map_with_path(at, like)

    def shared(self, theirs: Sequence[str]) -> float:
        """Returns the number with one of these names, of the parameter with the most steps."""
        paths = [path for path in self.fields if path not in self.missing]
        path = max(paths, key=lambda path: float(self.fields[path].get("step", 0)))
        names = [name for name in theirs if name in self.fields[path]]
        if not names:
            raise self._lacks(theirs[0], path)
        return float(np.asarray(self.fields[path][names[0]]))

    def _lacks(self, field: str, path: str) -> ArgumentValueError:
        present = sorted(self.fields[path])
        advice = "has the run made a step, and is it this optimizer's?"
        return ArgumentValueError(
            "state",
            f"hold {field} for every parameter",
            present,
            advice,
            sentence=f"the state_dict has no {field} for {path}, only {present}: {advice}",
        )

    def _fitted(self, field: str, path: str) -> np.ndarray:
        value, axes = np.asarray(self.fields[path][field]), self.axes[path]
        fitted = value if axes is None else np.transpose(value, axes)
        shape = self.shapes[path]
        if fitted.shape != shape:
            advice = f'give ("{path}", axes) to transpose it' if axes is None else ""
            raise ArgumentValueError(
                "names",
                f"give {path} the shape {shape}",
                fitted.shape,
                advice,
                sentence=f"{field} of {self.names[path]} has shape {fitted.shape}, {path} has "
                f"{shape}" + (f"; {advice}" if advice else ""),
            )
        return fitted

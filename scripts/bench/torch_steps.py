"""The optimizers of torch, timm and pytorch_optimizer as candidates that take turns with JAX's."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

import harness
from optim_zoo.tree import Tree

COPIES = 3  # parameters and state of a torch optimizer, in multiples of the parameters
TEMPORARIES = 3  # an estimate for optimizers that update all leaves at once, in the same unit

Constructor = Callable[[list[Any]], Any]  # parameters -> optimizer


def constructors(group: str, dtype: str) -> dict[str, Constructor]:
    """Returns the torch optimizers of a group, keyed by name; none where torch cannot be used.

    Args:
      group: "lamb" or "lars".
      dtype: of the parameters. Only "float32" is compared.
    """

    def adamw(params: list[Any]) -> Any:
        import torch

        return torch.optim.AdamW(params, harness.LEARNING_RATE, fused=True, **harness.LAMB)

    def timm_lamb(params: list[Any]) -> Any:
        import timm.optim

        # Without clipping by the global norm, as the other candidates.
        return timm.optim.Lamb(params, harness.LEARNING_RATE, max_grad_norm=None, **harness.LAMB)

    def timm_lars(params: list[Any]) -> Any:
        import timm.optim

        return timm.optim.Lars(params, harness.LEARNING_RATE, **harness.LARS)

    def pytorch_optimizer_lamb(params: list[Any]) -> Any:
        import pytorch_optimizer

        return pytorch_optimizer.Lamb(params, harness.LEARNING_RATE, **harness.LAMB)

    if dtype != "float32" or not importlib.util.find_spec("torch") or device() is None:
        return {}
    members: dict[str, Constructor] = (
        {"timm.optim.Lars": timm_lars}
        if group == "lars"
        else {
            "torch.optim.AdamW(fused=True)": adamw,
            "timm.optim.Lamb": timm_lamb,
            "pytorch_optimizer.Lamb": pytorch_optimizer_lamb,
        }
    )
    return {name: x for name, x in members.items() if importlib.util.find_spec(name.split(".")[0])}


def device() -> str | None:
    """Returns the device that makes torch comparable with JAX; None where torch cannot use it."""
    import torch

    if jax.default_backend() != "gpu":
        return "cpu"
    return "cuda" if torch.cuda.is_available() else None


class TorchStep:
    """A torch optimizer on parameters of its own."""

    def __init__(self, make: Constructor, gradients: Sequence[Any]) -> None:
        import torch

        params = []
        for g in gradients:
            x = torch.nn.Parameter(harness.PARAMETERS_OVER_GRADIENTS * g)
            x.grad = g
            params.append(x)
        self._optimizer = make(params)
        self._step = self._optimizer.step
        self._wait = torch.cuda.synchronize if gradients[0].is_cuda else lambda: None

    def __call__(self) -> "TorchStep":
        """Starts one step. On a GPU it may still run when this returns."""
        self._step()
        return self

    def compile(self) -> None:
        """Creates the state by one eager step, then compiles all further steps as one program."""
        import torch

        self._optimizer.step()
        self._step = torch.compile(self._optimizer.step)

    def block_until_ready(self) -> None:
        """Waits until all started steps are done."""
        self._wait()

    @property
    def state_bytes(self) -> int:
        """Bytes of the state, after the first step."""
        tensors = [x for state in self._optimizer.state.values() for x in state.values()]
        return sum(x.nbytes for x in tensors)


def started(
    group: Mapping[str, Constructor], shapes: Tree, threads: int
) -> tuple[dict[str, TorchStep], dict[str, Any]]:
    """Starts the steps of a group; also returns the facts about torch that times depend on.

    Args:
      group: a result of `constructors`.
      shapes: the tree of parameters.
      threads: on a CPU, how many threads torch uses.
    """
    if not group:
        return {}, {}
    import torch

    torch.set_num_threads(threads)
    generator = torch.Generator(device()).manual_seed(0)
    gradients = [
        1e-3 * torch.randn(x.shape, generator=generator, device=generator.device)
        for x in jax.tree.leaves(shapes)
    ]
    steps = {name: TorchStep(make, gradients) for name, make in group.items()}
    return steps, {"torch": torch.__version__, "torch_threads": torch.get_num_threads()}

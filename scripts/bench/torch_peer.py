"""PyTorch's side of a comparison, in processes of its own.

    python scripts/bench/torch_peer.py --tree bert-large --dtype float32 --address SOCKET

A `TorchPeer` is the connection to a process that builds a torch optimizer and then makes one step
per message. It takes turns with JAX's steps like any other candidate of `harness.interleaved`: the
others are idle during its turn. So torch's imports and compilation run while JAX compiles, and a
failure ends that process alone.

`TorchPeer.start` starts such a process for one of `PEERS`. ``torch.compile`` of timm's Lamb takes
minutes for hundreds of parameters, so that one is started much earlier, by this file's command
line: it compiles, and then waits for one `TorchPeer.connect` at a Unix socket.
"""

import argparse
import importlib.util
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Client, Connection, Listener
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax

import torch_steps
from trees import TREES

ADAMW = "torch.optim.AdamW(fused=True)"
TIMM_LAMB = "timm.optim.Lamb"
COMPILED_TIMM_LAMB = "torch.compile(timm.optim.Lamb)"
COPY = "torch, copy"
TURN_SECONDS = 60.0  # without an answer for so long, a peer counts as failed
NOT_READY = "was not ready in time: importing torch, or torch.compile, took too long"

Shapes = Sequence[tuple[int, ...]]


class TorchPeer:
    """One candidate of torch. A call starts a step, `block_until_ready` waits for all steps."""

    def __init__(self, connection: Connection | None, process: BaseProcess | None = None) -> None:
        """Takes over a connection, and the process at its other end if this one started it."""
        self._connection, self._process = connection, process
        self.facts: dict[str, Any] = {}  # versions, bytes of the state; known once it is ready

    @staticmethod
    def start(name: str, shapes: Shapes, dtype: str, device: str) -> "TorchPeer":
        """Starts a process and returns at once.

        Args:
          name: a key of `PEERS`.
          shapes: the shapes of the parameters.
          dtype: of the parameters, the gradients and so of the optimizer's state.
          device: "cuda" or "cpu".
        """
        context = multiprocessing.get_context("spawn")
        connection, other = context.Pipe()
        process = context.Process(
            target=_serve_pipe, args=(other, name, shapes, dtype, device), daemon=True
        )
        process.start()
        other.close()
        return TorchPeer(connection, process)

    @staticmethod
    def connect(address: Path, until: float) -> "TorchPeer":
        """Connects to a process that was started with ``--address``, once it is ready.

        Args:
          address: its Unix socket; see `wait_for`.
          until: the ``time.monotonic()`` to wait for at most.
        """
        return TorchPeer(Client(str(address)) if wait_for(address, until) else None)

    def problem(self, until: float) -> str:
        """Waits until the peer is ready, and returns "", or why it cannot take part.

        Args:
          until: the ``time.monotonic()`` to wait for at most.
        """
        if self._connection is None:
            return NOT_READY
        try:
            if not self._connection.poll(max(0.0, until - time.monotonic())):
                return NOT_READY
            kind, said = self._connection.recv()
        except (EOFError, OSError):
            return "its process ended unexpectedly: see the log"
        if kind == "failed":
            return said
        self.facts = said
        return ""

    def __call__(self) -> "TorchPeer":
        """Starts one step."""
        assert self._connection is not None
        self._connection.send("step")
        return self

    def block_until_ready(self) -> None:
        """Waits until all started steps are done.

        Raises:
          RuntimeError: the process failed, or did not answer for `TURN_SECONDS`.
        """
        assert self._connection is not None
        self._connection.send("wait")
        if not self._connection.poll(TURN_SECONDS):
            raise RuntimeError(f"a torch peer must answer within {TURN_SECONDS} s, got nothing")
        kind, said = self._connection.recv()
        if kind != "done":
            raise RuntimeError(f"a torch peer failed: {said}")

    def close(self) -> None:
        """Ends the process."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.join(5)  # It notices the closed connection, unless it is compiling.
            self._process.kill()
            self._process.join()


def wait_for(address: Path, until: float) -> bool:
    """Waits until a process has compiled and listens at its socket, and returns whether it does.

    Args:
      address: the socket.
      until: the ``time.monotonic()`` to wait for at most.
    """
    while not address.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


def device() -> str:
    """Returns the device that torch shares with JAX, "cuda" or "cpu"; "" without torch."""
    if importlib.util.find_spec("torch") is None:
        return ""
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def _serve_pipe(connection: Connection, name: str, shapes: Shapes, dtype: str, device: str) -> None:
    _serve(connection, *_built(name, shapes, dtype, device))


def _built(name: str, shapes: Shapes, dtype: str, device: str) -> tuple[Any, tuple[str, Any]]:
    """Returns the candidate after two steps and a message; or None and the failure."""
    os.dup2(2, 1)  # Standard output carries the JSON lines of the parent, and torch may print.
    jax.config.update("jax_platforms", "cpu")  # JAX's part of the GPU belongs to the parent.
    try:
        import torch

        torch.manual_seed(0)
        member = PEERS[name](shapes, getattr(torch, dtype), torch.device(device))
        began = time.perf_counter()
        for _ in range(2):  # The first call compiles.
            member().block_until_ready()
        facts = {
            "state_bytes": member.state_bytes,
            "first_two_steps_s": time.perf_counter() - began,
            "torch_threads": torch.get_num_threads(),
        }
    except Exception as error:
        first_line = next(iter(str(error).strip().splitlines()), "")
        return None, ("failed", f"{type(error).__name__}: {first_line}")
    return member, ("ready", facts)


def _serve(connection: Connection, member: Any, message: tuple[str, Any]) -> None:
    """Reports, then makes steps until the other process closes the connection."""
    connection.send(message)
    try:
        while member is not None:
            if connection.recv() == "step":
                member()
            else:
                member.block_until_ready()
                connection.send(("done", None))
    except (EOFError, ConnectionError):
        return


def _optimizer(name: str) -> Callable[[Shapes, Any, Any], Any]:
    def build(shapes: Shapes, dtype: Any, device: Any) -> torch_steps.TorchStep:
        import torch

        gradients = [1e-3 * torch.randn(shape, dtype=dtype, device=device) for shape in shapes]
        # "float32" only says that no member is left out; the gradients decide the dtype.
        make = torch_steps.constructors("lamb", "float32")[name]
        return torch_steps.TorchStep(make, gradients)

    return build


def _compiled_timm_lamb(shapes: Shapes, dtype: Any, device: Any) -> torch_steps.TorchStep:
    step = _optimizer(TIMM_LAMB)(shapes, dtype, device)
    step.compile()
    return step


class _Copy:
    """Copies one array into another."""

    state_bytes = 0

    def __init__(self, shapes: Shapes, dtype: Any, device: Any) -> None:
        import torch

        self._source = torch.ones(shapes[0], dtype=dtype, device=device)
        self._target = torch.empty_like(self._source)
        self._wait = torch.cuda.synchronize if self._source.is_cuda else lambda: None

    def __call__(self) -> "_Copy":
        self._target.copy_(self._source)
        return self

    def block_until_ready(self) -> None:
        self._wait()


PEERS: Mapping[str, Callable[[Shapes, Any, Any], Any]] = MappingProxyType(
    {
        ADAMW: _optimizer(ADAMW),
        TIMM_LAMB: _optimizer(TIMM_LAMB),
        COMPILED_TIMM_LAMB: _compiled_timm_lamb,
        COPY: _Copy,
    }
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tree", choices=TREES, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--address", type=Path, required=True, metavar="SOCKET")
    arguments = parser.parse_args(argv)
    shapes = [x.shape for x in jax.tree.leaves(TREES[arguments.tree]()[0])]
    built = _built(COMPILED_TIMM_LAMB, shapes, arguments.dtype, arguments.device)
    with Listener(str(arguments.address)) as listener, listener.accept() as connection:
        _serve(connection, *built)


if __name__ == "__main__":
    main()

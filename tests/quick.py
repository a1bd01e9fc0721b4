"""Halves the compile time of tests that compile many small programs."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import pytest

try:
    from jax._src import compiler
except ImportError:  # a JAX in which it has another place: tests are slower
    compiler = None

FEWER_LLVM_PASSES = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
# XLA's older code generator for CPUs; jaxlib 0.12 no longer has the option.
_OLDER_CODE = {"xla_cpu_use_fusion_emitters": False}


def jit(function: Callable[..., Any], **options: Any) -> Any:
    """Works like ``jax.jit``, with few compiler optimizations."""
    return jax.jit(function, compiler_options=_compiler_options(), **options)


@contextlib.contextmanager
def everywhere() -> Iterator[None]:
    """Compiles every program like ``jit`` of this module, also those of single operations.

    Turning ``jax_disable_most_optimizations`` off inside gives the program that users get. JAX has
    no public option for the older code generator; where the private one is missing, the newer one
    is used.
    """
    make = getattr(compiler, "get_compile_options", None)

    def made(*args: Any, **options: Any) -> Any:
        if jax.config.read("jax_disable_most_optimizations"):
            own = options.get("env_options_overrides") or {}
            options["env_options_overrides"] = {**_OLDER_CODE, **own}
        return make(*args, **options)  # type: ignore[misc]

    with pytest.MonkeyPatch.context() as patch:
        if make is not None and _OLDER_CODE.items() <= _compiler_options().items():
            patch.setattr(compiler, "get_compile_options", made)
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def _compiler_options() -> dict[str, Any]:
    options = {**FEWER_LLVM_PASSES, **_OLDER_CODE}
    try:
        jax.jit(lambda: 0).lower().compile(compiler_options=options)
    except jax.errors.JaxRuntimeError:
        return FEWER_LLVM_PASSES
    return options

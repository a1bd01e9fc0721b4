"""Halves the compile time of tests that compile many small programs."""

import functools
from collections.abc import Callable
from typing import Any

import jax

_FEWER_PASSES = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
# XLA's older code generator for CPUs; jaxlib 0.12 no longer has the option.
_OLDER_CODE = {"xla_cpu_use_fusion_emitters": False}


def jit(function: Callable[..., Any], **options: Any) -> Any:
    """Works like ``jax.jit``, with few compiler optimizations."""
    return jax.jit(function, compiler_options=_compiler_options(), **options)


@functools.cache
def _compiler_options() -> dict[str, Any]:
    options = {**_FEWER_PASSES, **_OLDER_CODE}
    try:
        jax.jit(lambda: 0).lower().compile(compiler_options=options)
    except jax.errors.JaxRuntimeError:
        return _FEWER_PASSES
    return options

"""The programs behind ``scripts/bench/gpu.sh``, at their smallest size on the CPU."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tests.scripts.importing import imported

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "scripts" / "bench"

# The GPU machine may lack these packages. Without torch and timm the test is also shorter. Rich is
# not in the list, because flax needs it.
MAY_BE_MISSING = ["chex", "hypothesis", "matplotlib", "pytorch_optimizer", "timm", "tokenizers"]
MAY_BE_MISSING += ["tomli_w", "torch", "xdist"]

BLOCK = f"import sys; sys.modules |= dict.fromkeys({MAY_BE_MISSING})"

# Runs all sections in one process, in which the packages above cannot be imported.
RUN = f"""
{BLOCK}
sys.path.insert(0, {str(BENCH)!r})
import jax
import gpu_bandwidth, gpu_job_step, gpu_updates, harness, trees
from optim_zoo import stacked

harness.WARMUP_ROUNDS = 1
tree = {{"stack": jax.ShapeDtypeStruct((2, 8, 8), "float32"),
        "bias": jax.ShapeDtypeStruct((16,), "float32")}}
trees.TREES["tiny"] = lambda: (tree, [("stack", stacked(0))])
few = ["--rounds", "2"]
gpu_bandwidth.main([*few, "--megabytes", "1"])
gpu_updates.main([*few, "--tree", "tiny"])
gpu_updates.main([*few, "--tree", "tiny", "--dtype", "bfloat16"])
every = gpu_job_step.candidates
chosen = [gpu_job_step.FORWARD_AND_BACKWARD, "accumulate(clip + lamb, 4)"]
gpu_job_step.candidates = lambda size: {{name: every(size)[name] for name in chosen}}
gpu_job_step.main([*few, "--size", "tiny"])
"""

OPTIMIZERS = [f"{library}.{name}" for library in ("optim_zoo", "optax")
              for name in ("adamw", "lamb", "lars")]  # fmt: skip
TORCH = ["timm.optim.Lamb", "torch.compile(timm.optim.Lamb)", "torch.optim.AdamW(fused=True)"]


# The command that gpu.sh runs on the GPU machine. Here it only collects the tests.
COLLECT = f"""
{BLOCK}
import pytest
found = ["-o", "addopts=", "-p", "no:cacheprovider", "--collect-only", "-q", "tests/gpu"]
sys.exit(pytest.main(found))
"""


def _run(program: str) -> str:
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", program]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_the_gpu_tests_can_be_collected_without_optional_packages() -> None:
    assert "test_kernels_on_a_large_leaf[lamb]" in _run(COLLECT)


@pytest.fixture(scope="module")
def printed() -> str:
    return _run(RUN)


@pytest.fixture(scope="module")
def lines(printed: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in printed.splitlines()]


def _of(lines: list[dict[str, Any]], measured: str, **facts: str) -> dict[str, dict[str, Any]]:
    """Returns the lines with these facts, keyed by what they measure."""
    wanted = {"measured": measured, **facts}
    return {x["what"]: x for x in lines if {key: x.get(key) for key in wanted} == wanted}


@pytest.mark.slow
def test_every_line_names_the_device_and_the_versions(lines: list[dict[str, Any]]) -> None:
    for line in lines:
        assert line["jax"] == jax.__version__
        assert line["devices"] == "1 x cpu"
        assert line["section"]
        assert line["dtype"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_programs_and_times_of_updates_are_consistent(
    dtype: str, lines: list[dict[str, Any]]
) -> None:
    programs = _of(lines, "program", tree="tiny", dtype=dtype)
    times = _of(lines, "time", tree="tiny", dtype=dtype)
    assert sorted(programs) == sorted(times) == sorted(OPTIMIZERS)
    assert sorted(_of(lines, "skipped", tree="tiny", dtype=dtype)) == sorted(TORCH)
    for line in programs.values():
        assert line["kernels_per_leaf"] >= 1
        assert line["kernels_on_largest_leaf"] >= 1
        assert line["array_bytes_per_parameter"] >= line["fewest_bytes_per_parameter"] - 1
    for name, line in times.items():
        assert (
            line["over_optim_zoo.lamb"] == line["median_ms"] / times["optim_zoo.lamb"]["median_ms"]
        )
        moved = programs[name]["fewest_bytes_per_parameter"] * line["parameters"]
        assert line["gigabytes_per_second"] == pytest.approx(moved / line["median_ms"] / 1e6)


@pytest.mark.slow
def test_bandwidth_is_bytes_per_time(lines: list[dict[str, Any]]) -> None:
    passes = _of(lines, "bandwidth")
    assert sorted(passes) == ["JAX, copy", "JAX, negate in place"]
    for line in passes.values():
        assert line["gigabytes_per_second"] == 2 * 2**20 / line["median_ms"] / 1e6
    assert sorted(_of(lines, "skipped", section="bandwidth")) == ["torch, copy"]


@pytest.mark.slow
def test_the_share_of_the_optimizer_is_its_part_of_the_job_step(
    lines: list[dict[str, Any]],
) -> None:
    steps = _of(lines, "job step")
    alone = steps["forward and backward"]
    assert len(steps) == 2
    assert alone["optimizer_ms"] == 0
    for line in steps.values():
        assert line["optimizer_ms"] == line["median_ms"] - alone["median_ms"]
        assert line["optimizer_share"] == line["optimizer_ms"] / line["median_ms"]
        assert line["tokens_per_second"] == 1e3 * 4 * 32 / line["median_ms"]
    # Two moments, and the sum of gradients of `accumulate`, in float32.
    state = [round(line["state_bytes_per_parameter"]) for line in steps.values()]
    assert state == [0, 12]


def _table(text: str, tmp_path: Path) -> str:
    (tmp_path / "results.jsonl").write_text(text, "utf-8")
    program = [sys.executable, str(BENCH / "gpu_table.py"), str(tmp_path / "results.jsonl")]
    return subprocess.run(program, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_the_table_has_a_row_for_every_figure(
    printed: str, lines: list[dict[str, Any]], tmp_path: Path
) -> None:
    stopped = {
        "what": "tests",
        "measured": "section",
        "status": "stopped",
        "seconds": 80,
        "limit_s": 81,
    }
    table = _table(f'{printed}{{"what": "a line that was cut\n{json.dumps(stopped)}\n', tmp_path)
    rows = [row.strip("| ").split(" | ") for row in table.splitlines() if row.startswith("|")]
    cells = {cell for row in rows for cell in row}
    assert {line["what"] for line in lines} <= cells
    assert "| tests | stopped | 80 | 81 |" in table
    assert "This ran on a CPU" in table
    assert "### tiny in bfloat16" in table


def test_the_table_without_measurements_says_so(tmp_path: Path) -> None:
    assert "Nothing was measured." in _table("", tmp_path)


@pytest.fixture
def hlo_kernels() -> Iterator[Any]:
    with imported("bench", "hlo_kernels") as (module,):
        yield module


HLO = """\
HloModule jit_step, is_scheduled=true

%fused_computation (p.0: f32[8,4], p.1: bf16[8,4]) -> (f32[8,4], f32[]) {
  %p.0 = f32[8,4]{1,0} parameter(0)
  %p.1 = bf16[8,4]{1,0} parameter(1)
  %wide = f32[8,4]{1,0} convert(%p.1)
  %sum = f32[8,4]{1,0} add(%p.0, %wide)
  %norm = f32[] constant(0)
  ROOT %both = (f32[8,4]{1,0}, f32[]) tuple(%sum, %norm)
}

%command_buffer (q: f32[32]) -> f32[32] {
  %q = f32[32]{0} parameter(0)
  ROOT %copy.1 = f32[32]{0} copy(%q)
}

ENTRY %main (a: f32[8,4], b: bf16[8,4]) -> f32[32] {
  %a = f32[8,4]{1,0} parameter(0)
  %b = bf16[8,4]{1,0} parameter(1)
  %fusion = (f32[8,4]{1,0}, f32[]) fusion(%a, %b), kind=kLoop, calls=%fused_computation
  %element = f32[8,4]{1,0} get-tuple-element(%fusion), index=0
  %scalar = f32[] get-tuple-element(%fusion), index=1
  %root = f32[] sqrt(%scalar)
  %flat = f32[32]{0} bitcast(%element)
  ROOT %called = f32[32]{0} call(%flat), to_apply=%command_buffer
}
"""


def test_kernels_are_found_with_their_bytes(hlo_kernels: Any) -> None:
    """A fusion counts as one kernel, and kernels in a command buffer are counted separately."""
    found = hlo_kernels.kernels(HLO)
    assert [kernel.line.split(" = ")[0].split()[-1] for kernel in found] == [
        "%fusion",
        "%root",
        "%copy.1",
    ]
    assert [kernel.num_bytes for kernel in found] == [4 * 32 + 2 * 32 + 4 * 32 + 4, 8, 8 * 32]
    assert len(hlo_kernels.kernels_on(HLO, 32)) == 2
    with pytest.raises(ValueError, match="the text must be an HLO module"):
        hlo_kernels.kernels("no program")


def test_a_compiled_program_has_one_kernel(hlo_kernels: Any) -> None:
    """One kernel reads x and writes x + 1. Its name depends on the machine."""
    x = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    text = jax.jit(lambda x: x + 1).lower(x).compile().as_text()
    (kernel,) = hlo_kernels.kernels_on(text, 512 * 512)
    assert kernel.num_bytes == 2 * 4 * 512 * 512


def test_an_unknown_option_prints_the_usage() -> None:
    ran = subprocess.run([str(BENCH / "gpu.sh"), "--fast"], capture_output=True, text=True)
    assert ran.returncode == 2
    assert ran.stderr == "usage: scripts/bench/gpu.sh [--dry-run] [--out FOLDER]\n"


def test_a_machine_without_a_gpu_is_refused(tmp_path: Path) -> None:
    (tmp_path / "no_gpu").write_text(f'#!/bin/sh\nJAX_PLATFORMS=cpu exec {sys.executable} "$@"\n')
    (tmp_path / "no_gpu").chmod(0o755)
    environment = {**os.environ, "PYTHON": str(tmp_path / "no_gpu")}
    command = [str(BENCH / "gpu.sh"), "--out", str(tmp_path / "out")]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 2
    assert "gpu.sh needs a GPU that JAX can use, found none" in ran.stderr
    assert not (tmp_path / "out").exists()

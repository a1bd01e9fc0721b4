"""The program that compiles the step of a job for TPUs, and its HLO parser."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from optim_zoo.errors import UserError
from optim_zoo.train import config_file
from tests.scripts.importing import imported

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "scripts" / "tpu" / "compile.py"
POD = ROOT / "configs" / "bert_large_lamb_64k_32k.toml"
ONE_STAGE = ROOT / "configs" / "bert_tiny_lamb.toml"

with imported("tpu", "hlo", "programs", "compile") as (hlo, programs, command):
    pass

# HLO text as libtpu writes it: tiled layouts with parentheses, comments in long tuples, one
# collective in several fusions, a reduce-scatter as a fusion, loops without a known trip count.
HLO = """\
HloModule jit_step, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias) }

%add.1 (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%inner_body (p: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %p = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %g = bf16[8,16]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %h = f32[16]{0:T(128)} constant({...})
  %reduced = (bf16[8,16]{1,0:T(8,128)(2,1)}, /*index=1*/f32[16]{0:T(128)}) all-reduce(%g, %h), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add.1
  %gathered = bf16[8,16]{1,0:T(8,128)(2,1)} get-tuple-element(%reduced), index=0
  ROOT %t = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) tuple(%i, %gathered)
}

%inner_condition (q: (s32[], bf16[8,16])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  %q = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  ROOT %less = pred[]{:T(512)} compare(%j, %limit), direction=LT
}

%outer_body (r: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %r = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) parameter(0)
  ROOT %inner = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) while(%r), condition=%inner_condition, body=%inner_body, metadata={op_name="jit(step)/while"}
}

%outer_condition (s: (s32[], bf16[8,16])) -> pred[] {
  %three = s32[]{:T(128)} constant(3)
  %s = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %k = s32[]{:T(128)} get-tuple-element(%s), index=0
  ROOT %done = pred[]{:T(512)} compare(%k, %three), direction=LT
}

%split_first (a: f32[4,16]) -> f32[16,16] {
  %a = f32[4,16]{1,0:T(8,128)} parameter(0)
  ROOT %part = f32[16,16]{1,0:T(8,128)} all-gather(%a), channel_id=7, dimensions={0}
}

%split_second (b: f32[4,16]) -> f32[16,16] {
  %b = f32[4,16]{1,0:T(8,128)} parameter(0)
  ROOT %rest = f32[16,16]{1,0:T(8,128)} all-gather(%b), channel_id=7, dimensions={0}
}

%all-reduce-scatter.1 (c: f32[16,16]) -> f32[4,16] {
  %c = f32[16,16]{1,0:T(8,128)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %whole = f32[16,16]{1,0:T(8,128)} all-reduce(%c), channel_id=9, to_apply=%add.1
  ROOT %cut = f32[4,16]{1,0:T(8,128)} dynamic-slice(%whole, %zero, %zero), dynamic_slice_sizes={4,16}
}

%moments (m: f32[32,16], n: f32[32,16]) -> (f32[32,16], f32[]) {
  %m = f32[32,16]{1,0:T(8,128)} parameter(0)
  %n = f32[32,16]{1,0:T(8,128)} parameter(1)
  %both = f32[32,16]{1,0:T(8,128)} add(%m, %n)
  %start = f32[]{:T(128)} constant(0)
  %norm = f32[]{:T(128)} reduce(%both, %start), dimensions={0,1}, to_apply=%add.1
  ROOT %out = (f32[32,16]{1,0:T(8,128)}, f32[]{:T(128)}) tuple(%both, %norm)
}

ENTRY %main (u: (s32[], bf16[8,16]), v: f32[4,16], w: f32[32,16]) -> f32[32,16] {
  %u = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %v = f32[4,16]{1,0:T(8,128)} parameter(1)
  %w = f32[32,16]{1,0:T(8,128)} parameter(2), sharding={replicated}
  %loop = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) while(%u), condition=%outer_condition, body=%outer_body
  %first = f32[16,16]{1,0:T(8,128)} fusion(%v), kind=kOutput, calls=%split_first
  %second = f32[16,16]{1,0:T(8,128)} fusion(%v), kind=kOutput, calls=%split_second
  %scattered = f32[4,16]{1,0:T(8,128)} fusion(%second), kind=kCustom, calls=%all-reduce-scatter.1
  %copy-start = (f32[32,16]{1,0:T(8,128)S(1)}, f32[32,16]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%w)
  %copy-done = f32[32,16]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  %fused = (f32[32,16]{1,0:T(8,128)}, f32[]{:T(128)}) fusion(%copy-done, %w), kind=kLoop, calls=%moments
  %moment = f32[32,16]{1,0:T(8,128)} get-tuple-element(%fused), index=0
  %gathering = (f32[4,16]{1,0:T(8,128)}, f32[16,16]{1,0:T(8,128)}) all-gather-start(%scattered), channel_id=11, dimensions={0}
  %gather = f32[16,16]{1,0:T(8,128)} all-gather-done(%gathering)
  ROOT %new = f32[32,16]{1,0:T(8,128)} subtract(%w, %moment)
}
"""  # noqa: E501


def test_shapes_are_parsed_from_tiled_tuples() -> None:
    text = "(bf16[1,1024]{1,0:T(2,128)(2,1)S(1)}, /*index=1*/pred[]{:T(512)}, u32[0]{0})"
    shapes = hlo.parse_shapes(text)
    assert shapes == (("bf16", (1, 1024)), ("pred", ()), ("u32", (0,)))
    assert [shape.bytes for shape in shapes] == [2048, 1, 0]


def test_instructions_of_a_loop_count_once_per_iteration() -> None:
    module = hlo.parse_module(HLO)
    assert hlo.trip_count(module, "inner_condition") == 5
    times = {x.instruction.name: x.times for x in hlo.executed(module)}
    assert times["loop"] == 1
    assert times["inner"] == 3
    assert times["reduced"] == 15
    assert "sum" not in times  # part of a reduction, not executed by itself


def test_a_loop_with_an_unknown_trip_count_is_an_error() -> None:
    two_limits = HLO.replace("%three = ", "%two = s32[]{:T(128)} constant(2)\n  %three = ")
    module = hlo.parse_module(two_limits)
    with pytest.raises(ValueError, match="condition outer_condition"):
        hlo.collectives(module)


def test_collectives_are_counted_by_kind() -> None:
    found = hlo.collectives(hlo.parse_module(HLO))
    assert found == {
        "all-reduce": {
            "count": 15,
            "bytes": 15 * (8 * 16 * 2 + 16 * 4),
            "bytes_in_loops": 15 * (8 * 16 * 2 + 16 * 4),
            "bytes_by_dtype": {"bf16": 15 * 256, "f32": 15 * 64},
        },
        # One consists of two fusions, and the results of the other one begin with its operand.
        "all-gather": {
            "count": 2,
            "bytes": 2 * 16 * 16 * 4,
            "bytes_in_loops": 0,
            "bytes_by_dtype": {"f32": 2 * 1024},
        },
        "reduce-scatter": {
            "count": 1,
            "bytes": 16 * 16 * 4,
            "bytes_in_loops": 0,
            "bytes_by_dtype": {"f32": 1024},
        },
    }


def test_passes_over_a_leaf_are_counted() -> None:
    """The fusion and the subtraction are two passes, and each reads two arrays and writes one.

    Copies between memories and instructions inside the fusion are not passes.
    """
    module = hlo.parse_module(HLO)
    assert hlo.passes(module, [32 * 16]) == (2, 6)
    assert hlo.passes(module, [32 * 16, 32 * 16]) == (1, 3)
    assert hlo.passes(module, [77]) == (0, 0)


def test_text_without_a_program_is_an_error() -> None:
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.parse_module("HloModule nothing")


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (16.50G) exceeds available HBM (15.75G).",
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 16.50G of 15.75G hbm. "
        "Exceeded hbm capacity by 768.00M.",
    ],
)
def test_needed_and_available_memory_are_read_from_the_error(message: str) -> None:
    sizes = programs.needed_and_available(RuntimeError(message))
    assert sizes == (int(16.5 * 2**30), int(15.75 * 2**30))


def test_other_compiler_errors_are_not_mistaken_for_lack_of_memory() -> None:
    with pytest.raises(RuntimeError, match="Mosaic"):
        programs.needed_and_available(RuntimeError("INTERNAL: Mosaic failed"))


def test_a_smaller_topology_uses_more_micro_batches() -> None:
    config = config_file.load(POD)
    few = programs.for_chips(config, 4, 256)
    for stage, smaller in zip(config.stages, few.stages, strict=True):
        assert smaller.micro_batches == 64 * stage.micro_batches
        assert smaller.batch_size == stage.batch_size
    assert programs.for_chips(config, 256, 256) == config


def test_a_batch_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match=r"stages\.0\.batch_size must be divisible"):
        programs.for_chips(config_file.load(POD), 48, 48)
    with pytest.raises(UserError, match="64 chips must be a multiple of 48"):
        programs.for_chips(config_file.load(POD), 48, 64)


def test_shapes_of_the_pod_config_are_known_without_its_text() -> None:
    config = config_file.load(POD)
    job = programs.make_job(config, command.BERT_VOCABULARY)
    assert sum(x.size for x in jax.tree.leaves(job.params)) == 335_174_458
    first, second = config.stages
    batch = programs.batch_shapes(config, second)
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
        "input_ids": ((32_768, 512), jnp.int32),
        "type_ids": ((32_768, 512), jnp.int32),
        "masked_positions": ((32_768, 77), jnp.int32),
        "masked_targets": ((32_768, 77), jnp.int32),
        "masked_weights": ((32_768, 77), jnp.float32),
        "dropout_keys": ((32_768, 2), jnp.uint32),
    }
    total, weight = jax.eval_shape(job.loss, job.params, programs.batch_shapes(config, first))
    assert total.shape == weight.shape == ()


def test_every_large_leaf_is_sharded() -> None:
    """8 devices divide neither 12 stacked layers nor 30,522 tokens, but they divide the widths."""
    job = programs.make_job(config_file.load(POD, ["model.num_layers=12"]), command.BERT_VOCABULARY)
    mesh = jax.make_mesh((8,), ("data",))
    specs = {path.strip("^$").replace("\\", ""): spec for path, spec in programs.sharding_rules(
        job.params, mesh)}  # fmt: skip
    large = {path for path, x in programs.by_path(job.params).items() if x.size >= programs.LARGE}
    assert set(specs) == large
    assert tuple(specs["embeddings/word_embeddings/embedding"]) == (None, "data")
    assert tuple(specs["encoder/layers/intermediate/kernel"]) == (None, None, "data")
    step = programs.make_step(job, job.config.stages[0], "fsdp", mesh)
    assert isinstance(step, programs.sharding.DataParallelStep)


def test_the_table_has_a_row_for_each_program() -> None:
    found = hlo.collectives(hlo.parse_module(HLO))
    common = {"what": "step", "chips": 4, "stage": 1, "micro_batches": 2}
    fits = {"layout": "zero1", "fits": True, "collectives": found,
            "memory": {"peak": 3 << 29, "arguments": 1 << 30, "temporaries": 1 << 29}}  # fmt: skip
    not_fitting = {"layout": "replicated", "fits": False, "memory": {"peak": 1 << 35}}
    update = {"what": "update", "optimizer": "optax.lamb", "fusions_per_large_leaf": 4.0,
              "arrays_moved_per_large_leaf": 12.0}  # fmt: skip
    table = command.markdown([common | fits, common | not_fitting, update]).splitlines()
    assert "| 4 | 1 | zero1 | 2 | 1.50 | 1.00 | 0.50 | yes |" in table[2]
    assert "| 4 | 1 | replicated | 2 | 32.00 |  |  | **no** |" in table[3]
    assert table[-1] == "| `optax.lamb` | 4 | 12 |"
    columns = {line.count("|") for line in table[:4]}
    assert len(columns) == 1


def test_a_missing_libtpu_is_reported_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[train,tpu\]'"):
        command.prepare_compiler()


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU compiler is missing: pip install -e '.[train,tpu]'",
)
TINY = [
    "model.num_layers=2",
    "model.hidden_size=256",
    "model.num_heads=2",
    "model.intermediate_size=1024",
    "model.max_positions=64",
    "data.sequence_length=64",
    "train.batch_size=64",
    "train.micro_batches=2",
]


def run(config: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the program in a new process, because libtpu reads the environment on import."""
    line = [sys.executable, str(PROGRAM), str(config), *arguments]
    environment = {**os.environ, "XLA_FLAGS": ""}
    return subprocess.run(line, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
@needs_libtpu
def test_a_tiny_config_is_compiled_for_four_chips() -> None:
    layouts = ("replicated", "zero1", "fsdp")
    chosen = [word for layout in layouts for word in ("--layout", layout)]
    done = run(ONE_STAGE, *TINY, "--topology", "v5e:2x2", "--vocabulary-size", "4096", *chosen)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    steps = {x["layout"]: x for x in lines if x["what"] == "step"}
    assert set(steps) == set(layouts)
    assert all(x["fits"] and x["chips"] == 4 for x in steps.values())
    arguments = {layout: x["memory"]["arguments"] for layout, x in steps.items()}
    # 12 bytes per parameter become 6 with zero1 (4 + 8/4), and 3 in large leaves with fsdp. Large
    # leaves have about 60 % of these parameters.
    assert arguments["zero1"] < 0.6 * arguments["replicated"]
    assert arguments["fsdp"] < 0.7 * arguments["zero1"]
    # Every gradient is summed over all chips in float32, once per step.
    parameters = sum(x.size for x in jax.tree.leaves(programs.make_job(
        config_file.load(ONE_STAGE, TINY), 4096).params))  # fmt: skip
    reduced = steps["replicated"]["collectives"]["all-reduce"]
    assert reduced["bytes_by_dtype"]["f32"] == pytest.approx(4 * parameters, rel=0.01)
    assert reduced["bytes_in_loops"] == 0
    fusions = {x["optimizer"]: x["fusions_per_large_leaf"] for x in lines if x["what"] == "update"}
    assert fusions["optim_zoo.lamb"] <= 2 < fusions["optax.lamb"]
    assert fusions["clip + optim_zoo.lamb"] <= 3 < fusions["clip + optax.lamb"]


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--topology", "v5e:nowhere"], "v5e:nowhere is no TPU topology"),
        (["--topology", "v5e:12x12"], "stages.0.batch_size must be divisible by 144 devices"),
    ],
)
def test_invalid_topologies_are_reported_in_one_sentence(
    arguments: list[str], sentence: str
) -> None:
    done = run(POD, *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert sentence in done.stderr.splitlines()[-1]

"""The training job's step on BERT, with and without each wrapper, and the optimizer's share of it.

    python scripts/bench/gpu_job_step.py [--size base] [--rounds N] [--seconds S]

The step is the one that ``optim-zoo train`` compiles for a BERT-base config on one device
(`optim_zoo.sharding.data_parallel` in mode ``jit``, layers stacked by ``nn.scan``, arithmetic in
bfloat16, dropout 0.1), on a batch of random tokens. The bare optimizer is ``clip + lamb``: clipping
by the global norm and `lamb`, both as the config names them. ``job's default`` is what the job
itself puts around it: `with_metrics` and `skip_nonfinite`, and `master_weights` where the
parameters are bfloat16.

All steps take turns in one process, and a turn is `CALLS` consecutive calls, so that
``accumulate`` makes its inner step once per turn. Prints one JSON line per candidate
(``"measured": "job step"``), and one per candidate that was left out (``"skipped"``):

    median_ms, quartiles_ms   of one call, which takes one batch
    tokens_per_second         tokens of a batch over median_ms
    optimizer_ms              median_ms minus that of "forward and backward" with parameters of the
                              same dtype, which also writes the gradients
    optimizer_share           optimizer_ms over median_ms
    parameters_dtype          in which parameters are stored; gradients have the same dtype
    state_bytes_per_parameter, temporary_bytes
"""

import argparse
import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

import gpu_lines
import harness
from optim_zoo import accumulation, guards, metrics, precision, sharding
from optim_zoo.train import config_file, optimization
from optim_zoo.train.config import Config
from optim_zoo.train.tasks.bert.model import Bert, layer_rules
from optim_zoo.train.tasks.bert.sections import Model
from optim_zoo.train.tasks.bert.vocabulary import Vocabulary
from optim_zoo.train.tasks.masked_language import batches
from optim_zoo.train.tasks.masked_language.task import init_bert, masked_loss
from optim_zoo.tree import Tree
from trees import VOCABULARY_SIZE

ROUNDS = 15
CALLS = 4  # of a turn; also the micro-batches of one accumulated step
METRICS_EVERY = 10
FORWARD_AND_BACKWARD = "forward and backward"
BARE = "clip + lamb"
# Shares of the section's time: no further compilation starts, and no further round begins.
COMPILED_BY, MEASURED_BY = 0.6, 0.9


class Size(NamedTuple):
    """A model, and the batch of one call."""

    model: Model
    vocabulary: int
    batch_size: int  # sequences
    sequence_length: int  # tokens


SIZES: Mapping[str, Size] = MappingProxyType(
    {
        "base": Size(
            Model(
                num_layers=12,
                hidden_size=768,
                num_heads=12,
                intermediate_size=3072,
                dropout=0.1,
                dtype="bfloat16",
            ),
            VOCABULARY_SIZE,
            batch_size=128,
            sequence_length=128,
        ),
        "tiny": Size(
            Model(
                hidden_size=32,
                intermediate_size=64,
                max_positions=32,
                dropout=0.1,
                dtype="bfloat16",
            ),
            vocabulary=500,
            batch_size=4,
            sequence_length=32,
        ),
    }
)


def job_config(size: Size, parameters: str) -> Config:
    """Returns the config of configs/bert_base_lamb_32k.toml on one device, at a size.

    Args:
      size: the model and the batch.
      parameters: the dtype in which parameters are stored.
    """
    excluded = ["bias", "LayerNorm"]
    return config_file.build(
        {
            "data": {"sequence_length": size.sequence_length},
            "model": dataclasses.asdict(size.model),
            "optimizer": {
                "name": "lamb",
                "weight_decay": 0.01,
                "exclude_from_weight_decay": excluded,
                "exclude_from_layer_adaptation": excluded,
            },
            "schedule": {
                "name": "warmup_polynomial",
                "learning_rate": 0.005,
                "warmup_steps": 2813,
            },
            "train": {"steps": 14063, "batch_size": size.batch_size},
            "precision": {"parameters": parameters},
        },
        "gpu_job_step.py",
    )


class Candidate(NamedTuple):
    """A step that is measured."""

    parameters: str  # the dtype in which parameters are stored
    wrap: Callable[[optax.GradientTransformation], optax.GradientTransformation] | None
    # None: forward and backward alone


def candidates(size: Size) -> dict[str, Candidate]:
    """Returns all steps, the most important first."""

    def job_default(parameters: str) -> Candidate:
        wrap = functools.partial(optimization.wrapped, job_config(size, parameters))
        return Candidate(parameters, wrap)

    def rounded(tx: optax.GradientTransformation) -> optax.GradientTransformation:
        return precision.stochastic_rounding(tx, jax.random.key(0))

    float32: dict[str, Any] = {
        BARE: lambda tx: tx,
        f"skip_nonfinite({BARE})": guards.skip_nonfinite,
        f"skip_spikes({BARE})": guards.skip_spikes,
        f"with_metrics({BARE})": metrics.with_metrics,
        f"with_metrics({BARE}, every={METRICS_EVERY})": functools.partial(
            metrics.with_metrics, every=METRICS_EVERY
        ),
        f"accumulate({BARE}, {CALLS})": functools.partial(accumulation.accumulate, every=CALLS),
        f"store_state({BARE}, mu, nu in bfloat16)": functools.partial(
            precision.store_state, dtypes={"mu": "bfloat16", "nu": "bfloat16"}
        ),
    }
    bfloat16: dict[str, Any] = {
        BARE: lambda tx: tx,
        f"master_weights({BARE})": precision.master_weights,
        f"stochastic_rounding({BARE})": rounded,
    }
    narrow = ", bfloat16 parameters"
    return {
        FORWARD_AND_BACKWARD: Candidate("float32", None),
        BARE: Candidate("float32", float32.pop(BARE)),
        "job's default": job_default("float32"),
        FORWARD_AND_BACKWARD + narrow: Candidate("bfloat16", None),
        "job's default" + narrow: job_default("bfloat16"),
        **{name: Candidate("float32", wrap) for name, wrap in float32.items()},
        **{name + narrow: Candidate("bfloat16", wrap) for name, wrap in bfloat16.items()},
    }


class JobStep:
    """A compiled step of the job, or its forward and backward pass alone, on one batch."""

    def __init__(self, candidate: Candidate, size: Size, batch: Tree) -> None:
        """Compiles the step; nothing is allocated."""
        settings = job_config(size, candidate.parameters)
        self._model = Bert(size.model, size.vocabulary)
        self._config, self._batch = settings, batch
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, candidate.parameters),
            jax.eval_shape(functools.partial(init_params, size), jax.random.key(0)),
        )
        if candidate.wrap is None:
            self._job = None
            step = jax.jit(jax.value_and_grad(self._mean_loss)).lower(shapes, batch)
        else:
            bare = optimization.make_optimizer(settings, layer_rules(size.model))
            tx = candidate.wrap(bare)
            mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
            self._job = sharding.data_parallel(self._loss, tx, mesh=mesh)
            step = self._job.lower(shapes, batch)
        self._step: Any = step.compile()
        memory: Any = self._step.memory_analysis()
        self.temporary_bytes: int = memory.temp_size_in_bytes
        self.parameters = harness.parameters(shapes)
        self.state_bytes = 0
        if candidate.wrap is None:
            self.temporary_bytes += memory.output_size_in_bytes  # the gradients
        else:
            self.state_bytes = harness.tree_bytes(jax.eval_shape(tx.init, shapes))
        self.held_bytes = harness.tree_bytes(shapes) + self.state_bytes

    def start(self, params: Tree) -> None:
        """Takes float32 parameters to start from, which it copies, and makes the state."""
        dtype = self._config.precision.parameters
        params = jax.tree.map(lambda x: x.astype(dtype), params)
        self._carry = (params,) if self._job is None else self._job.init(params)

    def __call__(self) -> Tree:
        """Makes one step, or one forward and backward pass."""
        made = self._step(*self._carry, self._batch)
        if self._job is not None:
            self._carry = made[:2]
        return made

    def _loss(self, params: Tree, batch: Tree) -> sharding.WeightedLoss:
        return masked_loss(self._model, params, batch)

    def _mean_loss(self, params: Tree, batch: Tree) -> jax.Array:
        total, weight = self._loss(params, batch)
        return total / weight


def init_params(size: Size, key: jax.Array) -> Tree:
    """Returns the float32 parameters that the job starts from."""
    return init_bert(Bert(size.model, size.vocabulary), size.sequence_length, key)


def random_batch(size: Size) -> Tree:
    """Returns a masked batch of random tokens, with the shapes and dtypes of the job's batches."""
    names = tuple(map(str, range(size.vocabulary)))
    vocabulary = Vocabulary(names, pad=0, unk=1, cls=2, sep=3, mask=4, digest="")
    tokens = np.random.default_rng(0).integers(5, size.vocabulary, 100_000)
    batch: dict[str, np.ndarray] = batches.masked_batch(
        tokens.astype(vocabulary.dtype),
        vocabulary,
        seed=0,
        step=0,
        batch_size=size.batch_size,
        sequence_length=size.sequence_length,
    )
    keys = np.random.default_rng(1).integers(0, 1 << 32, (size.batch_size, 2), dtype=np.uint32)
    return jax.tree.map(jnp.asarray, {**batch, "dropout_keys": keys})


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seconds", type=float, default=180.0, help="the section's time limit")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 2:
        parser.error(f"--rounds must be at least 2, for quartiles, got {arguments.rounds}")
    clock = gpu_lines.Clock(arguments.seconds)
    size = SIZES[arguments.size]
    all_candidates = candidates(size)
    common = {
        **gpu_lines.common("job step"),
        "tree": f"bert-{arguments.size}-scan",
        "dtype": size.model.dtype,
        "model": dataclasses.asdict(size.model),
        "batch_size": size.batch_size,
        "sequence_length": size.sequence_length,
    }
    steps = _compiled(all_candidates, size, clock.at(COMPILED_BY), common)
    params = jax.jit(functools.partial(init_params, size))(jax.random.key(0))
    starts = {name: functools.partial(step.start, params) for name, step in steps.items()}
    list(gpu_lines.made_together(starts))  # compiles each optimizer's init
    milliseconds = harness.interleaved(
        steps, arguments.rounds, calls=CALLS, until=clock.at(MEASURED_BY)
    )
    medians = {name: statistics.median(times) for name, times in milliseconds.items()}
    tokens = size.batch_size * size.sequence_length
    passes = {
        candidate.parameters: medians[name]
        for name, candidate in all_candidates.items()
        if candidate.wrap is None and name in medians
    }
    for name, times in milliseconds.items():
        step, parameters = steps[name], all_candidates[name].parameters
        measured = {
            "measured": "job step",
            "rounds": len(times),
            **harness.spread(times),
            "tokens_per_second": 1e3 * tokens / medians[name],
            "parameters_dtype": parameters,
            "parameters": step.parameters,
            "state_bytes_per_parameter": step.state_bytes / step.parameters,
            "temporary_bytes": step.temporary_bytes,
        }
        if parameters in passes:
            measured["optimizer_ms"] = medians[name] - passes[parameters]
            measured["optimizer_share"] = measured["optimizer_ms"] / medians[name]
        harness.show(name, common, measured)


def _compiled(
    wanted: Mapping[str, Candidate], size: Size, until: float, common: Mapping[str, Any]
) -> dict[str, JobStep]:
    """Returns the steps that fit into time and memory, compiled."""
    batch = random_batch(size)
    makers = {
        name: functools.partial(JobStep, candidate, size, batch)
        for name, candidate in wanted.items()
    }
    compiled = dict(gpu_lines.made_together(makers, until))
    for name, step in compiled.items():
        if step is None:
            gpu_lines.show_skipped(name, gpu_lines.NO_TIME, common)
    in_order = {name: step for name in makers if (step := compiled[name]) is not None}
    return gpu_lines.fitting(in_order, 0, common)


if __name__ == "__main__":
    main()

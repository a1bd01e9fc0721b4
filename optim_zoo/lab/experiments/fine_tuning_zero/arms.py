"""The optimizers that fine-tune, as the public repositories have them, and repaired."""

import dataclasses
from collections.abc import Callable
from types import MappingProxyType

import optax

from optim_zoo import bert_adamw, lookahead, ranger
from optim_zoo.ports import jyhengcoder, lifeiteng, michaelrzhang, tf1

Make = Callable[[optax.Schedule], optax.GradientTransformation]


def _lookahead(schedule: optax.Schedule) -> optax.GradientTransformation:
    return lookahead(tf1.AdamOptimizer(schedule), sync_period=5, slow_step_size=0.5)


def _ranger(schedule: optax.Schedule) -> optax.GradientTransformation:
    return ranger(schedule, 0.9, 0.999, 1e-8, sync_period=6, slow_step_size=0.5)


# The repositories' own defaults. Lookahead wraps TensorFlow's Adam, Ranger has RAdam inside.
OPTIMIZERS: MappingProxyType[str, Make] = MappingProxyType(
    {
        "bert_adamw": bert_adamw,
        "lifeiteng.RAdam": lifeiteng.RAdamOptimizer,
        "lifeiteng.Lookahead": lambda schedule: lifeiteng.LookaheadOptimizer(
            tf1.AdamOptimizer(schedule)
        ),
        "michaelrzhang.LookaheadTF": lambda schedule: michaelrzhang.LookaheadTF(
            tf1.AdamOptimizer(schedule)
        ),
        "jyhengcoder.Ranger": jyhengcoder.Ranger,
        "lookahead": _lookahead,
        "ranger": _ranger,
    }
)


# Lookahead's alpha, and the step after which it synchronizes for the first time.
FIRST_SYNC = MappingProxyType(
    {
        "lifeiteng.Lookahead": (0.5, 5),
        "michaelrzhang.LookaheadTF": (0.8, 6),
        "jyhengcoder.Ranger": (0.5, 1),
        "lookahead": (0.5, 5),
        "ranger": (0.5, 6),
    }
)


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to fine-tune."""

    name: str  # in results.jsonl
    title: str
    optimizer: str  # a name of `OPTIMIZERS`
    # The arm from whose movement the learning rate follows: the rate of BERT's AdamW, divided by
    # how far that arm moves compared with BERT's AdamW. "" for the rate of BERT's AdamW itself.
    raised_from: str = ""
    pretrained: bool = True


BASE = "bert_adamw"

# An arm comes after the one that its rate follows from.
ARMS = (
    Arm(BASE, "BERT's AdamW", "bert_adamw"),
    Arm("radam", "RAdam (lifeiteng)", "lifeiteng.RAdam"),
    Arm("lookahead_zero", "Lookahead (lifeiteng)", "lifeiteng.Lookahead"),
    Arm("ranger_zero", "Ranger (jyhengcoder)", "jyhengcoder.Ranger"),
    Arm("lookahead", "Lookahead, repaired", "lookahead"),
    Arm("ranger", "Ranger, repaired", "ranger"),
    Arm("radam_raised", "RAdam (lifeiteng)", "lifeiteng.RAdam", "radam"),
    Arm("lookahead_raised", "Lookahead, repaired", "lookahead", "lookahead"),
    Arm("ranger_raised", "Ranger, repaired", "ranger", "ranger"),
    Arm("lookahead_zero_raised", "Lookahead (lifeiteng)", "lifeiteng.Lookahead", "lookahead"),
    Arm("ranger_zero_raised", "Ranger (jyhengcoder)", "jyhengcoder.Ranger", "ranger"),
    Arm("lookahead_0.8_zero", "Lookahead (michaelrzhang)", "michaelrzhang.LookaheadTF"),
    Arm("scratch", "BERT's AdamW, not pretrained", "bert_adamw", pretrained=False),
)
QUICK_ARMS = tuple(arm for arm in ARMS if "ranger" in arm.name or arm.name in (BASE, "scratch"))

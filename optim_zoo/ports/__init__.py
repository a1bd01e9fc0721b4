"""Other libraries' optimizers, with their names and arguments and the numbers they compute.

There is one module for each library: ``ports.torch.AdamW(lr=1e-3, betas=(0.9, 0.95))``. Learning
rates may be schedules. An argument that a source has and its port does not support raises
``NotImplementedError``. Known defects of a source are reproduced; the first sentence of the
docstring names the defect, and "Repaired:" says how to avoid it. `from_state_dict` carries over
a torch run, and `from_optax_state` a run with optax.

Norms are those of this library. They equal a source's norms as long as the squares fit into the
dtype of the source. Where a source's norm underflows to zero or overflows, a port's is correct.
"""

from optim_zoo.ports import (
    albert,
    apex,
    bert,
    jyhengcoder,
    keras,
    lifeiteng,
    michaelrzhang,
    mlperf,
    nvidia,
    pytorch_optimizer,
    tensorflow_addons,
    tf1,
    tf_keras,
    timm,
    torch,
    ymcui,
)
from optim_zoo.ports.optax_state import from_optax_state
from optim_zoo.ports.param_groups import from_param_groups
from optim_zoo.ports.state_dict import from_state_dict

__all__ = [
    "albert",
    "apex",
    "bert",
    "from_optax_state",
    "from_param_groups",
    "from_state_dict",
    "jyhengcoder",
    "keras",
    "lifeiteng",
    "michaelrzhang",
    "mlperf",
    "nvidia",
    "pytorch_optimizer",
    "tensorflow_addons",
    "tf1",
    "tf_keras",
    "timm",
    "torch",
    "ymcui",
]

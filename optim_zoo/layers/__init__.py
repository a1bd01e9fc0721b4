"""Layers: what one is inside an array, and norms for each of them.

`specs` says what a layer is, `mesh_axes` which mesh axes an array is sharded over, `norms` computes
one norm for each layer, and `wide_range` keeps its squares from overflowing. `depths` says how deep
in the model a layer is.
"""

from optim_zoo.layers.depths import layerwise_decay
from optim_zoo.layers.specs import LayerAxis, Layers, assign, from_scan, ranks, split, stacked

__all__ = [
    "LayerAxis",
    "Layers",
    "assign",
    "from_scan",
    "layerwise_decay",
    "ranks",
    "split",
    "stacked",
]

"""Layers: what one is inside an array, and norms for each of them.

`specs` says what a layer is, `mesh_axes` which mesh axes an array is sharded over, and `norms`
computes one norm for each layer.
"""

from optim_zoo.layers.specs import LayerAxis, Layers, assign, from_scan, ranks, split, stacked

__all__ = ["LayerAxis", "Layers", "assign", "from_scan", "ranks", "split", "stacked"]

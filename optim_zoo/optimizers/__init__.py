"""The optimizers, one paper in each file, each a chain of pieces from `optim_zoo.transforms`.

`optim_zoo.registry` makes them public: ``optim_zoo.lamb`` is `optim_zoo.optimizers.lamb.lamb`.
"""

"""The optimizers, one paper a file, each a chain of pieces from `optim_zoo.transforms`."""

from optim_zoo.optimizers.adamw import adamw
from optim_zoo.optimizers.bert_adamw import bert_adamw
from optim_zoo.optimizers.lamb import lamb

__all__ = ["adamw", "bert_adamw", "lamb"]

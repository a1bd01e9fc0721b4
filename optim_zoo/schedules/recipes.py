"""Published settings of schedules for a batch size."""

from typing import NamedTuple

from optim_zoo.errors import ArgumentValueError


class Recipe(NamedTuple):
    """The settings of the LAMB paper for one batch size; see `lamb_recipe`."""

    learning_rate: float
    warmup_ratio: float  # the share of the warmup in all steps

    def warmup_steps(self, total_steps: int) -> int:
        """Returns the number of steps of the warmup, rounded."""
        return round(self.warmup_ratio * total_steps)


LAMB_BATCH_SIZES = tuple(512 * 2**k for k in range(7))


def lamb_recipe(batch_size: int) -> Recipe:
    """Returns the LAMB paper's settings for BERT at a batch size (arXiv 1904.00962, table 4).

    ::

        batch size 512 2^k, k = 0..6:
        learning rate = 5 / (2^(3 - k/2) 10^3),   warmup ratio = 2^k / 320

    The paper scales the learning rate by the square root of the batch size, and the warmup
    linearly, from batch size 512 to 32,768 without further tuning.

    Args:
      batch_size: One of 512, 1024, 2048, 4096, 8192, 16384 and 32768.

    Returns:
      The learning rate and the share of the warmup in all steps.

    Raises:
      ArgumentValueError: ``batch_size`` is not one of the seven.

    Example:
      ```python
      recipe = optim_zoo.schedules.lamb_recipe(4096)
      schedule = optim_zoo.schedules.warmup_polynomial(
          recipe.learning_rate, recipe.warmup_steps(1000), 1000
      )
      tx = optim_zoo.lamb(schedule)
      ```
    """
    if batch_size not in LAMB_BATCH_SIZES:
        sizes = ", ".join(map(str, LAMB_BATCH_SIZES))
        raise ArgumentValueError(
            "batch_size",
            f"be one of {sizes}",
            batch_size,
            sentence=f"the recipe is for the batch sizes {sizes}, got {batch_size}",
        )
    k = LAMB_BATCH_SIZES.index(batch_size)
    return Recipe(5 / (2 ** (3 - k / 2) * 10**3), 2**k / 320)

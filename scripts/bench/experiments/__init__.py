"""The experiments of ``against_optax.py``: each is a function that returns a row of the table."""

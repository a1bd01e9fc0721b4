"""Exceptions that carry data, so that no code has to read a message.

A check that refuses an argument raises an `ArgumentError`. It is also a ``ValueError`` or a
``TypeError``, and its parts can be used without looking at its text::

    try:
        optim_zoo.lamb(-1.0)
    except optim_zoo.errors.ArgumentError as error:
        print(error.argument, error.received)  # learning_rate -1.0

`UserError` is a mistake of a person at the command line, where it is printed without a traceback.
"""

import contextlib
import copy
import pickle
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import jax
import numpy as np


class ArgumentError(Exception):
    """Base class of `ArgumentValueError` and `ArgumentTypeError`; it is not raised itself.

    The message is ``<caller>: <argument> must <expected>, got <received>: <advice>``, or
    ``sentence`` where that does not read well. The message is made from these parts when it is
    shown, so that an error that was `renamed` uses the new name everywhere.

    Args:
      argument: The name of the argument, as the caller wrote it; ``betas[0]`` for an item of it.
      expected: What must be true of the argument, as it follows "must": ``be in [0, 1)``.
      received: The value that was refused.
      advice: What to do, if that does not follow from ``expected``.
      sentence: The whole message, with ``{argument}`` where it names the argument.
      related: The names of other arguments, if ``received`` is wrong only together with them.
      caller: The function that was called, if the name of the argument alone is ambiguous.
    """

    def __init__(
        self,
        argument: str,
        expected: str,
        received: Any,
        advice: str = "",
        sentence: str = "",
        related: Sequence[str] = (),
        caller: str = "",
    ) -> None:
        # All arguments in this order, because `pickle` and `copy` call the class with them.
        super().__init__(argument, expected, received, advice, sentence, related, caller)
        self.argument = argument
        self.expected = expected
        self.received = received
        self.advice = advice
        self.sentence = sentence
        self.related = tuple(related)
        self.caller = caller

    def __str__(self) -> str:
        if self.sentence:
            return self.sentence.replace("{argument}", self.argument)
        caller = f"{self.caller}: " if self.caller else ""
        advice = f": {self.advice}" if self.advice else ""
        return f"{caller}{self.argument} must {self.expected}, got {_shown(self.received)}{advice}"

    def renamed(self, argument: str, related: Sequence[str] | None = None) -> Self:
        """Returns a copy of the error with other names of its argument and related arguments.

        It is for a function that passes its own argument on under the name of another function.
        """
        again = copy.copy(self)
        again.argument = argument
        again.related = self.related if related is None else tuple(related)
        again.args = (argument, *self.args[1:5], again.related, *self.args[6:])
        return again

    def __copy__(self) -> Self:
        # The class is not called, because a subclass may have its own __init__. Notes are kept.
        again = type(self).__new__(type(self), *self.args)
        again.__dict__.update(self.__dict__)
        return again

    def __reduce__(self) -> str | tuple[Any, ...]:
        """Replaces a received value that cannot be pickled, such as a lambda, by its text.

        This lets a worker process send the error to its parent.
        """
        try:
            pickle.dumps(self.received)
        except Exception:  # an object may raise anything when it is pickled
            parts = (self.argument, self.expected, _Text(_shown(self.received)), self.advice)
            return type(self), (*parts, self.sentence, self.related, self.caller)
        return super().__reduce__()


class ArgumentValueError(ArgumentError, ValueError):
    """An argument has a value that is not allowed."""


class ArgumentTypeError(ArgumentError, TypeError):
    """An argument is of a type that is not allowed."""


@contextlib.contextmanager
def renaming(names: Mapping[str, str]) -> Iterator[None]:
    """Renames the arguments of an `ArgumentError` that is raised inside the ``with`` block.

    It is for a function that passes its own argument on under the name of another function::

        with errors.renaming({"decay": "momentum"}):
            trace = trace_momentum(momentum)

    Args:
      names: The name in the outer function for each name in the inner function. Other names stay.
    """
    try:
        yield
    except ArgumentError as error:
        argument, *related = (names.get(x, x) for x in (error.argument, *error.related))
        if (argument, *related) == (error.argument, *error.related):
            raise
        again = error.renamed(argument, related).with_traceback(error.__traceback__)
        raise again from error.__cause__


def parameters_missing(caller: str) -> ArgumentValueError:
    """Returns the error of ``update(grads, state)`` if the piece also needs the parameters."""
    advice = "update(grads, state, params)"
    sentence = f"{caller} needs the parameters: {advice}"
    return ArgumentValueError("params", "be the parameters", None, advice, sentence, caller=caller)


class UserError(Exception):
    """A mistake of the user, in one sentence: what was expected, what was received, what to do.

    The command line prints the sentence and exits with code 2. If an argument was refused, the
    ``__cause__`` is the `ArgumentError`.
    """


class _Text(str):
    """The text of a value that could not be pickled; it is shown without quotes."""

    __slots__ = ()


def _shown(value: Any) -> str:
    """Returns a value as messages show it: numbers and dtypes as text, other values as repr."""
    plain = (int, float, np.number, np.ndarray, np.dtype, jax.Array, _Text)
    return str(value) if isinstance(value, plain) else repr(value)

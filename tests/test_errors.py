"""Tests that errors carry data and that no code of the package parses an exception's text."""

import ast
import concurrent.futures
import copy
import inspect
import multiprocessing
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optim_zoo as oz
from optim_zoo import (
    accumulation,
    averaging,
    errors,
    guards,
    layers,
    metrics,
    ports,
    precision,
    registry,
    rules,
    saved_state,
    schedules,
)
from optim_zoo.errors import ArgumentError, ArgumentTypeError, ArgumentValueError, UserError
from tests import pieces

# The fields of an error.


def test_the_message_is_made_from_the_fields() -> None:
    error = ArgumentValueError("b1", "be in [0, 1)", 1.5, "try 0.9")
    assert isinstance(error, ValueError)
    assert isinstance(error, ArgumentError)
    assert not isinstance(error, TypeError)
    assert issubclass(ArgumentTypeError, TypeError)
    assert (error.argument, error.expected) == ("b1", "be in [0, 1)")
    assert (error.received, error.advice) == (1.5, "try 0.9")
    assert str(error) == "b1 must be in [0, 1), got 1.5: try 0.9"
    assert str(ArgumentTypeError("parts", "be a number", "2", caller="split")) == (
        "split: parts must be a number, got '2'"
    )


@pytest.mark.parametrize(
    ("received", "shown"),
    [
        (1, "1"),
        (np.float32(0.5), "0.5"),
        (jnp.float32(0.5), "0.5"),
        (jnp.dtype("bfloat16"), "bfloat16"),
        ("bias", "'bias'"),
        (None, "None"),
        ((1.0, "x"), "(1.0, 'x')"),
    ],
)
def test_the_received_value_is_shown_without_its_array_type(received: Any, shown: str) -> None:
    assert str(ArgumentValueError("x", "be right", received)) == f"x must be right, got {shown}"


def test_renaming_replaces_the_name_in_the_whole_message() -> None:
    error = ArgumentValueError(
        "b1", "be small", 3, "lower it", "{argument}: 3; {argument}: 4", ["b2"], "adam"
    )
    renamed = error.renamed("betas[0]")
    assert type(renamed) is ArgumentValueError
    assert str(renamed) == "betas[0]: 3; betas[0]: 4"
    assert renamed.argument == "betas[0]"
    for part in ("expected", "received", "advice", "sentence", "related", "caller"):
        assert getattr(renamed, part) == getattr(error, part)
    assert str(error) == "b1: 3; b1: 4"
    assert str(ArgumentTypeError("b1", "be a number", None).renamed("lr")) == (
        "lr must be a number, got None"
    )


class _Own(ArgumentValueError):
    """A subclass whose ``__init__`` takes other arguments."""

    def __init__(self, argument: str) -> None:
        super().__init__(argument, "be small", 3, related=["b2", "b3"])


def test_renaming_keeps_everything_else() -> None:
    error = _Own("b1")
    error.add_note("a note")
    with pytest.raises(_Own) as caught, errors.renaming({"b1": "beta1", "b2": "beta2"}):
        raise error
    assert caught.value.argument == "beta1"
    assert caught.value.related == ("beta2", "b3")
    assert caught.value.__notes__ == ["a note"]
    assert (error.argument, error.related) == ("b1", ("b2", "b3"))
    with pytest.raises(_Own) as caught, errors.renaming({"other": "name"}):
        raise error
    assert caught.value is error


def test_related_arguments_are_those_of_the_caller() -> None:
    for call, related in (
        (lambda: oz.nesterov(0.1, 0.0), ("momentum",)),
        (lambda: ports.torch.SGD(0.1, 0.0, nesterov=True), ("momentum",)),
        (lambda: oz.trace_momentum(0.0, nesterov=True), ("decay",)),
    ):
        with pytest.raises(ArgumentValueError) as caught:
            call()
        assert caught.value.related == related


EXAMPLES: list[Exception] = [
    ArgumentValueError("b1", "be in [0, 1)", 1.5),
    ArgumentTypeError("x", "be a number", "1", "drop the quotes", caller="split"),
    ArgumentValueError("x", "be small", np.float32(2), "", "{argument} is large", ["y"]),
    guards.TooManyRefusals(3, 2, 7),
    UserError("a sentence"),
]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))]
)
def test_copies_and_pickles_keep_all_fields(
    error: Exception, copied: Callable[[Exception], Exception]
) -> None:
    again = copied(error)
    assert type(again) is type(error)
    assert vars(again) == vars(error)
    assert str(again) == str(error)


def test_a_value_that_cannot_be_pickled_is_replaced_by_its_repr() -> None:
    error = ArgumentTypeError("inner", "be a number", lambda: None)
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert again.received == repr(error.received)
    assert again.argument == "inner"
    assert copy.copy(error).received is error.received
    assert pickle.loads(pickle.dumps(again)).received == again.received


def _refused(value: float) -> None:
    raise ArgumentValueError("value", "be in [0, 1)", value, "lower it")


def test_an_error_from_a_worker_process_keeps_all_fields() -> None:
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        error = pool.submit(_refused, 2.0).exception(timeout=120)
    assert isinstance(error, ArgumentValueError)
    assert (error.argument, error.received) == ("value", 2.0)
    assert str(error) == "value must be in [0, 1), got 2.0: lower it"


def test_the_cause_of_an_error_is_kept() -> None:
    with pytest.raises(ArgumentValueError) as caught:
        try:
            int("x")
        except ValueError as error:
            raise ArgumentValueError("n", "be a number", "x") from error
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_user_error_is_not_an_argument_error() -> None:
    """Code that turns a `ValueError` into a `UserError` must not catch a `UserError`."""
    assert not issubclass(UserError, (ValueError, TypeError))
    assert not issubclass(ArgumentError, UserError)


# Errors raised by the package.


@pytest.mark.parametrize(
    ("call", "argument", "received"),
    [
        (lambda: rules.check_patterns("exclude", "bias"), "exclude", "bias"),
        (lambda: rules.check_patterns("exclude", ["a", "("]), "exclude", "("),
        (lambda: rules.check_matches("tables", ["a", "b"], {"a": 1.0}), "tables", ["b"]),
        (lambda: rules.assign("x", [], {"a": 1.0}), "x", []),
        (lambda: registry.get("lamp"), "name", "lamp"),
        (lambda: oz.stacked("0"), "axis", "0"),  # type: ignore[arg-type]
        (lambda: oz.split(0, 0), "parts", 0),
        (lambda: schedules.constant(-1.0), "learning_rate", -1.0),
        (lambda: schedules.mixed_batch([]), "stages", []),
        (lambda: schedules.lamb_recipe(256), "batch_size", 256),
        (lambda: saved_state.check({}, {}), "saved", {}),
        (lambda: oz.recorded.get("lambo"), "case_id", "lambo"),
        (lambda: oz.sgd(0.1, 1.5), "momentum", 1.5),
        (lambda: oz.lamb(0.1, phi_bounds=(2.0, 1.0)), "phi_bounds", (2.0, 1.0)),
        (lambda: ports.torch.AdamW(betas=(0.9, 1.0)), "betas[1]", 1.0),
        (lambda: ports.torch.AdamW(betas=0.9), "betas", 0.9),  # type: ignore[arg-type]
        (lambda: ports.timm.Lookahead(3), "base_optimizer", 3),
        (lambda: ports.tf1.AdamOptimizer(beta_1=2.0), "beta_1", 2.0),
        (lambda: ports.tf1.AdamOptimizer(beta1=2.0), "beta1", 2.0),
        (lambda: ports.tf1.AdamOptimizer(beta2=2.0), "beta2", 2.0),
        (lambda: ports.tf1.MomentumOptimizer(0.1, 0.0, use_nesterov=True), "use_nesterov", True),
        (lambda: ports.keras.Adam(clipnorm=-1.0), "clipnorm", -1.0),
    ],
)
def test_errors_name_the_argument_and_the_received_value(
    call: Callable[[], Any], argument: str, received: Any
) -> None:
    with pytest.raises(ArgumentError) as caught:
        call()
    assert caught.value.argument == argument
    assert caught.value.received == received
    assert caught.value.expected


def test_from_scan_names_the_prefix_and_counts_the_layers() -> None:
    params = {"layers": {"bias": jnp.ones((2, 4)), "kernel": jnp.ones((3, 4, 4))}}
    with pytest.raises(ArgumentValueError) as caught:
        layers.from_scan(params, "layers")
    assert caught.value.argument == "prefix"
    assert caught.value.received == {"layers/bias": 2, "layers/kernel": 3}
    with pytest.raises(ArgumentValueError, match="prefix 'layer/' matches no leaf; the nearest"):
        layers.from_scan(params, "layer/")
    odd = {"layers (3)": {"a (2)": jnp.ones((2, 4)), "b (7)": jnp.ones((2, 4))}}
    assert layers.from_scan(odd, "layers (3)")


def test_too_many_refusals_carries_its_counts() -> None:
    tx = guards.skip_nonfinite(oz.sgd(0.1), max_consecutive=2)
    params = {"a": jnp.ones(2)}
    state = tx.init(params)
    for scale in (jnp.nan, 1.0, jnp.nan, jnp.nan, jnp.inf):
        _, state = tx.update({"a": jnp.ones(2) * scale}, state, params)
    with pytest.raises(guards.TooManyRefusals) as caught:
        guards.check(state)
    error = caught.value
    assert (error.in_a_row, error.limit, error.total) == (3, 2, 4)
    assert str(error).startswith("3 steps in a row were skipped, at most 1 are allowed (4 in all)")


WRAPPERS: tuple[Callable[..., Any], ...] = (
    accumulation.accumulate,
    averaging.average_parameters,
    averaging.average_uniformly,
    guards.skip_nonfinite,
    guards.skip_spikes,
    metrics.with_metrics,
    precision.master_weights,
    precision.stochastic_rounding,
    precision.store_state,
)


def _constructors() -> Iterator[tuple[str, Callable[..., Any]]]:
    for name, entry in registry.OPTIMIZERS.items():
        yield name, entry.constructor
    yield from pieces.PIECES.items()
    for wrapper in WRAPPERS:
        yield wrapper.__name__, wrapper
    for library in filter(inspect.ismodule, (getattr(ports, name) for name in ports.__all__)):
        for name, value in vars(library).items():
            own = inspect.isfunction(value) and value.__module__ == library.__name__
            if own and (name[0].isupper() or name == "create_optimizer"):
                yield f"{library.__name__.rpartition('.')[2]}.{name}", value


# Arguments that some constructors require; without `pre_norm`, a limit is not used.
_NEEDED: dict[str, Any] = {"weight_decay": 0.1, "momentum": 0.9, "num_train_steps": 9}
_NEEDED |= {"num_warmup_steps": 2, "total_steps": 9, "max_grad_norm": 1.0, "learning_rate": 0.1}
_NEEDED |= {"pre_norm": True, "lr": 0.1, "init_lr": 0.1, "beta_1": 0.9, "beta_2": 0.99}
_NEEDED |= {"max_norm": 1.0, "every": 2}
_DTYPES = {"momentum": "bfloat16"}


def _wrong(name: str, parameter: inspect.Parameter) -> Any:
    """Returns a value that is out of range, or None if the parameter is not numeric."""
    if isinstance(parameter.default, bool) or name in ("name", "seed"):
        return None
    if name == "betas":
        return (0.9, -2.0)
    numbers = name in _NEEDED or isinstance(parameter.default, (int, float))
    whole = isinstance(parameter.default, int) or name.endswith("_steps") or name == "every"
    return (-2 if whole else -2.0) if numbers else None


# Numbers without a range: any value is valid, or the port supports none but the default.
_WITHOUT_RANGE = {
    *("ema_momentum", "output_axis", "pytorch_optimizer.Lamb-n_sma_threshold"),
    *("torch.SGD-dampening", "timm.Lars-dampening"),
}


def _arguments(constructor: Callable[..., Any]) -> dict[str, Any]:
    """Returns the arguments that the constructor requires."""
    takes = inspect.signature(constructor).parameters
    arguments = {k: v for k, v in _NEEDED.items() if k in takes}
    if first := set(takes) & {"inner", "base", "optimizer", "base_optimizer"}:
        arguments[first.pop()] = oz.scale_by_adam() if "base" in takes else oz.momentum(0.1, 0.9)
    arguments |= {k: v for k, v in {"dtypes": _DTYPES, "key": jax.random.key(0)}.items()
                  if k in takes}  # fmt: skip
    return arguments


@pytest.mark.parametrize(
    ("constructor", "name"),
    [
        pytest.param(constructor, name, id=f"{label}-{name}")
        for label, constructor in _constructors()
        for name, parameter in inspect.signature(constructor).parameters.items()
        if _wrong(name, parameter) is not None and not {name, f"{label}-{name}"} & _WITHOUT_RANGE
    ],
)
def test_a_value_out_of_range_names_the_argument_of_the_caller(
    constructor: Callable[..., Any], name: str
) -> None:
    arguments = _arguments(constructor)
    arguments[name] = _wrong(name, inspect.signature(constructor).parameters[name])
    with pytest.raises(ArgumentValueError) as caught:
        constructor(**arguments).init({"a": jnp.ones(2)})
    assert caught.value.argument.partition("[")[0] == name
    assert str(caught.value).startswith(name)
    assert caught.value.received == -2


def _paths(constructor: Callable[..., Any]) -> Iterator[tuple[str, Any, type[ArgumentError]]]:
    """Yields each argument that takes path patterns, with a wrong value and the expected error."""
    for name in inspect.signature(constructor).parameters:
        if name.startswith("exclude") or name == "skip_list":
            if inspect.signature(constructor).parameters[name].default is not None:
                yield name, None, ArgumentTypeError
            yield name, "bias", ArgumentTypeError  # each letter would be a pattern
            yield name, [3], ArgumentTypeError
            if name != "skip_list":  # holds path components, not patterns
                yield name, ["("], ArgumentValueError
            yield name, ["absent"], ArgumentValueError
        elif name == "dtypes":
            yield name, None, ArgumentTypeError
            yield name, {"absent": "bfloat16"}, ArgumentValueError
        elif name == "key":
            yield name, None, ArgumentTypeError
            yield name, jnp.zeros(2, "uint32"), ArgumentTypeError
        elif name == "layers":
            yield name, [("a", 0)], ArgumentTypeError
            yield name, [(3, oz.stacked(0))], ArgumentTypeError
            yield name, [("absent", oz.stacked(0))], ArgumentValueError
            yield name, [("a", oz.stacked(5))], ArgumentValueError
        elif name == "axis_name":
            yield name, 3, ArgumentTypeError
            yield name, [("absent", "data")], ArgumentValueError
        elif name in ("inner", "base", "optimizer", "base_optimizer"):
            yield name, None, ArgumentTypeError


@pytest.mark.parametrize(
    ("constructor", "name", "value", "kind"),
    [
        pytest.param(constructor, *row, id=f"{label}-{row[0]}-{i}")
        for label, constructor in _constructors()
        for i, row in enumerate(_paths(constructor))
    ],
)
def test_a_wrong_pattern_names_the_argument_of_the_caller(
    constructor: Callable[..., Any], name: str, value: Any, kind: type[ArgumentError]
) -> None:
    """Some are detected only in ``init``, after the constructor has returned."""
    with pytest.raises(kind) as caught:
        constructor(**_arguments(constructor) | {name: value}).init({"a": jnp.ones(2)})
    assert caught.value.argument == name
    assert str(caught.value).startswith(name) or name == "dtypes"  # names the field


# No code parses the text of an exception.

ROOT = Path(oz.__file__).parent
# The only file that may parse text, because errors of other libraries carry no data.
READS_FOREIGN_TEXT = "train/foreign_errors.py"

_TEXTS = {"args", "message", "msg", "strerror", "error_message", "sentence", "advice", "expected"}
_NAMES = {"error", "err", "exc", "exception", "cause"}  # parameters with these names are exceptions
_CAUSES = {"__cause__", "__context__"}
_TAKES_TEXT = {"print", "say", "line", "leave"}  # like the constructors of exceptions


def _called(node: ast.Call) -> str:
    """Returns the name of the called function: ``partition`` for ``text.partition(":")``."""
    function = node.func
    return getattr(function, "id", None) or getattr(function, "attr", "")


def _looks_like_an_exception(name: str) -> bool:
    own = ("TooManyRefusals", "Lost", "Stopped", "Damaged")
    return name.endswith(("Error", "Exception")) or name in own


class _Reader(ast.NodeVisitor):
    """Finds the lines of a function that inspect the text of an exception.

    Follows the names that are bound to an exception (``except ... as error``, parameters, causes)
    or to its text. Code may format an exception into another exception or into output for the
    user, and may read its data attributes. Everything else is reported.
    """

    def __init__(self, tree: ast.AST) -> None:
        self.found: set[int] = set()  # line numbers
        self._exceptions: set[str] = set()
        self._texts: set[str] = set()
        size = -1
        while size < (
            size := len(self._exceptions) + len(self._texts)
        ):  # repeated until no name is added
            for node in ast.walk(tree):
                self._bind(node)
        self.visit(tree)

    def _bind(self, node: ast.AST) -> None:
        if isinstance(node, ast.ExceptHandler) and node.name:
            self._exceptions.add(node.name)
        elif isinstance(node, ast.arg):
            names = [n for n in ast.walk(node.annotation or node) if n is not node]
            types = {getattr(n, "id", getattr(n, "attr", "")) for n in names}
            if node.arg in _NAMES or any(map(_looks_like_an_exception, types)):
                self._exceptions.add(node.arg)
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr | ast.AugAssign):
            if node.value is None:
                return
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = {target.id for target in targets if isinstance(target, ast.Name)}
            if self._is_exception(node.value):
                self._exceptions |= names
            elif self._is_text(node.value):
                self._texts |= names

    def _is_exception(self, node: ast.AST | None) -> bool:
        match node:
            case ast.Name(id=name):
                return name in self._exceptions
            case ast.Attribute(value=value, attr=attribute):
                return attribute in _CAUSES and self._is_exception(value)
            case ast.BoolOp(values=values):
                return any(map(self._is_exception, values))
            case ast.IfExp(body=body, orelse=other):
                return self._is_exception(body) or self._is_exception(other)
        return False

    def _is_text(self, node: ast.AST | None) -> bool:
        def shows(part: ast.AST | None) -> bool:
            return self._is_exception(part) or self._is_text(part)

        match node:
            case ast.Name(id=name):
                return name in self._texts
            case ast.Attribute(value=value, attr=attribute):
                return attribute in _TEXTS and self._is_exception(value)
            case ast.JoinedStr(values=values) | ast.BoolOp(values=values):
                return any(map(shows, values))
            case ast.FormattedValue(value=value) | ast.Subscript(value=value):
                return shows(value)
            case ast.NamedExpr(value=value):
                return self._is_text(value)
            case ast.IfExp(body=body, orelse=other):
                return self._is_text(body) or self._is_text(other)
            case ast.BinOp(left=left, right=right):
                return shows(left) or shows(right)
            case ast.Tuple(elts=items):
                return any(map(shows, items))
            case ast.Call(func=ast.Attribute(value=ast.Name(id="foreign_errors"), attr=name)):
                return not name.startswith("is_")
            case ast.Call(func=ast.Attribute(value=value, attr=name), args=arguments):
                if self._is_text(value) or name == "__str__":
                    return True
                made = name in ("format", "join") or name.startswith("format_exc")
                return made and any(map(shows, arguments))
            case ast.Call(func=ast.Name(id=name), args=arguments):
                return name in ("str", "repr", "ascii", "format") and any(map(shows, arguments))
        return False

    def _report(self, node: ast.AST, *parts: ast.AST | None) -> None:
        if any(map(self._is_text, parts)):
            self.found.add(node.lineno)  # type: ignore[attr-defined]

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """Reports ``text.partition`` and any use of ``error.args``."""
        self._report(node, node.value)
        if node.attr in ("args", "__str__") and self._is_exception(node.value):
            self.found.add(node.lineno)
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        """Reports ``text[:100]``."""
        self._report(node, node.value)
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        """Reports ``"word" in text`` and ``text == "..."``."""
        self._report(node, node.left, *node.comparators)
        equal = any(isinstance(op, ast.Eq | ast.NotEq | ast.In | ast.NotIn) for op in node.ops)
        if equal and any(map(self._is_exception, [node.left, *node.comparators])):
            self.found.add(node.lineno)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        """Reports ``str(error)``, and passing a text to a function that may inspect it."""
        name = _called(node)
        foreign = getattr(getattr(node.func, "value", None), "id", "") == "foreign_errors"
        if not (foreign or name in _TAKES_TEXT or _looks_like_an_exception(name)):
            self._report(node, node, *node.args, *(keyword.value for keyword in node.keywords))
        self.generic_visit(node)

    def visit_For(self, node: ast.For) -> None:
        """Reports ``for word in text``."""
        self._report(node, node.iter)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        """Reports ``[word for word in text]``."""
        self._report(node.iter, node.iter)
        self.generic_visit(node)

    def visit_Match(self, node: ast.Match) -> None:
        """Reports ``match text:``."""
        self._report(node, node.subject)
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        """Reports ``first, *rest = text``."""
        if any(isinstance(target, ast.Tuple | ast.List) for target in node.targets):
            self._report(node, node.value)
        self.generic_visit(node)


def _inspects_text(source: str) -> set[int]:
    """Returns the lines of a module that inspect the text of an exception."""
    found = set()
    module = ast.parse(source)
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    parts: list[ast.AST] = [node for node in ast.walk(module) if isinstance(node, functions)]
    rest = [node for node in module.body if not isinstance(node, (*functions, ast.ClassDef))]
    for part in [*parts, ast.Module(rest, [])]:
        found |= _Reader(part).found
    return found


FILES = {path.relative_to(ROOT).as_posix(): path for path in sorted(ROOT.rglob("*.py"))}


@pytest.mark.parametrize("name", [name for name in FILES if name != READS_FOREIGN_TEXT])
def test_no_file_inspects_the_text_of_an_exception(name: str) -> None:
    lines = FILES[name].read_text("utf-8").splitlines()
    found = [f"{name}:{at}: {lines[at - 1]}" for at in _inspects_text("\n".join(lines))]
    assert not found, "\n".join(found)


def test_the_exempt_file_inspects_the_text_of_foreign_errors() -> None:
    assert _inspects_text(FILES[READS_FOREIGN_TEXT].read_text("utf-8"))


HANDLER = "def f():\n    try:\n        g()\n    except ValueError as error:\n        "
INSPECTIONS = [
    HANDLER + 'h("x" in str(error))',
    HANDLER + 'sentence = str(error).partition(":")[0]',
    HANDLER + "where = source(str(error))",
    HANDLER + "text = f'{error}'\n        return text.startswith('a')",
    HANDLER + "text = f'{error}'\n        return text[:9]",
    HANDLER + "text = '%s' % error\n        return 'a' in text",
    HANDLER + "text = '{}'.format(error)\n        return text == 'a'",
    HANDLER + "name, *rest = error.args",
    HANDLER + "error.args = ('a',)",
    HANDLER + "return error.args[0]",
    HANDLER + "return re.search('a', f'{error}')",
    HANDLER + "return PATTERN.search(repr(error))",
    HANDLER + "return [word for word in f'{error}']",
    HANDLER + "for word in f'{error}':\n            h(word)",
    HANDLER + "match f'{error}':\n            case 'a':\n                pass",
    HANDLER + "return error.__str__()",
    HANDLER + "return error.strerror == 'No space left on device'",
    HANDLER + "return error.sentence.split()",
    HANDLER + "return 'a' in traceback.format_exception(error)",
    HANDLER + "cause = error.__cause__\n        return 'a' in f'{cause}'",
    HANDLER + "return 'a' in foreign_errors.first_line(error)",
    HANDLER + "if (text := f'{error}') != 'a':\n            pass",
    "def f(problem: ValueError):\n    return str(problem).split()",
    "def f(problem: BaseException | None):\n    while problem is not None:\n"
    "        problem = problem.__cause__ or problem.__context__\n        h('a' in str(problem))",
    "def f(error):\n    return lambda: str(error)[0]",
    "try:\n    g()\nexcept OSError as error:\n    h(str(error).strip())",
]
USES = [
    HANDLER + "raise UserError(f'cannot: {error}') from error",
    HANDLER + "raise UserError(f'cannot: {error.strerror or error}') from error",
    HANDLER + "print(f'cannot: {error}')",
    HANDLER + "return error.errno == 28",
    HANDLER + "return error.argument in ('b1', 'b2')",
    HANDLER + "return isinstance(error, TypeError) and error.error_code == 8",
    HANDLER + "raise error.renamed('lr').with_traceback(error.__traceback__) from error.__cause__",
    HANDLER + "reason = foreign_errors.first_line(error)\n        raise UserError(f'{reason}')",
    HANDLER + "return foreign_errors.is_lost_process(error)",
    "def f(args, text):\n    return args[0] + text.partition(':')[0]",
]


@pytest.mark.parametrize("source", INSPECTIONS)
def test_an_inspection_is_found(source: str) -> None:
    assert _inspects_text(source)


@pytest.mark.parametrize("source", USES)
def test_showing_an_error_or_using_its_data_is_allowed(source: str) -> None:
    assert not _inspects_text(source)


def test_the_errors_are_public() -> None:
    assert oz.errors is errors
    with pytest.raises(oz.errors.ArgumentError):
        jax.eval_shape(lambda: oz.lamb(-1.0).init({"a": jnp.ones(2)}))

"""The small wrong changes that a source allows, read off its syntax tree."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

SWAPPED: dict[type[ast.cmpop], str] = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.In: "not in", ast.NotIn: "in", ast.Is: "is not", ast.IsNot: "is",
}  # fmt: skip
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult,
}  # fmt: skip
# What takes an axis as its last positional argument, or as `dim`.
OVER_AXES = {
    "amax", "amin", "argmax", "argmin", "argsort", "cat", "cumsum", "flip", "gather", "log_softmax",
    "logsumexp", "max", "mean", "median", "min", "norm", "prod", "softmax", "sort", "squeeze", "stack", "std",
    "sum", "unsqueeze", "var",
}  # fmt: skip
OTHER = {
    "mean": "sum", "sum": "mean", "min": "max", "max": "min", "amin": "amax", "amax": "amin", "any": "all",
    "all": "any", "argmax": "argmin", "argmin": "argmax", "ceil": "floor", "floor": "ceil",
}  # fmt: skip


@dataclass(frozen=True)
class Change:
    """One change: what stands from `start` to `stop` in the source, in characters, becomes `new`.

    `lines` are those of its statement, first and last, which a test must run to notice it.
    """

    kind: str
    start: int
    stop: int
    old: str
    new: str
    lines: tuple[int, int]

    def applied(self, source: str) -> str:
        """The changed source. Raises: ValueError if it is another source."""
        if source[self.start : self.stop] != self.old:
            raise ValueError(f"Line {self.lines[0]} is not what it was: {self.old!r} is not there.")
        return source[: self.start] + self.new + source[self.stop :]


@cache
def changes_of(source: str) -> list[Change]:
    """Every change that a source allows, in the order of its text."""
    tree = ast.parse(source)
    text = _Text(source)
    found: list[Change] = []
    for statement in _statements(tree):
        lines = (statement.lineno, _last_line(statement))
        for kind, node, new in [*_dropped(statement), *_within(statement)]:
            start, stop = text.span(node)
            old = source[start:stop]
            if old != new:
                found.append(Change(kind, start, stop, old, new, lines))
    return sorted(set(found), key=lambda c: (c.start, c.stop, c.kind, c.new))


def _statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """The statements that do something; `if TYPE_CHECKING` and `__all__` do nothing."""
    waiting: list[ast.stmt] = list(tree.body)
    while waiting:
        node = waiting.pop(0)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Assert | ast.Pass | ast.Global | ast.Nonlocal):
            continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            continue
        yield node
        for field in ("body", "orelse", "finalbody"):
            waiting += getattr(node, field, [])
        for handler in getattr(node, "handlers", []):
            waiting += handler.body
        for case in getattr(node, "cases", []):
            waiting += case.body


def _last_line(statement: ast.stmt) -> int:
    """Of a compound statement its head's last line."""
    body = getattr(statement, "body", None)
    if isinstance(body, list):
        return max(statement.lineno, body[0].lineno - 1)
    return statement.end_lineno or statement.lineno


def _dropped(statement: ast.stmt) -> Iterator[tuple[str, ast.AST, str]]:
    """A statement left out: a raise, a call for its effect, a change of what was there."""
    if isinstance(statement, ast.Raise) and statement.exc is not None:
        yield "a raise left out", statement, "pass"
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        yield "a call left out", statement, "pass"
    if isinstance(statement, ast.AugAssign):
        yield "an update left out", statement, "pass"
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target = ast.unparse(statement.targets[0])
        names = {ast.unparse(n) for n in ast.walk(statement.value) if isinstance(n, ast.Name | ast.Attribute)}
        if target in names:
            yield "an update left out", statement, "pass"
        if isinstance(statement.targets[0], ast.Subscript):
            yield "an update left out", statement, "pass"


def _within(statement: ast.stmt) -> Iterator[tuple[str, ast.AST, str]]:
    """A change inside the statement's own expressions; an error's message is not one."""
    if isinstance(statement, ast.Raise):
        return
    if isinstance(statement, ast.AugAssign) and type(statement.op) in OPERATORS:
        other = OPERATORS[type(statement.op)]()
        yield (
            "another operator",
            statement,
            ast.unparse(ast.AugAssign(statement.target, other, statement.value)),
        )
    if isinstance(statement, ast.If):
        yield "a negated condition", statement.test, f"not ({ast.unparse(statement.test)})"
    for expression in _expressions(statement):
        for node in _parts(expression):
            yield from _changed(node)


def _expressions(statement: ast.stmt) -> Iterator[ast.expr]:
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
        yield from (d for d in (*statement.args.defaults, *statement.args.kw_defaults) if d is not None)
        return
    if isinstance(statement, ast.ClassDef):
        return
    for field, value in ast.iter_fields(statement):
        if field in ("annotation", "body", "orelse", "finalbody", "handlers", "cases", "type_comment"):
            continue
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, ast.expr):
                yield item
            elif isinstance(item, ast.withitem):
                yield item.context_expr


def _parts(node: ast.AST) -> Iterator[ast.AST]:
    """A node and what is inside it, without what a user is told: f-strings."""
    yield node
    for field, value in ast.iter_fields(node):
        if field == "annotation":
            continue
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, ast.AST) and not isinstance(item, ast.JoinedStr):
                yield from _parts(item)


def _changed(node: ast.AST) -> Iterator[tuple[str, ast.AST, str]]:
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        left, right = ast.unparse(node.left), ast.unparse(node.comparators[0])
        yield "a swapped comparison", node, f"{_safe(left, node.left)} {SWAPPED[type(node.ops[0])]} {right}"
    elif isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            parts = [ast.unparse(node.left)]
            for j, (each, right) in enumerate(zip(node.ops, node.comparators, strict=True)):
                sign = SWAPPED[type(op)] if i == j else _SIGNS[type(each)]
                parts += [sign, ast.unparse(right)]
            yield "a swapped comparison", node, " ".join(parts)
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS and not _is_text(node):
        other = ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right)
        yield "another operator", node, f"({ast.unparse(other)})"
    elif isinstance(node, ast.BoolOp):
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield "or for and", node, f"({ast.unparse(ast.BoolOp(other, node.values))})"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "a negated condition", node, f"({ast.unparse(node.operand)})"
    elif isinstance(node, ast.IfExp):
        yield "a negated condition", node.test, f"(not ({ast.unparse(node.test)}))"
    elif isinstance(node, ast.Constant):
        yield from _constants(node)
    elif isinstance(node, ast.Call):
        yield from _called(node)


def _constants(node: ast.Constant) -> Iterator[tuple[str, ast.AST, str]]:
    value = node.value
    if isinstance(value, bool):
        yield "a constant", node, str(not value)
    elif isinstance(value, int):
        yield "a constant", node, str(value + 1)
        yield "a constant", node, f"({value - 1})"
    elif isinstance(value, float):
        yield "a constant", node, repr(value + 1.0)


def _called(node: ast.Call) -> Iterator[tuple[str, ast.AST, str]]:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if name in OTHER:
        new = ast.unparse(node.func)
        yield "another reduction", node.func, new[: len(new) - len(name)] + OTHER[name]
    if name not in OVER_AXES or not isinstance(node.func, ast.Attribute):
        return
    axes = [k.value for k in node.keywords if k.arg in ("dim", "axis")] or node.args[-1:]
    for axis in axes:
        number = _number(axis)
        if number is not None:
            yield "another axis", axis, "0" if number else "1"


def _number(node: ast.expr) -> int | None:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = _number(node.operand)
        return None if inner is None else -inner
    is_number = isinstance(node, ast.Constant) and type(node.value) is int
    return node.value if is_number else None  # type: ignore[attr-defined,return-value]


def _is_text(node: ast.BinOp) -> bool:
    """Whether an operand is a string: another operator is an error at once."""
    texts = (ast.Constant, ast.JoinedStr)
    return any(
        isinstance(side, texts) and isinstance(getattr(side, "value", ""), str)
        for side in (node.left, node.right)
    )


def _safe(text: str, node: ast.expr) -> str:
    return f"({text})" if isinstance(node, ast.Compare | ast.BoolOp | ast.IfExp | ast.Lambda) else text


_SIGNS: dict[type[ast.cmpop], str] = {
    ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=",
    ast.In: "in", ast.NotIn: "not in", ast.Is: "is", ast.IsNot: "is not",
}  # fmt: skip


class _Text:
    """Where nodes stand in a source, in characters; a syntax tree counts in bytes."""

    def __init__(self, source: str) -> None:
        self.lines = source.splitlines(keepends=True)
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line))

    def span(self, node: ast.AST) -> tuple[int, int]:
        place: Callable[[int, int], int] = self._at
        return (
            place(node.lineno, node.col_offset),  # type: ignore[attr-defined]
            place(node.end_lineno, node.end_col_offset),  # type: ignore[attr-defined]
        )

    def _at(self, line: int, column: int) -> int:
        before = self.lines[line - 1].encode()[:column].decode()
        return self.starts[line - 1] + len(before)

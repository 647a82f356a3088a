"""Claims of an experiment as expressions over its measures.

`slstm.accuracy >= 0.95 and llama.x1024.ppl / llama.x128.ppl > 1.5`: names are models, what follows the dot is a measure
(mean over the seeds at the best learning rate). Numbers, + - * /, comparisons, and, or, not, min(), max() and abs()
are understood, nothing else. What never came (infinity) is larger than all that did, but two of that kind do not compare:
whatever a claim says of them does not hold.
"""

import ast
import dataclasses
import math
import operator


def _divide(a, b):
    return a / b if b else math.copysign(math.inf, a) if a else math.nan


def _unless_both_infinite(compare):
    return lambda a, b: not (math.isinf(a) and math.isinf(b)) and compare(a, b)


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: _divide,
             ast.USub: operator.neg, ast.Not: operator.not_}
COMPARISONS = {kind: _unless_both_infinite(compare) for kind, compare in {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Eq: operator.eq,
    ast.NotEq: operator.ne}.items()}
FUNCTIONS = {"min": min, "max": max, "abs": abs}


class ClaimError(Exception):
    """The expression itself is wrong."""


class Missing(Exception):
    """A measure that the expression needs is not there."""


@dataclasses.dataclass
class Verdict:
    claim: dict
    holds: bool | None  # None: could not be judged
    values: dict        # "model.measure" -> number, of all that the expression names
    missing: list       # of those, what was not there

    @property
    def asserted(self):
        return bool(self.claim.get("asserted"))


def _path(node):
    """["llama", "x128", "ppl"] of llama.x128.ppl; None of anything else."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [node.id, *reversed(parts)] if isinstance(node, ast.Name) and parts else None


def _parse(expression):
    try:
        return ast.parse(expression, mode="eval").body
    except (SyntaxError, TypeError) as error:
        raise ClaimError(f"{expression}: {getattr(error, 'msg', 'is no expression')}") from error


def names(expression):
    """(model, measure) pairs that the expression names, in order."""
    found = []

    def visit(node):
        path = _path(node)
        if path is None:
            for child in ast.iter_child_nodes(node):
                visit(child)
        elif (pair := (path[0], ".".join(path[1:]))) not in found:
            found.append(pair)

    visit(_parse(expression))
    return found


def evaluate(expression, lookup):
    """Value of the expression; lookup(model, measure) gives a number or raises Missing."""
    def value(node):
        path = _path(node)
        if path is not None:
            return lookup(path[0], ".".join(path[1:]))
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
            return node.value
        if isinstance(node, ast.BoolOp):
            parts = [value(part) for part in node.values]
            return all(parts) if isinstance(node.op, ast.And) else any(parts)
        if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.operand))
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.Compare) and all(type(op) in COMPARISONS for op in node.ops):
            parts = [value(part) for part in (node.left, *node.comparators)]
            return all(COMPARISONS[type(op)](a, b) for op, a, b in zip(node.ops, parts, parts[1:]))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS and not node.keywords:
            return called(node)
        raise ClaimError(f"{expression}: {ast.unparse(node)} is not understood; see claims.py")

    def called(node):
        arguments = [value(part) for part in node.args]
        if len(arguments) != 1 if node.func.id == "abs" else len(arguments) < 2:
            raise ClaimError(f"{expression}: {ast.unparse(node)} has {len(arguments)} arguments")
        return FUNCTIONS[node.func.id](*arguments)

    return value(_parse(expression))


def judge(claim, lookup):
    values, missing = {}, []
    for model, measure in names(claim["expect"]):
        try:
            values[f"{model}.{measure}"] = lookup(model, measure)
        except Missing:
            missing.append(f"{model}.{measure}")
    holds = None if missing else bool(evaluate(claim["expect"], lookup))
    return Verdict(claim, holds, values, missing)

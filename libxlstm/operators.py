"""What help() and inspect.signature() say of the operators, torch.ops.xlstm.*: the texts of their C++ headers."""

import inspect
import json

import torch


def _signature(schema):
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = [
        inspect.Parameter(
            argument.name,
            kinds[argument.kwarg_only],
            default=argument.default_value if argument.has_default_value() else inspect.Parameter.empty,
        )
        for argument in schema.arguments
    ]
    return inspect.Signature(parameters)


def _text(schema, signature, described):
    results = ", ".join(result.name or "Tensor" for result in schema.returns)
    lines = [f"{schema.name.split('::')[1]}{signature}" + (f" -> {results}" if results else ""), "", described["text"]]
    for struct in described["structs"]:
        fields = {name: text for name, text in struct["fields"].items() if name in signature.parameters and text}
        if fields:
            lines += [""] + ([struct["text"]] if struct["text"] else [])
            lines += [f"    {name}: {text}" for name, text in fields.items()]
    return "\n".join(lines)


def describe(path):
    """Gives every operator that the file of the build describes its __doc__ and __signature__."""
    for name, described in json.loads(path.read_text()).items():
        operator = getattr(torch.ops.xlstm, name, None)
        if operator is None:  # a function for C++ alone
            continue
        schema = operator.default._schema
        operator.__signature__ = _signature(schema)
        operator.__doc__ = _text(schema, operator.__signature__, described)

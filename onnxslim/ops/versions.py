"""What the schemas of the standard domain say of operators in one opset and another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import onnx.defs
from onnx import AttributeProto, TensorProto, helper
from onnx.defs import OpSchema

from onnxslim.ir import proto
from onnxslim.ir.graph import Attribute, Graph, Node

# The oldest opset that models are brought to: before, nodes broadcast, count axes and read limits in other
# ways, of which schemas do not tell.
OLDEST = 11


@lru_cache(4096)
def schema_of(op: str, opset: int) -> OpSchema | None:
    """An operator of the standard domain in an opset; None where it is not there, or no longer."""
    try:
        found = onnx.defs.get_schema(op, opset)
    except onnx.defs.SchemaError:
        return None
    return None if found.deprecated else found


def since(op: str, opset: int) -> int:
    """The opset in which an operator became what it is in this one; 0 where it is not there."""
    found = schema_of(op, opset)
    return 0 if found is None else int(found.since_version)


def is_function(op: str, opset: int) -> bool:
    """Whether the standard says what an operator is by others."""
    schema = schema_of(op, opset)
    names = ("has_function", "has_context_dependent_function")
    return schema is not None and any(getattr(schema, name) for name in names)


@lru_cache(1024)
def is_alike(op: str, one: int, other: int) -> bool:
    """Whether an operator has the same inputs, outputs, attributes and defaults in two opsets.

    Then they differ in nothing but the types that it takes.
    """
    first, second = schema_of(op, one), schema_of(op, other)
    if first is None or second is None:
        return False
    return first.since_version == second.since_version or _signature(first) == _signature(second)


def _signature(schema: OpSchema) -> tuple[Any, ...]:
    slots = [
        [(each.option, each.is_homogeneous) for each in formal] for formal in (schema.inputs, schema.outputs)
    ]
    attributes = {
        name: (each.type, each.required, each.default_value.SerializeToString())
        for name, each in schema.attributes.items()
    }
    return slots, attributes, schema.min_input, schema.min_output


def superfluous(node: Node, one: int, other: int) -> list[str] | str:
    """Names of attributes to leave out of a node that is to be read in another opset; or why it cannot.

    Whether it means the same there, schemas do not tell.
    """
    here, there = schema_of(node.op, one), schema_of(node.op, other)
    if here is None or there is None:
        return f"there is no {node.op} in opset {other}"
    for word, tensors, most in (
        ("input", node.inputs, there.max_input),
        ("output", node.outputs, there.max_output),
    ):
        used = max((at for at, each in enumerate(tensors) if each.name), default=-1)
        if used >= most:
            return f"{node.op} has no {word} {used} in opset {other}"
    odd = [name for name in node.attrs if name not in there.attributes]
    for name in odd:
        if name not in here.attributes or not _is_default(
            node.attrs[name], here.attributes[name].default_value
        ):
            return f"{node.op} has no attribute '{name}' in opset {other}"
    for name, each in there.attributes.items():
        if name in node.attrs:
            continue
        before = here.attributes.get(name)
        if each.required or (before is not None and before.default_value != each.default_value):
            return f"{node.op} has another '{name}' by default in opset {other}"
    return odd


def idle(node: Node, one: int, other: int) -> list[str]:
    """Names of attributes of a node that another opset does not have, and that say what is so by default."""
    here, there = schema_of(node.op, one), schema_of(node.op, other)
    if here is None or there is None:
        return []
    return [
        name
        for name, value in node.attrs.items()
        if name not in there.attributes
        and name in here.attributes
        and _is_default(value, here.attributes[name].default_value)
    ]


def _is_default(value: Attribute, default: AttributeProto) -> bool:
    if default.type == AttributeProto.UNDEFINED or isinstance(value, Graph | AttributeProto):
        return False
    known = helper.get_attribute_value(default)
    known = known.decode() if isinstance(known, bytes) else known
    return bool(value == (tuple(known) if isinstance(known, list) else known))


def defaults(op: str, opset: int, stated: Iterable[AttributeProto]) -> list[AttributeProto]:
    """Attributes that an operator has by default, but for those that are stated."""
    schema = schema_of(op, opset)
    names = {item.name for item in stated}
    known = schema.attributes.values() if schema is not None else ()
    return [
        each.default_value
        for each in known
        if each.name not in names and each.default_value.type != AttributeProto.UNDEFINED
    ]


def untaken(node: Node, opset: int, types: Mapping[str, np.dtype[Any]]) -> str:
    """Which tensor of a node has a type that its operator does not take in an opset; empty if none has.

    Args:
        node: of an operator that the opset has.
        opset: the opset.
        types: of tensors, by name; others are taken to be right.
    """
    schema = schema_of(node.op, opset)
    if schema is None:
        return ""
    allowed = {each.type_param_str: set(each.allowed_type_strs) for each in schema.type_constraints}
    for tensors, formals in ((node.inputs, schema.inputs), (node.outputs, schema.outputs)):
        for name, wanted in _formal([each.name for each in tensors], formals):
            if name in types:
                kind = TensorProto.DataType.Name(proto.elem_type_of(types[name])).lower()
                if f"tensor({kind})" not in allowed.get(wanted, {wanted}):
                    return f"'{name}' is {kind}, which {node.op} does not take before"
    return ""


def _formal(names: Sequence[str], formals: Sequence[Any]) -> Iterator[tuple[str, str]]:
    for index, name in enumerate(names):
        if name and formals:
            yield name, formals[min(index, len(formals) - 1)].type_str

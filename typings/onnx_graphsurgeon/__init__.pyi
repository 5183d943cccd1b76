# What onnxslim uses of onnx-graphsurgeon, which ships no type information.
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import numpy as np

T = TypeVar("T")

class SynchronizedList(list[T], Generic[T]): ...

class Tensor:
    name: str
    inputs: Any
    outputs: Any
    def is_empty(self) -> bool: ...

class Variable(Tensor):
    dtype: Any
    shape: Any
    type: str
    def __init__(self, name: str, dtype: Any = ..., shape: Any = ..., type: str = ...) -> None: ...

class Constant(Tensor):
    _values: Any
    def __init__(
        self, name: str, values: np.ndarray[Any, Any], data_location: Any = ..., export_dtype: Any = ...
    ) -> None: ...

class Node:
    op: str
    name: str
    attrs: Any
    inputs: Any
    outputs: Any
    domain: str | None
    def __init__(
        self,
        op: str,
        name: str | None = ...,
        attrs: Any = ...,
        inputs: Sequence[Tensor] | None = ...,
        outputs: Sequence[Tensor] | None = ...,
        domain: str | None = ...,
    ) -> None: ...

class Graph:
    nodes: Any
    inputs: Any
    outputs: Any
    name: str
    doc_string: str
    opset: int
    import_domains: Any
    def __init__(
        self,
        nodes: Sequence[Node] | None = ...,
        inputs: Sequence[Tensor] | None = ...,
        outputs: Sequence[Tensor] | None = ...,
        name: str | None = ...,
        doc_string: str | None = ...,
        opset: int | None = ...,
        import_domains: Any = ...,
    ) -> None: ...

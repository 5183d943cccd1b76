"""Shape inference engines on the ONNX node suite: how many output shapes are right, wrong or left open.

    pip install -e . onnx-shape-inference==0.4.0 sympy
    python benchmarks/inference.py

Every case with tensors only is given to each engine as it is, but for the declared shapes of its outputs, and
once more with a symbol in the place of every input size above 1, each another one. What is inferred is
compared with the outputs the suite expects. Right: the rank and every size; symbols that are sizes of inputs
are filled in. Open: the rank or a size is not said. Wrong: a size or the rank is another one. Failed: the
engine raises. CPU seconds are those of all cases.
"""

from __future__ import annotations

import contextlib
import io
import logging
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto

Shape = list[Any] | None


def ours(model: ModelProto) -> list[Shape]:
    """What `onnxslim.shapes.deduce` finds of the outputs."""
    from onnxslim import shapes
    from onnxslim.ir.model import load

    loaded = load(model)
    facts = shapes.deduce(loaded)
    found = (facts.get(id(tensor)) for tensor in loaded.graph.outputs)
    return [None if fact is None or fact.shape is None else list(fact.shape) for fact in found]


def plain(model: ModelProto) -> list[Shape]:
    """onnx's own inference, with values propagated."""
    return _declared(onnx.shape_inference.infer_shapes(model, data_prop=True))


def runtime(model: ModelProto) -> list[Shape]:
    """The symbolic inference that comes with ONNX Runtime's tools."""
    from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

    with contextlib.redirect_stdout(io.StringIO()):
        return _declared(SymbolicShapeInference.infer_shapes(model, auto_merge=True, guess_output_rank=False))


def separate(model: ModelProto) -> list[Shape]:
    """The package onnx-shape-inference."""
    import onnx_ir
    from onnx_shape_inference import infer_symbolic_shapes

    inferred = infer_symbolic_shapes(onnx_ir.from_proto(model), warn_on_missing=False)
    return _declared(onnx_ir.to_proto(inferred))


def _declared(model: ModelProto) -> list[Shape]:
    return [_shape(info) for info in model.graph.output]


def _shape(info: onnx.ValueInfoProto) -> Shape:
    if not info.type.tensor_type.HasField("shape"):
        return None
    return [
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None
        for dim in info.type.tensor_type.shape.dim
    ]


ENGINES: dict[str, Callable[[ModelProto], list[Shape]]] = {
    "onnx 1.23.2": plain,
    "ours": ours,
    "ONNX Runtime 1.31.1": runtime,
    "onnx-shape-inference 0.4.0": separate,
}


def cases(symbolic: bool) -> Iterator[tuple[ModelProto, list[tuple[int, ...]], dict[str, int]]]:
    """Models without shapes of outputs, the shapes they have, and the sizes that symbols stand for."""
    from onnx.backend.test.case.node import collect_testcases

    suite: list[Any] = list(collect_testcases(""))
    for case in suite:
        inputs, outputs = case.data_sets[0]
        if not all(isinstance(array, np.ndarray) for array in (*inputs, *outputs)):
            continue
        model, sizes = ModelProto(), dict[str, int]()
        model.CopyFrom(case.model)
        del model.graph.value_info[:]
        for info in model.graph.output:
            info.type.tensor_type.ClearField("shape")
        for info in model.graph.input if symbolic else ():
            for axis, dim in enumerate(info.type.tensor_type.shape.dim):
                if dim.dim_value > 1:
                    sizes[f"s_{info.name}_{axis}"] = dim.dim_value
                    dim.dim_param = f"s_{info.name}_{axis}"
        yield model, [array.shape for array in outputs], sizes


def judge(found: Shape, actual: tuple[int, ...], sizes: dict[str, int]) -> str:
    """How an inferred shape compares with the actual one."""
    if found is None:
        return "open"
    if len(found) != len(actual):
        return "wrong"
    known = [sizes.get(dim) if isinstance(dim, str) else dim for dim in found]
    if any(dim is not None and dim != size for dim, size in zip(known, actual, strict=True)):
        return "wrong"
    return "open" if None in known else "right"


def main() -> None:
    """Print a table."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    print("| engine | sizes | right | open | wrong | failed | CPU s |\n|---|---|---|---|---|---|---|")
    for symbolic in (False, True):
        suite = list(cases(symbolic))
        for name, engine in ENGINES.items():
            counts, start = Counter[str](), time.process_time()
            for model, actual, sizes in suite:
                try:
                    shapes = engine(model)
                except Exception:  # they raise whatever they like
                    counts["failed"] += 1
                    continue
                counts.update(judge(*pair, sizes) for pair in zip(shapes, actual, strict=True))
            figures = " | ".join(str(counts[key]) for key in ("right", "open", "wrong", "failed"))
            kind = "symbols" if symbolic else "numbers"
            print(f"| {name} | {kind} | {figures} | {time.process_time() - start:.1f} |", flush=True)


if __name__ == "__main__":
    main()

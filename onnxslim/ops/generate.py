"""Operators that make tensors of sizes, of numbers, or of what they find."""

from __future__ import annotations

from onnxslim.ops import formulas
from onnxslim.ops.channels import movement, sampling
from onnxslim.ops.spec import Channels, OpSpec, Trait, register


def _text(body: str, inputs: str = "", output: str = "float[n] y", opset: int = 17) -> str:
    return f'<ir_version: 8, opset_import: ["" : {opset}]>\ng ({inputs}) => ({output}) {{ {body} }}'


_ALL = "float[N,2,4,4] x"

register(
    OpSpec(
        "ConstantOfShape",
        traits=Trait.GROWS,
        channels=Channels(movement.constant_of_shape, movement.cut_constant_of_shape),
        example=_text(
            "s = Constant<value_ints=[2,4,4]>() z = ConstantOfShape(s) y = Add(x, z)",
            _ALL,
            "float[N,2,4,4] y",
        ),
    ),
    OpSpec(
        "Range",
        traits=Trait.GROWS | Trait.SENSITIVE,
        example=_text("y = Range(s, l, d)", "float s, float l, float d"),
    ),
    OpSpec(
        "OneHot",
        traits=Trait.GROWS,
        example=_text(
            "d = Constant<value_int=50>() y = OneHot(x, d, v)", "int64[3] x, float[2] v", "float[3,50] y"
        ),
    ),
    *(
        OpSpec(
            f"{name}Window",
            traits=Trait.GROWS,
            example=_text(f"n = Constant<value_int=64>() y = {name}Window(n)"),
        )
        for name in ("Blackman", "Hamming", "Hann")
    ),
    OpSpec(
        "CenterCropPad",
        traits=Trait.GROWS,
        channels=Channels(sampling.crop),
        example=_text(
            "s = Constant<value_ints=[9,9]>() y = CenterCropPad<axes=[2,3]>(x, s)",
            "float[1,2,4,4] x",
            "float[1,2,9,9] y",
            18,
        ),
    ),
    OpSpec(
        "AffineGrid",
        traits=Trait.GROWS,
        example=_text(
            "s = Constant<value_ints=[1,1,9,9]>() y = AffineGrid(x, s)",
            "float[1,2,3] x",
            "float[1,9,9,2] y",
            20,
        ),
    ),
    OpSpec(
        "MelWeightMatrix",
        traits=Trait.GROWS,
        example=_text(
            "b = Constant<value_int=8>() n = Constant<value_int=64>() r = Constant<value_int=8000>() "
            "l = Constant<value_float=0.0>() h = Constant<value_float=4000.0>() "
            "y = MelWeightMatrix(b, n, r, l, h)",
            output="float[33,8] y",
        ),
    ),
    OpSpec(
        "Shape",
        traits=Trait.MEASURES,
        channels=Channels(movement.shape_of),
        older=formulas.part_of_shape,
        example=_text("s = Shape<start=2>(x) z = ConstantOfShape(s) y = Add(x, z)", _ALL, "float[N,2,4,4] y"),
    ),
    OpSpec("Size", traits=Trait.MEASURES, example=_text("y = Size(x)", _ALL, "int64 y")),
    # Up to eight axes; one index of eight bytes for each.
    OpSpec("NonZero", at_most=64, example=_text("y = NonZero(x)", _ALL, "int64[4,n] y")),
    OpSpec(
        "Compress",
        at_most=16,
        example=_text("y = Compress(x, c)", "double[9] x, bool[9] c", "double[n] y"),
    ),
    # Up to a row of three integers for each score.
    OpSpec(
        "NonMaxSuppression",
        at_most=24,
        example=_text(
            "m = Constant<value_ints=[9]>() y = NonMaxSuppression(x, s, m)",
            "float[1,4,4] x, float[1,2,4] s",
            "int64[n,3] y",
        ),
    ),
    OpSpec(
        "Unique",
        at_most=16,
        example=_text("y = Unique(x)", "double[9] x", "double[n] y"),
    ),
)

"""Operators whose output elements are input elements, wherever they go."""

from __future__ import annotations

from collections.abc import Callable

from onnxslim.ir.graph import Node
from onnxslim.ops import formulas
from onnxslim.ops.body import WriteBody
from onnxslim.ops.channels import indexing, layers, movement, sampling
from onnxslim.ops.channels import scales as passed
from onnxslim.ops.channels.scale_labels import ScaleTrace
from onnxslim.ops.spec import Channels, OpSpec, Role, Trait, register


def _resize_unfit(node: Node) -> str | None:
    """Why results may lie outside the range of the input: cubic weights are negative in places."""
    if node.attrs.get("mode") == "cubic":
        return "it interpolates cubically"
    if node.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        return "it extrapolates"
    return None


def _move(
    op: str,
    body: str,
    *,
    output: str,
    inputs: str = "float[N,2,4,4] x",
    channels: Channels | None = None,
    scales: Callable[[ScaleTrace], None] | None = None,
    traits: Trait = Trait.MOVES,
    unfit: Callable[[Node], str | None] | None = None,
    older: WriteBody | None = None,
) -> OpSpec:
    """A row of an operator that moves its first input."""
    example = f'<ir_version: 8, opset_import: ["" : 18]>\ng ({inputs}) => ({output}) {{ {body} }}'
    return OpSpec(
        op,
        role=Role.MOVE,
        traits=traits | Trait.KEEPS_ZEROS,
        data=(0,),
        channels=channels,
        scales=scales,
        unfit=unfit,
        older=older,
        example=example,
    )


register(
    _move(
        "Reshape",
        "s = Constant<value_ints=[0,-1]>() y = Reshape(x, s)",
        output="float[N,32] y",
        scales=movement.regroup,
        channels=Channels(movement.reshape, movement.cut_reshape),
        older=formulas.reshaped,
    ),
    _move(
        "Flatten",
        "y = Flatten(x)",
        output="float[N,32] y",
        scales=movement.regroup,
        channels=Channels(movement.regroup),
    ),
    _move(
        "Transpose",
        "y = Transpose<perm=[0,2,3,1]>(x)",
        output="float[N,4,4,2] y",
        scales=movement.transpose,
        channels=Channels(movement.transpose),
    ),
    _move(
        "Squeeze",
        "a = Constant<value_ints=[1]>() y = Squeeze(x, a)",
        inputs="float[N,1,4] x",
        output="float[N,4] y",
        scales=movement.regroup,
        channels=Channels(movement.regroup),
        older=formulas.over_axes("Squeeze"),
    ),
    _move(
        "Unsqueeze",
        "a = Constant<value_ints=[1]>() y = Unsqueeze(x, a)",
        output="float[N,1,2,4,4] y",
        scales=movement.regroup,
        channels=Channels(movement.regroup),
        older=formulas.over_axes("Unsqueeze"),
    ),
    _move(
        "Expand",
        "s = Constant<value_ints=[1,3,4]>() y = Expand(x, s)",
        inputs="float[N,1,4] x",
        output="float[N,3,4] y",
        traits=Trait.MOVES | Trait.GROWS,
        channels=Channels(movement.expand, movement.cut_expand),
    ),
    _move(
        "Tile",
        "r = Constant<value_ints=[1,2,1,1]>() y = Tile(x, r)",
        output="float[N,4,4,4] y",
        traits=Trait.MOVES | Trait.GROWS,
        channels=Channels(movement.tile),
    ),
    _move(
        "Slice",
        "a = Constant<value_ints=[1]>() b = Constant<value_ints=[3]>() c = Constant<value_ints=[2]>() "
        "y = Slice(x, a, b, c)",
        output="float[N,2,2,4] y",
        scales=movement.slice_,
        channels=Channels(movement.slice_, movement.cut_slice),
    ),
    _move(
        "Gather",
        "i = Constant<value_ints=[1,0]>() y = Gather<axis=2>(x, i)",
        output="float[N,2,2,4] y",
        channels=Channels(movement.gather, movement.cut_gather),
    ),
    _move(
        "GatherElements",
        "y = GatherElements<axis=1>(x, i)",
        inputs="float[2,3] x, int64[2,1] i",
        output="float[2,1] y",
        channels=Channels(indexing.gather_elements),
    ),
    _move(
        "Split",
        "y, z = Split<axis=1, num_outputs=2>(x)",
        output="float[N,1,4,4] y, float[N,1,4,4] z",
        scales=movement.split,
        channels=Channels(movement.split, movement.cut_split),
        older=formulas.parts,
    ),
    _move(
        "MaxPool",
        "y = MaxPool<kernel_shape=[2,2]>(x)",
        output="float[N,2,3,3] y",
        traits=Trait.SEARCHES,
        scales=passed.pool,
        channels=Channels(layers.pool),
    ),
    _move(
        "ReduceMax",
        "a = Constant<value_ints=[2,3]>() y = ReduceMax(x, a)",
        older=formulas.over_axes("ReduceMax"),
        output="float[N,2,1,1] y",
        traits=Trait.SEARCHES,
        scales=movement.reduce,
        channels=Channels(movement.reduce),
    ),
    _move(
        "ReduceMin",
        "a = Constant<value_ints=[2,3]>() y = ReduceMin(x, a)",
        older=formulas.over_axes("ReduceMin"),
        output="float[N,2,1,1] y",
        traits=Trait.SEARCHES,
        scales=movement.reduce,
        channels=Channels(movement.reduce),
    ),
    _move(
        "DepthToSpace",
        "y = DepthToSpace<blocksize=2>(x)",
        inputs="float[N,4,3,3] x",
        output="float[N,1,6,6] y",
        channels=Channels(movement.depth_to_space),
    ),
    _move(
        "SpaceToDepth",
        "y = SpaceToDepth<blocksize=2>(x)",
        output="float[N,8,2,2] y",
        channels=Channels(movement.space_to_depth),
    ),
    _move(
        "Resize",
        "e = Constant<value_floats=[1.0,1.0,2.0,2.0]>() "
        'y = Resize<mode="nearest", coordinate_transformation_mode="asymmetric", '
        'nearest_mode="floor">(x, , e)',
        output="float[N,2,8,8] y",
        unfit=_resize_unfit,
        traits=Trait.GROWS,
        scales=passed.resize,
        channels=Channels(movement.resize, movement.cut_resize),
    ),
)


def _row(
    op: str,
    channels: Channels | None,
    body: str,
    output: str,
    inputs: str = "float[N,2,4,4] x",
    traits: Trait = Trait.NONE,
    scales: Callable[[ScaleTrace], None] | None = None,
) -> OpSpec:
    """A row of an operator that quantization leaves in floating point."""
    example = f'<ir_version: 8, opset_import: ["" : 17]>\ng ({inputs}) => ({output}) {{ {body} }}'
    return OpSpec(op, traits=traits, channels=channels, scales=scales, example=example)


register(
    _row(
        "Pad",
        Channels(movement.pad),
        "p = Constant<value_ints=[0,0,1,1,0,0,1,1]>() y = Pad(x, p)",
        "float[N,2,6,6] y",
        traits=Trait.GROWS,
        scales=passed.pad,
    ),
    OpSpec(
        "Upsample",
        traits=Trait.GROWS,
        channels=Channels(movement.upsample),
        example="""<ir_version: 4, opset_import: ["" : 9]>
g (float[N,2,4,4] x) => (float[N,2,8,8] y)
{ e = Constant<value = float[4] {1.0, 1.0, 2.0, 2.0}>() y = Upsample(x, e) }""",
    ),
    _row(
        "CumSum",
        Channels(movement.along),
        "a = Constant<value_int=3>() y = CumSum(x, a)",
        "float[N,2,4,4] y",
        traits=Trait.SENSITIVE,
    ),
    OpSpec(
        "CumProd",
        channels=Channels(movement.along),
        example="""<ir_version: 12, opset_import: ["" : 26]>
g (float[N,2,4,4] x) => (float[N,2,4,4] y) { a = Constant<value_int=3>() y = CumProd(x, a) }""",
    ),
    _row(
        "Trilu",
        Channels(sampling.triangle),
        "y = Trilu(x)",
        "float[N,2,4,4] y",
        traits=Trait.KEEPS_ZEROS,
        scales=sampling.triangle,
    ),
    _row(
        "GatherND",
        Channels(indexing.gather_nd),
        "i = Constant<value = int64[2,1] {3, 1}>() y = GatherND(x, i)",
        "float[2,2,3] y",
        "float[4,2,3] x",
        traits=Trait.MOVES | Trait.KEEPS_ZEROS,
        scales=indexing.gather_nd,
    ),
    _row(
        "ScatterND",
        Channels(indexing.scatter_nd),
        "y = ScatterND(x, i, u)",
        "float[4,2,3] y",
        "float[4,2,3] x, int64[2,1] i, float[2,2,3] u",
    ),
    _row(
        "ScatterElements",
        Channels(indexing.scatter_elements),
        "y = ScatterElements<axis=1>(x, i, u)",
        "float[4,2,3] y",
        "float[4,2,3] x, int64[4,1,3] i, float[4,1,3] u",
    ),
    OpSpec(
        "TensorScatter",
        channels=Channels(indexing.tensor_scatter),
        example="""<ir_version: 11, opset_import: ["" : 24]>
g (float[N,2,5,4] x, float[N,2,3,4] u) => (float[N,2,5,4] y) { y = TensorScatter(x, u) }""",
    ),
    _row(
        "GridSample",
        Channels(sampling.grid_sample),
        "y = GridSample(x, g)",
        "float[N,2,3,3] y",
        "float[N,2,4,4] x, float[N,3,3,2] g",
        traits=Trait.KEEPS_ZEROS,
        scales=passed.sample,
    ),
    _row(
        "RoiAlign",
        Channels(sampling.regions),
        "r = Constant<value = float[1,4] {0.0, 0.0, 3.0, 3.0}>() b = Constant<value_ints=[0]>() "
        "y = RoiAlign<output_height=9, output_width=9>(x, r, b)",
        "float[1,2,9,9] y",
        traits=Trait.GROWS,
        scales=sampling.regions,
    ),
    _row(
        "MaxRoiPool",
        Channels(sampling.regions),
        "r = Constant<value = float[1,5] {0.0, 0.0, 1.0, 3.0, 3.0}>() "
        "y = MaxRoiPool<pooled_shape=[9,9]>(x, r)",
        "float[1,2,9,9] y",
        traits=Trait.GROWS,
        scales=sampling.regions,
    ),
    # The index of each element counts elements of the whole tensor.
    _row(
        "MaxUnpool",
        None,
        "y = MaxUnpool<kernel_shape=[2,2], strides=[2,2]>(x, i)",
        "float[N,2,4,4] y",
        "float[N,2,2,2] x, int64[N,2,2,2] i",
        traits=Trait.GROWS | Trait.KEEPS_ZEROS,
    ),
    OpSpec(
        "Col2Im",
        traits=Trait.GROWS | Trait.KEEPS_ZEROS,
        channels=Channels(sampling.columns),
        scales=sampling.columns,
        example="""<ir_version: 8, opset_import: ["" : 18]>
g (float[N,12,4] x) => (float[N,3,6,6] y)
{ s = Constant<value_ints=[6,6]>() k = Constant<value_ints=[2,2]>() y = Col2Im<strides=[4,4]>(x, s, k) }""",
    ),
    _row(
        "TopK",
        Channels(movement.along),
        "k = Constant<value_ints=[2]>() y, i = TopK<axis=3>(x, k)",
        "float[N,2,4,2] y, int64[N,2,4,2] i",
    ),
    _row(
        "ReverseSequence",
        Channels(movement.along),
        "l = Constant<value_ints=[3,2]>() y = ReverseSequence<batch_axis=1, time_axis=0>(x, l)",
        "float[4,2,3] y",
        "float[4,2,3] x",
        traits=Trait.MOVES,
    ),
)

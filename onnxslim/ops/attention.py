"""Attention in one operator, and Einsum."""

from __future__ import annotations

import math

from onnxslim.ir.graph import Node
from onnxslim.ops.channels import attention
from onnxslim.ops.spec import Channels, OpSpec, Trait, register, sizes


def _einsum_macs(node: Node) -> int | None:
    """One product for every combination of the letters; of three or more operands, multiplied at once."""
    terms, _ = attention.parse(node.attrs["equation"])
    lengths: dict[str, int] = {}
    for term, tensor in zip(terms, node.inputs, strict=True):
        shape = sizes(tensor.shape)
        if shape is None or len(shape) != len(term):  # an ellipsis stands for any number of axes
            return None
        for letter, length in zip(term, shape, strict=True):
            lengths[letter] = max(lengths.get(letter, 1), length)
    return math.prod(lengths.values())


register(
    OpSpec(
        "Attention",
        traits=Trait.COUNTS_OUTPUTS,
        channels=Channels(attention.attention, attention.cut_attention),
        example="""<ir_version: 10, opset_import: ["" : 23]>
g (float[N,3,8] q, float[N,5,4] k, float[N,5,4] v) => (float[N,3,8] y)
{ y = Attention<q_num_heads=4, kv_num_heads=2>(q, k, v) }""",
    ),
    OpSpec(
        "RotaryEmbedding",
        channels=Channels(attention.rotary_embedding, attention.cut_rotary_embedding),
        example="""<ir_version: 10, opset_import: ["" : 23]>
g (float[N,3,8] x, float[N,3,1] c, float[N,3,1] s) => (float[N,3,8] y)
{ y = RotaryEmbedding<num_heads=4>(x, c, s) }""",
    ),
    OpSpec(
        "Einsum",
        macs=_einsum_macs,
        channels=Channels(attention.einsum),
        example="""<ir_version: 8, opset_import: ["" : 17]>
g (float[N,3,4] x, float[4,5] w) => (float[N,3,5] y)
{ y = Einsum<equation="bij,jk->bik">(x, w) }""",
    ),
)

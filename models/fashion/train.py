"""Train and export the four Fashion-MNIST networks that ship with the package.

Development only: needs PyTorch and the data set (Debian: ``apt-get install dataset-fashion-mnist``).

    python models/fashion/train.py [--net resnet] [--epochs 2]

Writes ``<net>.onnx``, ``calibration.npz`` and ``test.npz`` beside this file. Every graph maps ``image``
(float32 ``[batch, 1, 28, 28]``, raw pixels 0..255) to ``logits`` (float32 ``[batch, 10]``).
"""

# PyTorch's annotations are incomplete, and where it is not installed its classes are Any.
# mypy: warn-return-any=False, disallow-subclassing-any=False
# mypy: disallow-untyped-calls=False, disable-error-code=call-overload

from __future__ import annotations

import argparse
import gzip
import itertools
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch
import torch.nn.functional as F
from torch import Tensor, nn

HERE = Path(__file__).parent
DATA = Path("/usr/share/datasets/fashion-mnist")
SEED = 2017
BATCH = 128
CALIBRATION_IMAGES = 512
TEST_IMAGES = 2000

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


class Residual(nn.Module):
    """Basic block of He et al. 2016 (arXiv:1512.03385): two 3x3 convolutions around a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = (
            nn.Identity()
            if stride == 1 and inputs == outputs
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Residual CNN: a stem, five basic blocks at 28, 14 and 7 pixels, global average pool, linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.blocks = nn.Sequential(
            Residual(32, 32, 1),
            Residual(32, 48, 2),
            Residual(48, 48, 1),
            Residual(48, 88, 2),
            Residual(88, 88, 1),
        )
        self.head = nn.Linear(88, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.blocks(self.stem(image / 255))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class VGG(nn.Module):
    """Pairs of 3x3 convolutions between poolings, then two linear layers: VGG (arXiv:1409.1556) in small."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 96), hidden: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise((1, *widths)):
            layers += conv_bn(inputs, outputs, 3, act=nn.ReLU)
            layers += [*conv_bn(outputs, outputs, 3, act=nn.ReLU), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Linear(9 * widths[-1], hidden), nn.ReLU(), nn.Linear(hidden, 10))

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.features(image / 255).flatten(1))


class SqueezeExcite(nn.Module):
    """Channel gate with a hard sigmoid, as in MobileNetV3."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, channels // 4, 1)
        self.expand = nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.expand(F.relu(self.reduce(F.adaptive_avg_pool2d(x, 1))))
        return x * F.hardsigmoid(gate)


def conv_bn(
    inputs: int,
    outputs: int,
    kernel: int,
    stride: int = 1,
    groups: int = 1,
    act: type[nn.Module] | None = None,
) -> list[nn.Module]:
    """Convolution with "same" padding, batch normalisation and an optional activation."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs), *([act()] if act else [])]


class InvertedResidual(nn.Module):
    """Expand, depthwise, (squeeze-excite,) project: the block of MobileNetV3 (arXiv:1905.02244)."""

    def __init__(
        self,
        inputs: int,
        hidden: int,
        outputs: int,
        kernel: int,
        stride: int,
        gate: bool,
        act: type[nn.Module],
    ) -> None:
        super().__init__()
        self.residual = stride == 1 and inputs == outputs
        self.body = nn.Sequential(
            *conv_bn(inputs, hidden, 1, act=act),
            *conv_bn(hidden, hidden, kernel, stride, groups=hidden, act=act),
            *([SqueezeExcite(hidden)] if gate else []),
            *conv_bn(hidden, outputs, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return x + y if self.residual else y


class MobileNet(nn.Module):
    """MobileNetV3 in small: ReLU and 3x3 depthwise early; Hardswish, 5x5 and squeeze-excite late."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *conv_bn(1, 16, 3, act=nn.ReLU),
            InvertedResidual(16, 48, 24, 3, 2, gate=False, act=nn.ReLU),
            InvertedResidual(24, 72, 24, 3, 1, gate=False, act=nn.ReLU),
            InvertedResidual(24, 120, 56, 5, 2, gate=True, act=nn.Hardswish),
            InvertedResidual(56, 224, 56, 5, 1, gate=True, act=nn.Hardswish),
            InvertedResidual(56, 224, 56, 5, 1, gate=True, act=nn.Hardswish),
            *conv_bn(56, 224, 1, act=nn.Hardswish),
        )
        self.head = nn.Linear(224, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.features(image / 255)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Attention(nn.Module):
    """Multi-head self-attention over ``[batch, tokens, width]`` with one packed QKV projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        packed = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, width))


class Encoder(nn.Module):
    """Pre-norm transformer block with a GELU feed-forward of twice the width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Vision transformer (arXiv:2010.11929): 4x4 patches, class token, four blocks of width 96."""

    def __init__(self, width: int = 96, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, 50, width))
        self.blocks = nn.Sequential(*(Encoder(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, image: Tensor) -> Tensor:
        patches = self.patch(image / 255).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(patches.shape[0], -1, -1), patches], dim=1)
        x = self.blocks(x + self.position)
        return self.head(self.norm(x)[:, 0])


@dataclass(frozen=True)
class Recipe:
    """How one network is trained and which PyTorch exporter writes it."""

    build: Callable[[], nn.Module]
    epochs: int
    rate: float
    decay: float
    dynamo: bool


RECIPES = {
    "resnet": Recipe(ResNet, epochs=8, rate=5e-3, decay=0.05, dynamo=False),
    "vgg": Recipe(VGG, epochs=6, rate=5e-3, decay=0.05, dynamo=False),
    "mobilenet": Recipe(MobileNet, epochs=12, rate=5e-3, decay=0.05, dynamo=True),
    "vit": Recipe(ViT, epochs=14, rate=1.5e-3, decay=0.05, dynamo=True),
}


def read_split(split: str) -> tuple[Images, Labels]:
    """Images ``[n, 28, 28]`` and labels ``[n]`` of the ``train`` or ``t10k`` split (IDX format)."""
    images = gzip.decompress((DATA / f"{split}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((DATA / f"{split}-labels-idx1-ubyte.gz").read_bytes())
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)
    return pixels, np.frombuffer(labels, np.uint8, offset=8).astype(np.int64)


def as_input(images: Images) -> npt.NDArray[np.float32]:
    """The networks' input: float32 ``[n, 1, 28, 28]``, still 0..255."""
    return images[:, None].astype(np.float32)


def balanced(labels: Labels, count: int, rng: np.random.Generator) -> npt.NDArray[np.intp]:
    """Indices of ``count`` samples in class order 0..9, 0..9, ..., so that every prefix is balanced too."""
    rows = -(-count // 10)
    columns = [rng.permutation(np.flatnonzero(labels == c))[:rows] for c in range(10)]
    return np.stack(columns, axis=1).ravel()[:count]


def save_arrays(path: Path, **arrays: npt.NDArray[np.generic]) -> None:
    """``numpy.savez_compressed`` at zlib's best level, which that function cannot be asked for."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, array)


def write_samples() -> None:
    """Write the calibration images (training split) and the labelled test images."""
    rng = np.random.default_rng(SEED)
    images, labels = read_split("train")
    chosen = balanced(labels, CALIBRATION_IMAGES, rng)
    save_arrays(HERE / "calibration.npz", image=as_input(images[chosen]))
    images, labels = read_split("t10k")
    chosen = balanced(labels, TEST_IMAGES, rng)
    save_arrays(HERE / "test.npz", image=as_input(images[chosen]), label=labels[chosen])


def augment(images: Images, rng: np.random.Generator) -> Images:
    """Shift every image by up to two pixels each way and mirror half of them."""
    count, size = len(images), images.shape[1]
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    rows, columns = np.arange(size) + rng.integers(0, 5, (2, count, 1))
    mirrored = rng.random((count, 1)) < 0.5
    columns = np.where(mirrored, columns[:, ::-1], columns)
    moved: Images = padded[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return moved


def batches(images: Images, labels: Labels, rng: np.random.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One shuffled, augmented epoch; the last partial batch is dropped."""
    order = rng.permutation(len(images))
    for start in range(0, len(order) - BATCH + 1, BATCH):
        chosen = order[start : start + BATCH]
        image = torch.from_numpy(as_input(augment(images[chosen], rng)))
        yield image.to(memory_format=torch.channels_last), torch.from_numpy(labels[chosen])


def train(name: str, recipe: Recipe) -> nn.Module:
    """Train with AdamW and a one-cycle schedule on the smoothed cross-entropy; the net is in eval mode."""
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    images, labels = read_split("train")
    net = recipe.build().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=recipe.rate, weight_decay=recipe.decay)
    steps = recipe.epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, total_steps=steps)
    for epoch in range(recipe.epochs):
        start, total = time.perf_counter(), 0.0
        for image, label in batches(images, labels, rng):
            loss = F.cross_entropy(net(image), label, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        mean = total / (len(images) // BATCH)
        print(f"{name} epoch {epoch + 1}: loss {mean:.4f}, {time.perf_counter() - start:.0f} s", flush=True)
    return net.eval()


def drop_metadata(path: Path) -> None:
    """Remove the exporters' debugging metadata: local paths and stack traces, larger than small weights."""
    model = onnx.load(path)
    for node in model.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    for value in [*model.graph.input, *model.graph.output, *model.graph.value_info, *model.graph.initializer]:
        value.ClearField("metadata_props")
    model.graph.ClearField("metadata_props")
    onnx.save(model, path)


def export(net: nn.Module, path: Path, dynamo: bool) -> None:
    """Export with a dynamic batch axis, weights inside the file."""
    net = net.to(memory_format=torch.contiguous_format)
    example = (torch.zeros(2, 1, 28, 28),)
    if dynamo:
        torch.onnx.export(
            net,
            example,
            path,
            dynamo=True,
            external_data=False,
            input_names=["image"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    else:
        torch.onnx.export(
            net,
            example,
            path,
            dynamo=False,
            opset_version=17,
            # PRESERVE on an eval() net keeps BatchNormalization as nodes: folding them is the slimmer's work.
            training=torch.onnx.TrainingMode.PRESERVE,
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
        )
    drop_metadata(path)


def accuracy(path: Path, images: npt.NDArray[np.float32], labels: Labels) -> float:
    """Top-1 accuracy of the exported file in ONNX Runtime."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    logits = [session.run(None, {"image": images[i : i + 500]})[0] for i in range(0, len(images), 500)]
    return float((np.concatenate(logits).argmax(1) == labels).mean())


def report(name: str, path: Path, net: nn.Module) -> None:
    """Print size and accuracy of one exported network."""
    images, labels = read_split("t10k")
    subset = np.load(HERE / "test.npz")
    parameters = sum(p.numel() for p in net.parameters())
    full, part = accuracy(path, as_input(images), labels), accuracy(path, subset["image"], subset["label"])
    print(
        f"{name}: {parameters} parameters, {path.stat().st_size} bytes, "
        f"accuracy {full:.2%} of 10,000, {part:.2%} of {TEST_IMAGES}"
    )


def main() -> None:
    """Train, export and measure the named networks (all by default)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--net", choices=RECIPES, action="append", help="train only this net; repeatable")
    parser.add_argument("--epochs", type=int, help="instead of the recipe's own number")
    args = parser.parse_args()
    torch.set_num_threads(2)
    write_samples()
    for name in args.net or RECIPES:
        recipe = RECIPES[name]
        net = train(name, replace(recipe, epochs=args.epochs) if args.epochs else recipe)
        path = HERE / f"{name}.onnx"
        export(net, path, recipe.dynamo)
        report(name, path, net)


if __name__ == "__main__":
    main()

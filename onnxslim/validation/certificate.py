"""What a model says of how it was made and of what was measured then, and whether that holds.

Not a signature: who changes a model may change what it says. It tells whether a file is the one that was made
and measured, of which original, by which passes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from onnx import TensorProto
from pydantic import TypeAdapter

from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.fidelity import Judge
from onnxslim.engine.judging import Kept
from onnxslim.errors import UsageError, ValidationError, one_line
from onnxslim.formats import decibels, percent, plain
from onnxslim.ir import proto
from onnxslim.ir.graph import Constant
from onnxslim.ir.model import Model, source_sha256, without_data
from onnxslim.runtime.session import Session
from onnxslim.runtime.targets import Target
from onnxslim.version import version

PREFIX = "onnxslim."
# By how much, in dB, what other samples say may be below what was measured: so much do samples of one kind
# differ.
SLACK = 3.0
# What is left, in dB, where nothing but the order of additions has changed.
ROUNDING = 60.0
# Samples that the figures are looked at on.
SAMPLES = 256


@dataclass(frozen=True)
class Certificate:
    """What a model says of itself.

    Attributes:
        version: of onnxslim that made it.
        recipe_sha256: of the recipe, see `Recipe.sha256`.
        source_sha256: of the original, see `onnxslim.ir.model.source_sha256`.
        content_sha256: of the model itself, see `content_sha256`.
        passes: what was done, as in a recipe; of files only the names.
        kept: what the outputs kept; None if all passes were lossless.
    """

    version: str
    recipe_sha256: str
    source_sha256: str
    content_sha256: str
    passes: Sequence[Any]
    kept: Kept | None = None

    @classmethod
    def of(
        cls, model: Model, recipe: str, source: str, passes: Sequence[Any], kept: Kept | None
    ) -> Certificate:
        """What is to be said of a model that was made by a recipe, of an original with these hashes."""
        return cls(
            version(), recipe, source, content_sha256(model), passes, None if kept is None else plain(kept)
        )

    @classmethod
    def read(cls, model: Model) -> Certificate:
        """What a model says of itself.

        Raises:
            UsageError: it says nothing, or not all, or in another form.
        """
        own = {key: value for key, value in model.metadata.items() if key.startswith(PREFIX)}
        name = model.source or model.graph.name
        try:
            texts = {each: own[PREFIX + each] for each in _TEXTS}
            passes, kept = json.loads(own[PREFIX + "passes"]), json.loads(own.get(PREFIX + "kept", "null"))
            return cls(**texts, passes=_PASSES.validate_python(passes), kept=_KEPT.validate_python(kept))
        except KeyError as error:
            raise UsageError(
                f"'{name}' has no certificate: there is no {error} in its metadata (commands and recipes "
                "write one into what they change)"
            ) from error
        except ValueError as error:
            raise UsageError(f"the certificate of '{name}' cannot be read: {one_line(error)}") from error

    def stamped(self, model: Model) -> Model:
        """The model, saying so."""
        told = {name: getattr(self, name) for name in _TEXTS}
        told["passes"] = json.dumps(self.passes)
        if self.kept is not None:
            told["kept"] = json.dumps(plain(self.kept))
        return model.with_metadata({PREFIX + name: value for name, value in told.items()})


_PASSES: TypeAdapter[list[str | dict[str, Any]]] = TypeAdapter(list[str | dict[str, Any]])
_KEPT: TypeAdapter[Kept | None] = TypeAdapter(Kept | None)
_TEXTS = ("version", "recipe_sha256", "source_sha256", "content_sha256")


def content_sha256(model: Model) -> str:
    """Hash of all values, then of everything else but what `Certificate` writes.

    It does not depend on how values are stored: embedded, in files beside, as bytes or as a list of numbers.
    """
    digest = hashlib.sha256()
    told = model.to_proto_with(partial(_hashed, digest))
    kept = [item for item in told.metadata_props if not item.key.startswith(PREFIX)]
    del told.metadata_props[:]
    told.metadata_props.extend(kept)
    digest.update(told.SerializeToString(deterministic=True))
    return digest.hexdigest()


def _hashed(digest: Any, constant: Constant) -> TensorProto:
    """Takes in one constant after the other, and leaves its name, type and shape in the model."""
    values = np.asarray(constant.peek())
    if values.dtype == object:
        digest.update(proto.encode_embedded(constant).SerializeToString(deterministic=True))
    else:
        digest.update(np.ascontiguousarray(values).view(np.uint8).data if values.size else b"")
    return without_data(constant)


@dataclass(frozen=True)
class Finding:
    """One thing that a certificate says.

    Attributes:
        what: in a word or two.
        holds: whether it does; None where that was not looked at.
        told: what was found, or what it would take to look.
    """

    what: str
    holds: bool | None
    told: str


def verify(
    model: Model,
    original: Model | None = None,
    data: CalibrationData | None = None,
    target: Target | None = None,
) -> tuple[Finding, ...]:
    """Whether what a model says of itself holds.

    Args:
        model: with a certificate.
        original: what it was made of.
        data: samples, best such as no pass was given, to compare the two on.
        target: where to run them; by default the processor.

    Raises:
        UsageError: the model has no certificate.
        LoadError: a model does not run.
        CalibrationError: the data does not fit the models.
    """
    found = Certificate.read(model)
    return (
        _content(found, model),
        _origin(found, original),
        _figures(found, model, original, data, target or Target.cpu()),
    )


def require(findings: Sequence[Finding]) -> None:
    """Raise ValidationError if something does not hold."""
    for each in findings:
        if each.holds is False:
            raise ValidationError(f"the certificate does not hold: {each.what} {each.told}")


def _content(found: Certificate, model: Model) -> Finding:
    same = content_sha256(model) == found.content_sha256
    return Finding("content", same, "as it was made" if same else "has been changed since it was made")


def _origin(found: Certificate, original: Model | None) -> Finding:
    if original is None:
        return Finding("original", None, f"its sha256 is {found.source_sha256}; give it to compare")
    same = source_sha256(original) == found.source_sha256
    name = f"'{original.source}'" if original.source else "what was given"
    return Finding("original", same, f"is {name}" if same else f"is not {name}, but {found.source_sha256}")


def _figures(
    found: Certificate,
    model: Model,
    original: Model | None,
    data: CalibrationData | None,
    target: Target,
) -> Finding:
    said, least = _said(found)
    if original is None or data is None:
        Session(model, target, once=True)
        return Finding("figures", None, f"{said}; it loads, and takes the original and data to measure")
    judge = Judge(original, data, target, SAMPLES)
    score = judge(model)
    told = f"{decibels(score.sqnr)} dB" if score.sqnr < math.inf else "exactly what the original computes"
    if score.agreement is not None:
        told += f", the same largest output in {percent(score.agreement)}"
    told += f", on {judge.seen} samples given now; {said}"
    return Finding("figures", None if least is None else score.sqnr >= least, told)


def _said(found: Certificate) -> tuple[str, float | None]:
    """What the outputs kept, and how much of that, in dB, others have to; None where that says nothing."""
    if found.kept is None:
        return "then all passes were lossless", ROUNDING
    least = min(found.kept.sqnr - SLACK, ROUNDING) if found.kept.whose == "held out" else None
    return f"then it {found.kept}", least

"""Mails, wanted or not: do sentence embeddings tell them apart."""

from __future__ import annotations

import email
import email.policy
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from onnxslim.models import stage
from onnxslim.models.inputs import Feed
from onnxslim.models.tasks.base import Outputs
from onnxslim.models.tasks.estimates import Outcomes
from onnxslim.models.tasks.retrieval import Encoding, unit_rows

# Folders by class: mails that are not wanted, and those that are.
TESTED = ("spam-2", "easy-ham-2")
OTHERS = ("spam-1", "easy-ham-1")


class Mails(Encoding):
    """Accuracy of the class whose mean embedding is nearest: of 300 mails each, 100 are known, 200 are asked.

    Calibrated on every second mail of other folders; `unlabelled` are those between.
    """

    name = "mails"
    sources = ("mails",)
    known, asked = 100, 200

    def calibration(self, samples: int) -> list[Feed]:
        """Mails of other folders, by turns of both classes."""
        return self._chosen(0, samples)

    def unlabelled(self, samples: int) -> list[Feed]:
        """The mails between them."""
        return self._chosen(1, samples)

    def _chosen(self, start: int, samples: int) -> list[Feed]:
        pairs = zip(*(mails(name)[start::2] for name in OTHERS), strict=False)
        found = [path for pair in pairs for path in pair]
        if len(found) < samples:
            raise ValueError(f"{self.name} has {len(found)} such samples, not {samples}")
        return self.feeds([text_of(path.read_bytes()) for path in found[:samples]])

    @cached_property
    def _tested(self) -> list[Path]:
        """Of each class in turn, known ones and then those that are asked, evenly spread over the folder."""
        count, found = self.known + self.asked, [mails(name) for name in TESTED]
        order = np.random.default_rng(0)
        return [each[index] for each in found for index in order.permutation(len(each))[:count]]

    def _make_test(self) -> Sequence[Feed]:
        return self.feeds([text_of(path.read_bytes()) for path in self._tested])

    def judge(self, outputs: Sequence[Outputs]) -> tuple[Outcomes, ...]:
        """Accuracy over the mails that are asked."""
        rows = unit_rows(outputs).reshape(len(TESTED), self.known + self.asked, -1)
        means = rows[:, : self.known].mean(axis=1)
        said = np.argmax(rows[:, self.known :] @ means.T, axis=2)
        return (Outcomes.of("accuracy", (said == np.arange(len(TESTED))[:, None]).ravel()),)


def mails(folder: str) -> list[Path]:
    """The mails of a folder, in order."""
    return sorted((stage.folder("mails") / folder).glob("*.txt"))


def text_of(mail: bytes) -> str:
    """The subject and what is to be read of a mail, without marks of HTML."""
    message = email.message_from_bytes(mail, policy=email.policy.compat32)
    part = next((each for each in message.walk() if each.get_content_maintype() == "text"), message)
    content = part.get_payload(decode=True)
    body = content.decode("latin-1") if isinstance(content, bytes) else ""
    return " ".join(re.sub(r"<[^>]*>", " ", f"{message.get('Subject', '')} {body[:20_000]}").split()) or "-"

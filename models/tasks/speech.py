"""Prompts of a telephone exchange between silence and noise: is somebody speaking."""

from __future__ import annotations

import wave
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from onnxslim.ir.graph import Array
from onnxslim.models import stage
from onnxslim.models.inputs import Feed, Samples
from onnxslim.models.tasks.base import Outputs, Task, first
from onnxslim.models.tasks.estimates import Outcomes

RATE = 16000
# The detector's frames: so many new samples after the last ones of the frame before.
FRAME, CONTEXT = 512, 64
# Frames of one clip, somewhat more than six seconds.
FRAMES = 200
# Signal to noise in dB, clip by clip in turn.
NOISES = (40.0, 20.0, 10.0, 5.0)
# A frame of the clean prompt is speech if it is less than so many dB below its loudest ones.
QUIET = 30.0


@dataclass(frozen=True)
class Clip:
    """Sound at 16 kHz, float32 [frames * 512], and which frames are speech: 1, 0, or -1 beside a change."""

    sound: Samples
    truth: Array


class Speech(Task):
    """F1 of the frames in which somebody speaks: prompts in English and Italian, in silence and four noises.

    The truth is the energy of the clean prompts; a frame beside a change of it does not count. Calibrated on
    a speaker of French; `unlabelled` has one of Russian.
    """

    name = "speech"
    models = ("silero_vad_16k_sequence",)
    sources = ("speech_en", "speech_it", "speech_fr", "speech_ru")
    clips = 60

    def calibration(self, samples: int) -> list[Feed]:
        """Clips of French."""
        return [feed(clip.sound) for clip in clips("speech_fr", samples)]

    def unlabelled(self, samples: int) -> list[Feed]:
        """Clips of Russian."""
        return [feed(clip.sound) for clip in clips("speech_ru", samples)]

    def _make_test(self) -> Sequence[Feed]:
        return [feed(clip.sound) for clip in self._tested()]

    def _tested(self) -> list[Clip]:
        return [*clips("speech_en", self.clips), *clips("speech_it", self.clips)]

    def judge(self, outputs: Sequence[Outputs]) -> tuple[Outcomes, ...]:
        """F1 and the share of right frames, at a probability of a half; a clip is a group."""
        said = [np.ravel(first(found)) >= 0.5 for found in outputs]
        truth = [clip.truth for clip in self._tested()]
        both = np.array([np.sum(s & (t == 1)) for s, t in zip(said, truth, strict=True)])
        either = np.array([np.sum(s & (t >= 0)) + np.sum(t == 1) for s, t in zip(said, truth, strict=True)])
        right = np.array([np.sum(s[t >= 0] == t[t >= 0]) for s, t in zip(said, truth, strict=True)])
        return (
            Outcomes.of("F1", 2 * both, either),
            Outcomes.of("frames", right, np.array([np.sum(t >= 0) for t in truth])),
        )


def feed(sound: Samples) -> Feed:
    """``input`` float32 [frames, 576], with ``h`` and ``c`` of zeros: a clip as one sequence."""
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(sound, (CONTEXT, 0)), FRAME + CONTEXT)
    state = np.zeros((1, 1, 128), np.float32)
    return {"input": windows[::FRAME].copy(), "h": state, "c": state}


@cache
def clips(source: str, count: int) -> tuple[Clip, ...]:
    """Clips of one speaker, each with other prompts, as long as there are any left."""
    prompts = sorted(path for path in stage.folder(source).rglob("*.wav") if spoken(path))
    rng = np.random.default_rng(0)
    order = [prompts[index] for index in rng.permutation(len(prompts))]
    return tuple(_clip(order, number, np.random.default_rng(number)) for number in range(count))


def spoken(path: Path) -> bool:
    """Whether a file is speech by its name, not a tone or silence."""
    return not any(word in path.as_posix() for word in ("beep", "tone", "silence", "monkeys"))


def _clip(prompts: Sequence[Path], number: int, rng: np.random.Generator) -> Clip:
    """Two prompts with pauses, and noise over all of it."""
    clean, at = np.zeros(FRAMES * FRAME, np.float32), int(rng.integers(RATE // 4, RATE))
    for index in (2 * number, 2 * number + 1):
        sound = sound_of(prompts[index % len(prompts)])[: max(0, len(clean) - at)]
        clean[at : at + len(sound)] = sound
        at += len(sound) + int(rng.integers(RATE // 2, 2 * RATE))
    spread = float(np.sqrt(np.square(clean[clean != 0]).mean())) * 10 ** (-NOISES[number % len(NOISES)] / 20)
    return Clip((clean + spread * noise(len(clean), rng)).astype(np.float32), truth(clean))


def sound_of(path: Path) -> Samples:
    """A recording of 16 bits and 8 kHz at 16 kHz, its loudest sample 0.5."""
    with wave.open(str(path)) as file:
        if (file.getnchannels(), file.getsampwidth(), file.getframerate()) != (1, 2, RATE // 2):
            raise ValueError(f"{path} is not mono, 16 bits at 8 kHz")
        pcm = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32)
    from scipy.signal import resample_poly  # takes half a second to import, for this alone

    sound = resample_poly(pcm, 2, 1).astype(np.float32)
    return np.asarray(sound * (0.5 / max(1.0, float(np.abs(sound).max()))), np.float32)


def noise(length: int, rng: np.random.Generator) -> Samples:
    """Noise of power 1, its spectrum falling with the frequency by a random power between white and pink."""
    spectrum = np.fft.rfft(rng.standard_normal(length))
    spectrum *= np.maximum(np.arange(len(spectrum)), 50.0) ** -rng.uniform(0, 0.5)
    made = np.fft.irfft(spectrum, length)
    return np.asarray(made / made.std(), np.float32)


def truth(clean: Samples) -> Array:
    """Which frames of a clean recording are speech: 1, 0, or -1 beside a change."""
    power = np.square(clean.reshape(-1, FRAME), dtype=np.float64).mean(axis=1)
    loud = power > np.percentile(power[power > 0], 90) * 10 ** (-QUIET / 10)
    changes = np.flatnonzero(np.diff(loud))
    found: Array = loud.astype(np.int8)
    found[np.unique(np.concatenate([changes + each for each in (0, 1)]))] = -1
    return found

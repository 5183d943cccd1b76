"""Sizes that users give inputs."""

from __future__ import annotations

import numpy as np
import pytest

from onnxslim.errors import UsageError
from onnxslim.ir.model import InputSpec
from onnxslim.shapes.given import by_name, one_sample, sized_by, with_sizes

IMAGE = InputSpec("image", np.dtype(np.float32), ("N", 3, "height", None))
MASK = InputSpec("mask", np.dtype(bool), ("N", "height"))


def test_words_are_read_however_commas_cut_them() -> None:
    assert by_name(["x:0:1,2", "s:"]) == {"x:0": (1, 2), "s": ()}
    assert by_name(["x:1", "2", "y:3"]) == {"x": (1, 2), "y": (3,)}
    for wrong in ("x", "x:a", "x:-1"):
        with pytest.raises(UsageError, match="x"):
            by_name([wrong])


def test_a_free_axis_has_one_size_in_all_inputs() -> None:
    bound = with_sizes([IMAGE, MASK], {"image": (2, 3, 8, 9)})
    assert [spec.shape for spec in bound] == [(2, 3, 8, 9), (2, 8)]
    assert sized_by([IMAGE, MASK], bound) == {"image", "mask"}
    assert sized_by([IMAGE], with_sizes([IMAGE], {})) == frozenset()


def test_an_input_that_a_broken_file_declares_twice_is_sized_twice() -> None:
    twice = [MASK, IMAGE, MASK]
    bound = with_sizes(twice, {"mask": (2, 8)})
    assert [spec.shape for spec in bound] == [(2, 8), (2, 3, 8, None), (2, 8)]
    assert one_sample(twice, bound) == {"mask": (1, 8), "image": (1, 3, 8, 1)}


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("imag", (1, 3, 8, 8), "no input 'imag'; did you mean 'image'"),
        ("image", (3, 8, 8), "has 4 axes, not 3"),
        ("image", (1, 4, 8, 8), "has 3 along axis 1, not 4"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(name: str, sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        with_sizes([IMAGE, MASK], {name: sizes})


def test_one_sample_is_of_given_sizes_then_of_those_of_a_run() -> None:
    specs = [IMAGE, MASK]
    fed = {"image": (5, 3, 4, 6), "mask": (5, 4)}
    assert one_sample(specs, specs) == {"image": (1, 3, 1, 1), "mask": (1, 1)}
    assert one_sample(specs, specs, fed) == {"image": (1, 3, 4, 6), "mask": (1, 4)}
    bound = with_sizes(specs, {"mask": (7, 9)})
    assert one_sample(specs, bound, fed) == {"image": (1, 3, 9, 6), "mask": (1, 9)}
    unknown = [InputSpec("x", None, None), InputSpec("y", np.dtype(np.float32), None)]
    assert one_sample(unknown, unknown, {"y": (4, 2)}) == {"y": (1, 2)}

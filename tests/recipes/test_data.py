"""Data as users name it: every kind of file, folder and function, and what does not fit is said at once."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.lib import format as npy
from onnx import numpy_helper

from onnxslim import cli
from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.sources.arrays import Feeds
from onnxslim.errors import CalibrationError, SaveError, UsageError
from onnxslim.ir.model import Model
from onnxslim.recipes.data import IMAGENET, Batches, Data
from tests.helpers import parse

SAMPLES = np.arange(20, dtype=np.float32).reshape(10, 2)
ONE = parse("g (float[N,2] x) => (float[N,2] y) { y = Relu(x) }")
TWO = parse("g (float[N,2] x, int64[N] ids) => (float[N,2] y) { y = Relu(x) }")
IMAGE = parse("g (float[N,3,8,6] x) => (float[N,3,8,6] y) { y = Relu(x) }")


def read(path: Path | str, model: Model = ONE, **settings: Any) -> Batches:
    return Data(path=str(path), **settings).read(model)


def stacked(found: Batches, name: str = "x") -> Any:
    return np.concatenate([feeds[name] for feeds in found.data])


def fails(text: str) -> Any:
    return pytest.raises(CalibrationError, match=text)


@pytest.mark.parametrize(("batch", "sizes"), [("N", [8, 2]), ("1", [1] * 10), ("5", [5, 5])])
def test_batches_are_as_large_as_the_model_wants_them(tmp_path: Path, batch: str, sizes: list[int]) -> None:
    model = parse(f"g (float[{batch},2] x) => (float[{batch},2] y) {{ y = Relu(x) }}")
    np.save(tmp_path / "a.npy", SAMPLES)
    np.savez(tmp_path / "a.npz", x=SAMPLES)
    for name in ("a.npy", "a.npz"):
        found = read(tmp_path / name, model)
        assert [len(feeds["x"]) for feeds in found.data] == sizes
    with fails("use batches of 1"):
        read(tmp_path / "a.npz", parse("g (float[1,2] x) => (float[1,2] y) { y = Relu(x) }"), batch_size=4)


def test_one_array_for_the_only_input(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", SAMPLES)
    found = read(tmp_path / "a.npy", batch_size=4)
    assert [len(feeds["x"]) for feeds in found.data] == [4, 4, 2]
    np.testing.assert_array_equal(stacked(found), SAMPLES)
    assert found.labels is None
    with fails("input 'ids' is missing"):
        read(tmp_path / "a.npy", TWO)


def test_a_folder_of_one_array_per_input(tmp_path: Path) -> None:
    for name, array in (("x", SAMPLES), ("ids", np.arange(10)), ("label", np.arange(10) % 3)):
        np.save(tmp_path / f"{name}.npy", array)
    found = read(tmp_path, TWO, batch_size=3)
    np.testing.assert_array_equal(stacked(found), SAMPLES)
    np.testing.assert_array_equal(stacked(found, "ids"), np.arange(10))
    assert found.labels is not None
    assert found.labels.tolist() == (np.arange(10) % 3).tolist()
    assert read(tmp_path, TWO, labels_key="label").labels is not None
    with fails("no array 'truth'"):
        read(tmp_path, TWO, labels_key="truth")
    np.save(tmp_path / "ids.npy", np.arange(9))
    with fails("first axis of every array must count the samples, got x: 10, ids: 9"):
        read(tmp_path, TWO)


def test_a_folder_of_one_array_per_batch(tmp_path: Path) -> None:
    for at in (10, 2):
        np.save(tmp_path / f"batch{at}.npy", np.full((at, 2), at, np.float32))
    assert [len(feeds["x"]) for feeds in read(tmp_path).data] == [2, 10]


def test_a_folder_of_test_data(tmp_path: Path) -> None:
    (tmp_path / "test_data_set_0").mkdir()
    tensor = numpy_helper.from_array(SAMPLES)
    (tmp_path / "test_data_set_0" / "input_0.pb").write_bytes(tensor.SerializeToString())
    np.testing.assert_array_equal(stacked(read(tmp_path)), SAMPLES)


def test_arrays_that_are_not_what_they_say(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.array([{}], object), allow_pickle=True)
    with fails(r"a.npy: cannot be read"):
        read(path)
    header = io.BytesIO()
    npy.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 2)})
    path.write_bytes(header.getvalue() + bytes(100))
    with fails(r"a.npy: cannot be read"):
        read(path)
    path.write_bytes(b"hello")
    with fails(r"a.npy: cannot be read"):
        read(path)
    np.savez(tmp_path / "b", x=SAMPLES)
    (tmp_path / "b.npz").rename(path)
    with fails(r"call it .npz"):
        read(path)
    with fails("No such file"):
        read(tmp_path / "none.npy")
    np.save(path, np.float32(1))
    with fails("x?.*must count the samples"):
        read(path)


# ---------------------------------------------------------------------------------------------- images


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    image = pytest.importorskip("PIL.Image")
    image.fromarray(np.full((8, 6, 3), (255, 0, 51), np.uint8)).save(tmp_path / "a.png")
    return tmp_path


def test_images_are_fed_as_the_input_asks_and_guesses_are_told(pictures: Path) -> None:
    found = read(pictures, IMAGE)
    mean, std = map(np.array, IMAGENET)
    (feeds,) = found.data
    assert feeds["x"].shape == (1, 3, 8, 6)
    np.testing.assert_allclose(feeds["x"][0, :, 0, 0], ([1, 0, 0.2] - mean) / std, rtol=1e-5)
    (note,) = found.notes
    assert (
        "fed to 'x' as 8 x 6 x 3 in NCHW, RGB, cropped around the centre, (pixel * 0.00392157 - (0.485"
        in note
    )
    assert "guessed: mean, std, scale of ImageNet (see --image-mean, --show-inputs)" in note


def test_what_is_given_is_not_guessed(pictures: Path) -> None:
    settings = {"image_mean": (0.5,), "image_std": (0.5,), "image_scale": 1 / 255}
    found = read(pictures, IMAGE, **settings)
    (feeds,) = found.data
    np.testing.assert_allclose(feeds["x"][0, :, 0, 0], [1, -1, -0.6], rtol=1e-5)
    assert "guessed" not in found.notes[0]
    with fails("mean has 2 values for 3 channels"):
        read(pictures, IMAGE, image_mean=(1.0, 2.0))


@pytest.mark.parametrize(
    ("text", "shape"),
    [("float[N,8,6,3]", (1, 8, 6, 3)), ("float[N,1,8,6]", (1, 1, 8, 6)), ("uint8[N,4,4,1]", (1, 4, 4, 1))],
)
def test_layout_and_channels_are_those_of_the_input(
    pictures: Path, text: str, shape: tuple[int, ...]
) -> None:
    model = parse(f"g ({text} x) => ({text} y) {{ y = Identity(x) }}")
    (feeds,) = read(pictures, model).data
    assert feeds["x"].shape == shape
    if feeds["x"].dtype == np.uint8:
        assert feeds["x"].max() > 1


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Two images of cats, one of dogs, and an empty folder between them."""
    image = pytest.importorskip("PIL.Image")
    for name, red in (("cat/10", 30), ("cat/2", 20), ("dog/1", 255)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        image.fromarray(np.full((8, 6, 3), (red, 0, 0), np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "cow").mkdir()
    return tmp_path


PLAIN = {"image_mean": (0.0,), "image_std": (1.0,), "image_scale": 1.0}


def test_folders_of_classes_are_searched_and_may_be_the_labels(classes: Path) -> None:
    found = read(classes, IMAGE, **PLAIN)
    assert stacked(found)[:, 0, 0, 0].tolist() == [20, 30, 255]
    assert found.labels is None
    labelled = read(classes, IMAGE, labels_from_folders=True, **PLAIN)
    assert labelled.labels is not None
    assert labelled.labels.tolist() == [0, 0, 2]
    assert labelled.notes[1].endswith("classes are 0 cat, 1 cow, 2 dog")
    with fails("if all images lie in one folder per class"):
        read(classes / "cat", IMAGE, labels_from_folders=True)
    with fails("found none, and no images either"):
        read(classes / "cow", IMAGE)


def test_what_the_model_gets_is_shown(classes: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    file = tmp_path / "pages" / "sheet.png"
    file.parent.mkdir()
    told = read(classes, IMAGE, batch_size=2, image_channels="BGR").show(file)
    assert "3 inputs as the model gets them, values from -2.036 to 2.249" in told
    with image.open(file) as opened:
        sheet = np.asarray(opened)
    assert sheet.shape == (8, 18, 3)
    assert sheet[0, [0, 6, 12]].tolist() == [[0, 0, 20], [0, 0, 30], [0, 0, 255]], "blue where BGR is fed"
    for index in range(9):
        image.fromarray(np.full((8, 6, 3), index, np.uint8)).save(classes / "cat" / f"{index + 20}.png")
    many = read(classes, IMAGE, **PLAIN)
    assert "8 inputs" in many.show(file)
    with image.open(file) as opened:
        assert opened.size == (4 * 6, 2 * 8)
    np.save(tmp_path / "a.npy", SAMPLES)
    with pytest.raises(UsageError, match="a folder of images"):
        read(tmp_path / "a.npy").show(file)
    with pytest.raises(SaveError, match="cannot write"):
        many.show(tmp_path / "none" / "sheet.png")


def test_free_sizes_have_to_be_given(pictures: Path) -> None:
    model = parse("g (float[N,3,H,W] x) => (float[N,3,H,W] y) { y = Relu(x) }")
    with fails("does not say how large images are; give --image-size"):
        read(pictures, model)
    (feeds,) = read(pictures, model, image_size=(4, 5)).data
    assert feeds["x"].shape == (1, 3, 4, 5)
    for other in (ONE, TWO):
        with fails("images can only be fed to a model whose one input has four axes"):
            read(pictures, other)


# ------------------------------------------------------------------------------------------- functions

MODULE = """
import numpy as np

def batches():
    yield {"x": np.ones((2, 2), np.float32)}

class Reader:
    def __init__(self):
        self.left = 1
    def get_next(self):
        self.left -= 1
        return {"x": np.ones((2, 2), np.float32)} if self.left >= 0 else None

def reader():
    return Reader()

LIST = [{"x": np.ones((2, 2), np.float32)}]

def broken():
    raise KeyError("oops")

NUMBER = 3
"""


@pytest.fixture
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    name = f"data_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODULE", name)
    return tmp_path / name


@pytest.mark.parametrize("what", ["batches", "Reader", "reader", "LIST"])
def test_functions_and_what_they_return(working_folder: Path, what: str) -> None:
    found = read(f"{working_folder.name}:{what}")
    for _ in range(2):
        assert [feeds["x"].tolist() for feeds in found.data] == [[[1, 1], [1, 1]]]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", "AttributeError"),
        ("broken", "KeyError: 'oops'"),
        ("NUMBER", "int cannot be iterated"),
    ],
)
def test_functions_that_fail(working_folder: Path, what: str, message: str) -> None:
    with fails(message):
        read(f"{working_folder.name}:{what}")
    with fails("ModuleNotFoundError"):
        read("no_such_module_here:f")


def test_a_file_of_that_name_is_a_file(working_folder: Path) -> None:
    name = f"{working_folder.name}:batches"
    Path(name).write_bytes(b"no data")
    with fails("expected an .npz or .npy file, or a folder"):
        read(name)


# ------------------------------------------------------------------------------------------ any object


@pytest.mark.parametrize("kind", ["data", "list", "function", "reader function", "data function"])
def test_anything_that_gives_batches_is_data(kind: str) -> None:
    batches: list[Feeds] = [{"x": SAMPLES}]

    class Reader:
        rest = iter(batches)

        def get_next(self) -> Feeds | None:
            return next(self.rest, None)

    sources: dict[str, Any] = {
        "data": CalibrationData(batches),
        "list": batches,
        "function": lambda: iter(batches),
        "reader function": Reader,
        "data function": lambda: CalibrationData(batches),
    }
    assert [feeds["x"] is SAMPLES for feeds in CalibrationData.of(sources[kind])] == [True]


# ------------------------------------------------------------------------------------- from words


def test_words_reach_the_data(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    IMAGE.save(pictures / "in.onnx")
    words = ["validate", *[str(pictures / "in.onnx")] * 2, "--rounds", "0", "--data", str(pictures)]
    assert cli.main([*words, "--image-mean", "0.5,0.5,0.5", "--image-std", "1", "--image-size", "8x6"]) == 0
    out, err = capsys.readouterr()
    assert "1 samples" in out
    assert "- (0.5, 0.5, 0.5)) / (1); guessed: scale" in err
    assert cli.main([*words, "--image-size", "4x4"]) == 5
    assert "has shape (1, 3, 4, 4), the model expects (N, 3, 8, 6)" in capsys.readouterr().err
    for word, value in (("--image-size", "4x4x4"), ("--image-mean", "a"), ("--image-size", "0")):
        assert cli.main([*words, word, value]) == 2
        assert "expected" in capsys.readouterr().err
    assert cli.main([*words[:-2], "--image-size", "4"]) == 2
    assert "--image-size says nothing without --data" in capsys.readouterr().err


def test_the_command_line_shows_inputs(classes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, sheet = classes / "m.onnx", classes / "cow" / "sheet.png"
    IMAGE.save(model)
    words = ["run", str(model), "-p", "slim", "--labels-from-folders", "--image-fit", "letterbox"]
    assert cli.main([*words, "--data", str(classes), "--show-inputs", str(sheet)]) == 0
    err = capsys.readouterr().err
    assert f"onnxslim: {sheet}: 3 inputs as the model gets them" in err
    assert "letterboxed" in err
    assert sheet.stat().st_size
    assert cli.main([*words[:4], "--show-inputs", str(sheet)]) == 2
    assert "--show-inputs says nothing without --data" in capsys.readouterr().err

from __future__ import annotations

import io
import pickle
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import joblib
import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import numpy_helper

from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.observers import Histogram
from onnxslim.calibration.sources.arrays import Feeds
from onnxslim.errors import CalibrationError
from onnxslim.ir.model import InputSpec

Array = NDArray[Any]
F32, I64 = np.dtype(np.float32), np.dtype(np.int64)


def batches(count: int = 5, size: int = 2) -> list[Feeds]:
    return [{"x": np.full((size, 3), at, np.float32)} for at in range(count)]


def firsts(data: CalibrationData) -> list[float]:
    """The first element of every batch: here its number."""
    return [float(next(iter(feeds.values())).flat[0]) for feeds in data]


def fails(text: str) -> Any:
    return pytest.raises(CalibrationError, match=text)


class Source:
    """Re-iterable without random access or a length."""

    def __iter__(self) -> Iterator[Feeds]:
        return iter(batches())


class Rewindable:
    """As in ONNX Runtime's examples."""

    def __init__(self, count: int = 5) -> None:
        self.items, self.at = batches(count), 0

    def get_next(self) -> Feeds | None:
        self.at += 1
        return self.items[self.at - 1] if self.at <= len(self.items) else None

    def rewind(self) -> None:
        self.at = 0


class OneShot:
    def __init__(self) -> None:
        self.rest = iter(batches())

    def get_next(self) -> Feeds | None:
        return next(self.rest, None)

    def __iter__(self) -> Iterator[Feeds]:
        return self.rest


class Map(Sequence[Feeds]):
    """A dataset that loads by index and counts how often."""

    def __init__(self) -> None:
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return 5

    def __getitem__(self, at: Any) -> Any:
        if at >= 5:
            raise IndexError
        self.loaded.append(at)
        return batches()[at]


def generate() -> Iterator[Feeds]:
    yield from batches()


SOURCES: dict[str, Callable[[], CalibrationData]] = {
    "list": lambda: CalibrationData(batches()),
    "tuple": lambda: CalibrationData(tuple(batches())),
    "iterable": lambda: CalibrationData(Source()),
    "sequence": lambda: CalibrationData(Map()),
    "nested": lambda: CalibrationData(CalibrationData(batches())),
    "callable": lambda: CalibrationData.from_callable(generate),
    "rewinding reader": lambda: CalibrationData.from_reader(Rewindable()),
    "plain reader": lambda: CalibrationData.from_reader(OneShot()),
    "reader class": lambda: CalibrationData.from_reader(Rewindable),
    "reader factory": lambda: CalibrationData.from_reader(lambda: OneShot()),
}
SIZED = ["list", "tuple", "sequence", "nested", "plain reader"]


@pytest.mark.parametrize("kind", SOURCES)
def test_every_pass_starts_anew(kind: str) -> None:
    data = SOURCES[kind]()
    data.check([InputSpec("x", F32)])
    assert firsts(data) == firsts(data) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("kind", SOURCES)
def test_length_is_known_or_a_type_error(kind: str) -> None:
    data = SOURCES[kind]()
    if kind in SIZED:
        assert len(data) == 5
    else:
        with pytest.raises(TypeError):
            len(data)
        assert len(list(data)) == 5


@pytest.mark.parametrize("kind", SOURCES)
def test_shards_share_out_the_batches(kind: str) -> None:
    data = SOURCES[kind]()
    assert [firsts(data.shard(at, 3)) for at in range(3)] == [[0, 3], [1, 4], [2]]
    assert [firsts(data.shard(at, 7)) for at in range(7)] == [[0], [1], [2], [3], [4], [], []]
    assert firsts(data.shard(0, 1)) == firsts(data)
    assert firsts(data.shard(1, 2).shard(0, 2)) == [1]
    for index, count in ((-1, 2), (2, 2), (0, 0)):
        with fails(f"no shard {index} of {count}"):
            data.shard(index, count)


@pytest.mark.parametrize(
    "kind", [kind for kind in SOURCES if kind not in ("reader factory", "rewinding reader")]
)
def test_shards_pickle(kind: str) -> None:
    for at in range(2):
        shard = SOURCES[kind]().shard(at, 2)
        list(shard)
        assert firsts(pickle.loads(pickle.dumps(shard))) == list(range(at, 5, 2))


def test_a_shard_carries_and_loads_only_its_own_batches() -> None:
    source = Map()
    assert firsts(CalibrationData(source).shard(1, 3)) == [1, 4]
    assert source.loaded == [1, 4]
    large = [{"x": np.zeros(100_000, np.float32)} for _ in range(10)]
    assert len(pickle.dumps(CalibrationData(large).shard(0, 10))) < 500_000


def test_empty_data() -> None:
    data = CalibrationData([], name="nothing")
    assert list(data) == list(data.shard(0, 2)) == []
    with fails("nothing: there is no data"):
        data.check([])


@pytest.mark.parametrize("kind", SOURCES)
def test_some_batches_of_every_source(kind: str) -> None:
    assert firsts(SOURCES[kind]().pick([1, 3])) == [1, 3]


@pytest.mark.parametrize(
    ("feeds", "text"),
    [
        (generate(), "generator can be read only once; pass a list of batches, or .*from_callable"),
        (map(dict, batches()), "map can be read only once"),
        (batches()[0], "a single batch: pass a list"),
        (OneShot(), "from_reader"),
        ("calib.npz", "from_npz"),
        (Path("calib"), "from_dir"),
        (7, "int cannot be iterated"),
        (None, "NoneType cannot be iterated"),
    ],
)
def test_sources_that_cannot_be_read_again_are_refused(feeds: Any, text: str) -> None:
    with fails(f"mine: .*{text}"):
        CalibrationData(feeds, name="mine")


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        (np.zeros(3), "mine: batch 1 is a ndarray, not a dict"),
        ({"x": [1.0, 2.0]}, "mine: batch 1: input 'x' is a list, not a numpy array"),
        ({"x": None}, "input 'x' is a NoneType"),
    ],
)
def test_batches_that_are_not_dicts_of_arrays_are_refused(batch: Any, text: str) -> None:
    with fails(text):
        list(CalibrationData([*batches(1), batch], name="mine"))


def test_from_callable_errors() -> None:
    once = generate()
    data = CalibrationData.from_callable(lambda: once)
    next(iter(data))
    with fails("the same iterator twice"):
        list(data)
    with fails("generator is not a function"):
        CalibrationData.from_callable(once)  # type: ignore[arg-type]


def test_reader_errors() -> None:
    with fails("list has no get_next"):
        CalibrationData.from_reader([])  # type: ignore[arg-type]
    data = CalibrationData.from_reader(Rewindable(), name="camera")
    first = iter(data)
    next(first)
    assert firsts(data) == [0, 1, 2, 3, 4]
    with fails("camera: rewound while it was being read"):
        next(first)


def save(path: Path, **arrays: Array) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def test_npz_is_cut_into_batches(tmp_path: Path) -> None:
    x, ids = np.arange(20, dtype=np.float32).reshape(10, 2), np.arange(10)
    path = save(tmp_path / "calib.npz", x=x, ids=ids, label=ids)
    data = CalibrationData.from_npz(path, batch_size=4, exclude=["label"])
    assert (len(data), data.name) == (3, str(path))
    assert [list(feeds) for feeds in data] == [["x", "ids"]] * 3
    np.testing.assert_array_equal(np.concatenate([feeds["x"] for feeds in data]), x)
    assert [len(feeds["ids"]) for feeds in data] == [4, 4, 2]
    np.savez_compressed(path, x=x)
    assert len(CalibrationData.from_npz(str(path))) == 2
    named = CalibrationData.from_npz(save(path, a=ids, label=ids), exclude="label")
    assert [list(feeds) for feeds in named] == [["a"]] * 2


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        (
            {"x": np.zeros((4, 2)), "y": np.zeros(5)},
            "first axis of every array must count the samples, got x: 4, y: 5",
        ),
        ({"x": np.zeros((4, 2)), "y": np.float32(1)}, "got x: 4, y: a scalar"),
        ({"x": np.zeros((0, 2))}, "no samples"),
        ({}, "no arrays"),
        ({"x": np.array([{}, None])}, "x.npy holds Python objects, which are never loaded"),
        ({"x": np.array([("a", 1)], dtype=[("é", "O"), ("n", "i4")])}, "x.npy"),
    ],
)
def test_npz_contents_that_are_refused(tmp_path: Path, arrays: dict[str, Array], text: str) -> None:
    path = save(tmp_path / "calib.npz", **arrays)
    with fails(f"calib.npz: .*{text}"):
        CalibrationData.from_npz(path)


def test_npz_batch_size_is_positive(tmp_path: Path) -> None:
    with fails("at least one sample, not 0"):
        CalibrationData.from_npz(save(tmp_path / "c.npz", x=np.zeros(3)), batch_size=0)


class Trap:
    """Touches a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_npz_never_unpickles(tmp_path: Path) -> None:
    array = np.empty(1, object)
    array[0] = Trap(tmp_path / "touched")
    with fails("Python objects"):
        CalibrationData.from_npz(save(tmp_path / "c.npz", x=array))
    # A header that denies the objects: the pickle is then read as the plain numbers it is not.
    content = (tmp_path / "c.npz").read_bytes()
    (tmp_path / "d.npz").write_bytes(content.replace(b"'|O'", b"'|V'"))
    with fails("d.npz"):
        CalibrationData.from_npz(tmp_path / "d.npz")
    assert not (tmp_path / "touched").exists()


def test_npz_files_that_cannot_be_read(tmp_path: Path) -> None:
    with fails("missing.npz: cannot be read: No such file"):
        CalibrationData.from_npz(tmp_path / "missing.npz")
    with fails("cannot be read: Is a directory"):
        CalibrationData.from_npz(tmp_path)
    (tmp_path / "text.npz").write_text("hello")
    with fails("text.npz: cannot be read: .*zip"):
        CalibrationData.from_npz(tmp_path / "text.npz")
    np.save(tmp_path / "one.npy", np.zeros(3))
    with fails("one.npy: .*has no input name; save it with numpy.savez"):
        CalibrationData.from_npz(tmp_path / "one.npy")
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("readme.txt", "hello there")
    with fails("other.npz: cannot be read"):
        CalibrationData.from_npz(tmp_path / "other.npz")
    with zipfile.ZipFile(tmp_path / "lzma.npz", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("x.npy", "hello there")
    with fails("x.npy is compressed in a way numpy does not use"):
        CalibrationData.from_npz(tmp_path / "lzma.npz")


def bomb(path: Path, shape: str) -> Path:
    """A few kilobytes that claim to be an array of that shape."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00v\x00" + header.encode() + bytes(1 << 20))
    return path


@pytest.mark.parametrize("shape", ["(1099511627776,)", "(1048576, 1048576)"])
def test_npz_bombs_are_refused_by_their_headers(tmp_path: Path, shape: str) -> None:
    with fails("bomb.npz: cannot be read: its arrays take 4398046511104 bytes unpacked, more than"):
        CalibrationData.from_npz(bomb(tmp_path / "bomb.npz", shape))


@pytest.mark.parametrize("shape", ["(2**40,)", "(-5,)", "(1.5,)", "3", "(1048577,)"])
def test_npz_headers_that_make_no_sense(tmp_path: Path, shape: str) -> None:
    with fails("bomb.npz: cannot be read: "):
        CalibrationData.from_npz(bomb(tmp_path / "bomb.npz", shape))


def test_npz_limit_counts_all_arrays(tmp_path: Path) -> None:
    path = save(tmp_path / "c.npz", x=np.zeros((10, 10)), y=np.zeros((10, 10)))
    assert len(CalibrationData.from_npz(path, max_bytes=1600)) == 2
    with fails("take 1600 bytes unpacked, more than 1599"):
        CalibrationData.from_npz(path, max_bytes=1599)


@settings(deadline=None)
@given(st.data())
def test_damaged_npz_is_a_calibration_error_or_fine(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, x=np.arange(50, dtype=np.float32), y=np.arange(50))
    content = bytearray(buffer.getvalue())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    for _ in range(data.draw(st.integers(0, 4))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.npz"
    path.write_bytes(content)
    failure = ""
    try:
        assert len(list(CalibrationData.from_npz(path))) > 0
    except CalibrationError as error:
        failure = str(error)
    assert not failure or "damaged.npz" in failure
    assert "\n" not in failure


def test_folder_of_npz_is_read_lazily_in_natural_order(tmp_path: Path) -> None:
    for at in (10, 2, 1):
        save(tmp_path / f"batch{at}.npz", x=np.full((at, 2), at, np.float32))
    (tmp_path / "notes.txt").write_text("not data")
    data = CalibrationData.from_dir(tmp_path)
    assert (len(data), firsts(data)) == (3, [1, 2, 10])
    (tmp_path / "batch10.npz").write_bytes(b"broken")
    shard = pickle.loads(pickle.dumps(data.shard(0, 2)))
    stream = iter(shard)
    assert next(stream)["x"].shape == (1, 2)
    with fails("batch10.npz: cannot be read"):
        next(stream)
    with fails("batch2.npz: .* more than 3"):
        list(CalibrationData.from_dir(tmp_path, max_bytes=3).shard(1, 2))


def write_tensor(path: Path, array: Array, name: str = "") -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(numpy_helper.from_array(array, name).SerializeToString())


def test_onnx_test_data_sets(tmp_path: Path) -> None:
    for number in (10, 2):
        folder = tmp_path / f"test_data_set_{number}"
        write_tensor(folder / "input_0.pb", np.full((1, 3), number, np.float32), "x")
        write_tensor(folder / "input_1.pb", np.array([number]))
        write_tensor(folder / "output_0.pb", np.zeros(1))
    data = CalibrationData.from_dir(tmp_path)
    assert [list(feeds) for feeds in data] == [["x", "#1"]] * 2
    assert firsts(data) == [2, 10]
    specs = [InputSpec("x", F32, ("N", 3)), InputSpec("ids", I64, (None,))]
    assert [list(feeds) for feeds in data.bind(specs)] == [["x", "ids"]] * 2
    data.check(specs)
    with fails("batch 0: the model has no input '#1'; known are: x"):
        data.check(specs[:1])
    single = CalibrationData.from_dir(tmp_path / "test_data_set_10")
    assert firsts(single) == [10]


def test_test_data_keeps_types_and_takes_eleventh_input_last(tmp_path: Path) -> None:
    arrays = [np.zeros(at + 1, np.float32).astype(ml_dtypes.bfloat16) for at in range(11)]
    for at, array in enumerate(arrays):
        write_tensor(tmp_path / f"input_{at}.pb", array)
    (feeds,) = CalibrationData.from_dir(tmp_path)
    assert list(feeds) == [f"#{at}" for at in range(11)]
    assert feeds["#10"].dtype == ml_dtypes.bfloat16
    assert feeds["#10"].shape == (11,)


def test_test_data_errors(tmp_path: Path) -> None:
    sets = tmp_path / "test_data_set_0"
    write_tensor(sets / "input_0.pb", np.zeros(1), "x")
    write_tensor(sets / "input_1.pb", np.zeros(1), "x")
    with fails("input_1.pb: another file of this set already has input 'x'"):
        list(CalibrationData.from_dir(tmp_path))
    (sets / "input_1.pb").write_bytes(b"\xff\xff not a tensor")
    with fails("input_1.pb: cannot be read"):
        list(CalibrationData.from_dir(tmp_path))
    (sets / "input_1.pb").write_bytes(onnx.TensorProto(dims=[1 << 40], data_type=1).SerializeToString())
    with fails("input_1.pb: cannot be read"):
        list(CalibrationData.from_dir(tmp_path))
    with fails("input_0.pb: cannot be read: larger than 3 bytes"):
        list(CalibrationData.from_dir(tmp_path, max_bytes=3))


def test_test_data_never_follows_external_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").write_bytes(bytes(range(16)))
    tensor = onnx.TensorProto(dims=[4], data_type=1, name="x")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="secret")
    (tmp_path / "input_0.pb").write_bytes(tensor.SerializeToString())
    monkeypatch.chdir(tmp_path)
    with fails("input_0.pb: cannot be read: its data is in another file"):
        list(CalibrationData.from_dir(tmp_path))


def test_folder_errors(tmp_path: Path) -> None:
    with fails("expected .npz files, .npy files or test_data_set_N/input_M.pb, found none"):
        CalibrationData.from_dir(tmp_path)
    with fails("absent: cannot be read: No such file"):
        CalibrationData.from_dir(tmp_path / "absent")
    save(tmp_path / "a.npz", x=np.zeros(1))
    write_tensor(tmp_path / "input_0.pb", np.zeros(1))
    with fails("found .npz files and test_data_set_N/input_M.pb"):
        CalibrationData.from_dir(tmp_path)


def write_images(folder: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    left = np.zeros((8, 16, 3), np.uint8)
    left[:, :4] = (255, 0, 0)
    left[:, 4:12] = (51, 102, 204)
    image.fromarray(left).save(folder / "img10.png")
    image.fromarray(np.full((8, 8), 255, np.uint8)).save(folder / "img2.PNG")
    image.fromarray(np.full((9, 9, 3), 128, np.uint8)).save(folder / "img1.jpg")


def test_images_are_cropped_scaled_and_normalized(tmp_path: Path) -> None:
    write_images(tmp_path)
    data = CalibrationData.from_images(
        tmp_path, input="x", size=(4, 4), mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3), batch_size=2
    )
    shapes = [feeds["x"].shape for feeds in data]
    assert (len(data), shapes) == (2, [(2, 3, 4, 4), (1, 3, 4, 4)])
    grey, white = next(iter(data))["x"]
    np.testing.assert_allclose(white[:, 1, 1], (np.ones(3) - [0.5, 0.4, 0.3]) / [0.1, 0.2, 0.3], rtol=1e-5)
    np.testing.assert_allclose(grey[0], (128 / 255 - 0.5) / 0.1, rtol=1e-4)
    centre = list(data)[1]["x"][0]
    expected = (np.array([0.2, 0.4, 0.8]) - [0.5, 0.4, 0.3]) / [0.1, 0.2, 0.3]
    # The filter reaches over the edge of the crop, the inner columns are of one colour.
    np.testing.assert_allclose(centre[:, 2, 1:3], np.stack([expected] * 2, axis=1), atol=1e-5)
    assert centre.dtype == np.float32
    assert pickle.loads(pickle.dumps(data.shard(1, 2))).shard(0, 1)._length() == 1


def test_images_as_bytes_with_channels_last(tmp_path: Path) -> None:
    write_images(tmp_path)
    data = CalibrationData.from_images(tmp_path, input="x", size=4, layout="NHWC", scale=1, dtype=np.uint8)
    (feeds,) = data
    assert feeds["x"].shape == (3, 4, 4, 3)
    assert feeds["x"].dtype == np.uint8
    assert feeds["x"][2, 2, 2].tolist() == [51, 102, 204]


def test_images_keep_height_and_width_apart(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    image.fromarray(pixels).save(tmp_path / "a.png")
    (feeds,) = CalibrationData.from_images(tmp_path, input="x", size=(4, 6), scale=1)
    np.testing.assert_array_equal(feeds["x"], pixels.transpose(2, 0, 1)[None])


def test_images_are_made_to_fit(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    wide = np.zeros((4, 8, 3), np.uint8)
    wide[:, :2] = wide[:, 6:] = (200, 100, 0)
    image.fromarray(wide).save(tmp_path / "a.png")

    def fed(fit: str, **more: Any) -> Array:
        data = CalibrationData.from_images(tmp_path, input="x", size=8, scale=1, fit=fit, **more)
        return np.asarray(next(iter(data))["x"][0])

    box, crop, stretch = (fed(fit) for fit in ("letterbox", "crop", "stretch"))
    assert (box[:, :2] == 114).all()
    assert (box[:, 6:] == 114).all()
    np.testing.assert_array_equal(box[:, 2:6], wide.transpose(2, 0, 1))
    assert crop[:, :, 2:6].max() < 100
    assert stretch[:, 0, 0].tolist() == [200, 100, 0]
    mean, std = (1.0, 2.0, 3.0), (2.0, 4.0, 8.0)
    swapped = fed("stretch", order="BGR", mean=mean, std=std)
    np.testing.assert_array_equal(swapped, fed("stretch", mean=mean, std=std)[::-1])
    assert swapped[:, 0, 0].tolist() == [-3 / 8, 98 / 4, 199 / 2]
    with fails("made to fit by crop, letterbox, stretch, not by 'zoom'"):
        fed("zoom")
    with fails("the order of 1 channels is not 'BGR'"):
        fed("crop", order="BGR", channels=1)


def test_image_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = pytest.importorskip("PIL.Image")
    with fails("no images"):
        CalibrationData.from_images(tmp_path, input="x", size=4)
    write_images(tmp_path)
    with fails("layout 'CHW' is neither"):
        CalibrationData.from_images(tmp_path, input="x", size=4, layout="CHW")
    data = CalibrationData.from_images(tmp_path, input="x", size=4)
    content = (tmp_path / "img10.png").read_bytes()
    (tmp_path / "img10.png").write_bytes(content[: len(content) // 2])
    with fails("img10.png: cannot be read"):
        list(data)
    (tmp_path / "img10.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n")
    with fails("img10.png: cannot be read: cannot identify"):
        list(data)
    (tmp_path / "img10.png").write_bytes(content)
    monkeypatch.setattr("onnxslim.calibration.sources.images.MAX_PIXELS", 100)
    with fails("img10.png: cannot be read: 16 x 8 pixels are too many"):
        list(data)
    monkeypatch.setattr(image, "MAX_IMAGE_PIXELS", 100)
    with fails("img10.png: cannot be read: Image size"):
        list(data)


def test_images_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with fails("needs Pillow"):
        CalibrationData.from_images(tmp_path, input="x", size=4)


RANDOM: list[tuple[str, Sequence[int | str | None], Any]] = [
    ("x", ("N", 3, None), np.float32),
    ("h", (2,), np.float16),
    ("b", (50,), ml_dtypes.bfloat16),
    ("ids", (50,), np.int64),
    ("pixels", (500,), np.uint8),
    ("mask", (50,), np.bool_),
]


def test_random_data_warns_and_repeats() -> None:
    with pytest.warns(UserWarning, match="not for calibration") as caught:
        data = CalibrationData.random(RANDOM, samples=3, seed=1)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same, other = (
            CalibrationData.random(RANDOM, samples=3, seed=1),
            CalibrationData.random(RANDOM, seed=2),
        )
    assert (len(data), len(other)) == (3, 8)
    one, two, _ = data
    for name, _, dtype in RANDOM:
        assert one[name].dtype == dtype
        np.testing.assert_array_equal(one[name], next(iter(same))[name])
    assert one["x"].shape == (1, 3, 1)
    for different in (two, next(iter(other))):
        assert (one["x"] != different["x"]).all()
    assert set(one["ids"].tolist()) == {0, 1}
    assert one["pixels"].max() > 200
    assert set(one["mask"].tolist()) == {False, True}


def test_random_data_of_other_types_is_refused() -> None:
    with fails("input 's': no random values for type"):
        CalibrationData.random([("s", (1,), np.str_)])


SPECS = [
    InputSpec("images", F32, ("N", 3, 8, 8)),
    InputSpec("ids", I64, (None,)),
    InputSpec("scale", F32, required=False),
    InputSpec("text", np.dtype(object), None, required=False),
]
GOOD: dict[str, Array] = {"images": np.zeros((2, 3, 8, 8), np.float32), "ids": np.zeros(2, np.int64)}


def test_check_accepts_what_the_model_takes() -> None:
    CalibrationData([GOOD]).check(SPECS)
    CalibrationData([{**GOOD, "scale": np.zeros((), np.float32), "text": np.array(["a"])}]).check(SPECS)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"imagse": GOOD["images"]}, "the model has no input 'imagse'; did you mean 'images'"),
        ({"zzz": GOOD["images"]}, "the model has no input 'zzz'; known are: images, ids, scale, text"),
        ({"ids": None}, "input 'ids' is missing; given: images"),
        ({"ids": None, "images": None}, "input 'images' is missing; given: none"),
        ({"ids": np.zeros(2, np.int32)}, "input 'ids' is int32, the model expects int64; convert it"),
        (
            {"images": GOOD["images"].astype(np.float64)},
            "input 'images' is float64, the model expects float32",
        ),
        ({"images": GOOD["images"].astype(np.uint8)}, "input 'images' is uint8, the model expects float32"),
        ({"images": GOOD["images"][0]}, r"has shape \(3, 8, 8\), the model expects \(N, 3, 8, 8\)$"),
        ({"images": GOOD["images"][:, :1]}, r"has shape \(2, 1, 8, 8\), the model expects \(N, 3, 8, 8\)$"),
        ({"ids": np.zeros((2, 2), np.int64)}, r"has shape \(2, 2\), the model expects \(\?\)$"),
        ({"text": np.zeros(2)}, "input 'text' is float64, the model expects object"),
    ],
)
def test_check_names_the_input_and_both_sides(change: Mapping[str, Array | None], text: str) -> None:
    feeds = {name: array for name, array in {**GOOD, **change}.items() if array is not None}
    with fails(f"^my data: batch 0: .*{text}"):
        CalibrationData([feeds], name="my data").check(SPECS)


def test_check_suggests_the_batch_size() -> None:
    spec = InputSpec("x", F32, (1, 3))
    with fails(r"shape \(2, 3\), the model expects \(1, 3\); use batches of 1"):
        CalibrationData(batches()).check([spec])


def test_bind_checks_every_batch_and_survives_views() -> None:
    bad = [*batches(3), {"y": np.zeros(1)}]
    data = CalibrationData(bad, name="d").bind([InputSpec("x", F32)])
    data.check([InputSpec("x", F32)])
    with fails("d: batch 3: the model has no input 'y'"):
        list(data)
    assert len(data) == 4
    with fails("d: batch 1: the model has no input 'y'"):
        list(pickle.loads(pickle.dumps(data.shard(1, 2))))
    assert firsts(data.pick([0, 1, 3]).shard(1, 2)) == [1]


def observe(data: CalibrationData) -> Histogram:
    histogram = Histogram()
    for feeds in data:
        histogram.update(feeds["x"])
    return histogram


@pytest.mark.parametrize("count", [1, 3])
def test_shards_of_a_file_observe_the_same_as_one_pass(tmp_path: Path, count: int) -> None:
    x = np.random.default_rng(0).standard_normal((40, 100)).astype(np.float32)
    data = CalibrationData.from_npz(save(tmp_path / "c.npz", x=x), batch_size=3)
    jobs = (joblib.delayed(observe)(data.shard(at, count)) for at in range(count))
    total = Histogram()
    for shard in joblib.Parallel(n_jobs=2, backend="threading")(jobs):
        total.merge(shard)
    assert pickle.dumps(vars(total)) == pickle.dumps(vars(observe(data)))

"""The safetensors header, against the safetensors library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from zimage_mxfp8.checkpoint.header import TensorInfo, layout_header, read_header
from zimage_mxfp8.errors import CheckpointError

TORCH_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
    "BOOL": torch.bool,
}

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
tensors = st.dictionaries(
    names, st.tuples(st.sampled_from(sorted(TORCH_DTYPES)), shapes), max_size=8
)
one_entry = st.one_of(st.just({}), st.dictionaries(names, st.text(max_size=8), max_size=1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("headers")


def zeros(dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    made = torch.zeros(shape, dtype=torch.uint8 if dtype.startswith("F8") else TORCH_DTYPES[dtype])
    return made.view(TORCH_DTYPES[dtype])


@settings(max_examples=200, deadline=None)
@given(tensors=tensors, metadata=one_entry)
def test_layout_and_parsing_equal_the_library(
    folder: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]
) -> None:
    path = folder / "library.safetensors"
    save_file({n: zeros(*spec) for n, spec in tensors.items()}, path, metadata=metadata or None)
    header, places = layout_header(tensors, metadata)
    size = max((info.end for info in places.values()), default=len(header))
    content = path.read_bytes()
    if tensors:  # the library writes "__metadata__":null for an empty file
        assert content[: len(header)] == header
        assert len(content) == size
    parsed = read_header(path)
    assert {n: (i.dtype, i.shape) for n, i in parsed.tensors.items()} == tensors
    assert parsed.metadata == metadata
    if tensors:
        assert parsed.tensors == places


def file_with(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str = "BF16", shape: object = (2,), offsets: object = (0, 4)) -> object:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


# name -> (header, data, length prefix, part of the sentence)
MALFORMED: dict[str, tuple[object, bytes, int | None, str]] = {
    "header longer than the file": ({}, b"", 10**6, "truncated or not a safetensors file"),
    "absurd header length": ({}, b"", 2**63, "is not a safetensors file"),
    "not JSON": (b"{not json", b"", None, "not JSON"),
    "not UTF-8": (b'{"\xff": 1}', b"", None, "not JSON"),
    "NaN": (b'{"__metadata__": {"a": NaN}}', b"", None, "not JSON"),
    "deep nesting": (b"[" * 100_000, b"", None, "not JSON"),
    "huge number": (b'{"a":' + b"9" * 5000 + b"}", b"", None, "not JSON"),
    "not an object": ([1], b"", None, "not a JSON object"),
    "duplicate name": (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
        b"12",
        None,
        'the name "a" twice',
    ),
    "metadata not strings": ({"__metadata__": {"a": 1}}, b"", None, "__metadata__"),
    "metadata a list": ({"__metadata__": []}, b"", None, "__metadata__"),
    "entry not an object": ({"a": 3}, b"", None, '"a" without exactly'),
    "missing field": ({"a": {"dtype": "U8", "shape": [1]}}, b"1", None, '"a" without exactly'),
    "extra field": (
        {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1], "x": 1}},
        b"1",
        None,
        '"a" without exactly',
    ),
    "unknown dtype": ({"a": entry("Q4_0")}, b"1234", None, 'tensor "a" the unknown dtype "Q4_0"'),
    "dtype not text": ({"a": entry(["BF16"])}, b"1234", None, "unknown dtype"),  # type: ignore[arg-type]
    "negative size": ({"a": entry(shape=[-2])}, b"1234", None, 'tensor "a" a shape'),
    "size not a number": ({"a": entry(shape=["2"])}, b"1234", None, 'tensor "a" a shape'),
    "size a bool": ({"a": entry("U8", [True], [0, 1])}, b"1", None, 'tensor "a" a shape'),
    "size a fraction": ({"a": entry(shape=[2.0])}, b"1234", None, 'tensor "a" a shape'),
    "absurd size": ({"a": entry(shape=[10**4000] * 2)}, b"1234", None, 'tensor "a" a shape'),
    "absurd product": ({"a": entry(shape=[2**62] * 999)}, b"1234", None, "more than a file"),
    "half a byte": ({"a": entry("F4", [9])}, b"1234", None, "F4 [9] needs 4.5"),
    "half a character": (b'{"\\ud800": {}}', b"", None, "half a surrogate pair"),
    "offsets reversed": ({"a": entry(offsets=[4, 0])}, b"1234", None, "data_offsets"),
    "offsets negative": ({"a": entry(offsets=[-4, 0])}, b"1234", None, "data_offsets"),
    "three offsets": ({"a": entry(offsets=[0, 2, 4])}, b"1234", None, "data_offsets"),
    "shape disagrees": ({"a": entry(shape=[3])}, b"1234", None, "BF16 [3] needs 6"),
    "huge shape": ({"a": entry(shape=[2**62, 2**62])}, b"1234", None, 'tensor "a" 4 bytes'),
    "overlap": (
        {"a": entry(), "b": entry(offsets=[2, 6])},
        b"123456",
        None,
        'overlap: "a" and "b"',
    ),
    "hole": ({"a": entry(), "b": entry(offsets=[6, 10])}, b"0123456789", None, 'before tensor "b"'),
    "hole at the start": ({"a": entry(offsets=[2, 6])}, b"123456", None, 'before tensor "a"'),
    "past the end": ({"a": entry()}, b"12", None, 'truncated: tensor "a" ends at'),
    "bytes behind": ({"a": entry()}, b"12345678", None, "4 bytes after its last tensor"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_get_one_sentence(tmp_path: Path, case: str) -> None:
    header, data, length, sentence = MALFORMED[case]
    path = file_with(tmp_path / "bad.safetensors", header, data, length)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert sentence in str(caught.value)
    assert str(caught.value).endswith("; download or export it again")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "only 0 bytes"),
        (b"1234567", "only 7 bytes"),
        (b"PK\3\4 and so on .....", "it does not begin with a header's size"),
        (b"\0\0\1\0\0\0\0\0{", "truncated or .* its header should have 65,536 bytes, .* has 9"),
    ],
)
def test_other_files(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=sentence):
        read_header(path)


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        read_header(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="is not a regular file"):
        read_header(tmp_path)


def test_header_that_would_be_too_large() -> None:
    with pytest.raises(CheckpointError, match="the format allows 100 MB; take metadata out"):
        layout_header({"x" * 100_000_001: ("U8", (1,))}, {})


@settings(
    max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_files_are_refused_or_read_as_the_library_reads_them(
    folder: Path, data: st.DataObject
) -> None:
    header, places = layout_header(
        {"a.weight": ("BF16", (2, 3)), "b": ("U8", (5,)), "c": ("F32", ())}, {"k": "v"}
    )
    content = bytearray(header + bytes(max(info.end for info in places.values()) - len(header)))
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(header) - 1))
        content[position] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    path = folder / "damaged.safetensors"
    path.write_bytes(content)
    try:
        parsed = read_header(path)
    except CheckpointError:
        return  # being stricter than the library is fine
    with safetensors.safe_open(path, framework="pt") as opened:
        assert set(opened.keys()) == set(parsed.tensors)
        for name, info in parsed.tensors.items():
            assert isinstance(info, TensorInfo)
            assert tuple(opened.get_slice(name).get_shape()) == info.shape
            assert opened.get_slice(name).get_dtype() == info.dtype

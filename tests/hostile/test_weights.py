"""Weights files: safetensors, whose header anyone can write, and both formats of torch.save."""

import json
import pickletools
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
from etils import epath
from harness import Case, Refusal, attempt
from test_json_files import changed_tree

from guided_distill.formats import diffusers_folder
from guided_distill.formats.torch_file import read_state_dict
from guided_distill.formats.torch_layout import to_tensors, to_tree

PARITY = Path(__file__).parents[1] / "parity"

DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "C64": np.dtype("<c8"),
}
"""From the format's description: https://huggingface.co/docs/safetensors."""

TREE = {"conv": {"kernel": np.arange(24, dtype=np.float32).reshape(1, 1, 4, 6), "bias": np.ones(6)}}
TENSORS = {name: np.float32(each) for name, each in to_tensors(TREE).items()}


def safetensors_of(tensors, dtype="F32"):
    """Return a file's header as an object, and its data."""
    header, data = {}, b""
    for name, each in tensors.items():
        body = each.astype(DTYPES[dtype]).tobytes()
        place = [len(data), len(data) + len(body)]
        header[name] = {"dtype": dtype, "shape": list(each.shape), "data_offsets": place}
        data += body
    return header, data


def joined(header, data, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", (len(text) if length is None else length) % 2**64) + text + data


def read_again(content):
    """Return the tensors of a safetensors file, parsed after the format's description."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    return {
        name: np.frombuffer(data[slice(*each["data_offsets"])], DTYPES[each["dtype"]]).reshape(
            each["shape"]
        )
        for name, each in header.items()
        if name != "__metadata__"
    }


def header_value(case):
    """A header with another dtype, shape, offset or name."""
    header, data = safetensors_of(TENSORS)
    if case.rng.random() < 0.3:
        name = case.rng.choice(sorted(header))
        header[name]["dtype"] = case.rng.choice((*DTYPES, "F4", "f32", "F8_E8M0", ""))
        if case.rng.random() < 0.5:
            header[name]["shape"] = case.rng.choice(
                ([], [0], [6, 1], [-1], [2**62, 4], [2**64], [3, 2])
            )
    else:
        header = changed_tree(case.rng, header)
    return joined(header, data)


def header_length(case):
    """A header with a wrong length, or something that isn't a header."""
    header, data = safetensors_of(TENSORS)
    length = case.rng.choice((0, 1, -1, 7, 2**31, 2**40, 2**63, 10**8 + 1, None))
    text = case.rng.choice(
        (header, b"", b"[]", b"null", b"\xff" * 9, b'{"a":' * 10**5, b"[" * 10**5, b" {}")
    )
    return joined(text, case.rng.choice((data, b"", data * 2, data[:-1])), length)


def other_precision(case):
    """Valid files with every dtype of the format."""
    return joined(*safetensors_of(TENSORS, case.rng.choice(sorted(DTYPES))))


def cut(case):
    content = joined(*safetensors_of(TENSORS))
    return content[: case.rng.randrange(len(content))]


def flipped(case):
    return flip(case, joined(*safetensors_of(TENSORS)))


def flip(case, content, count=3):
    """Return the content with up to `count` bytes changed."""
    changed = bytearray(content)
    for _ in range(case.rng.randrange(1, count + 1)):
        changed[case.rng.randrange(len(changed))] = case.rng.randrange(256)
    return bytes(changed)


def torch_zip(case):
    return torch_file(case, (PARITY / "tensors_zip.pth").read_bytes())


def torch_legacy(case):
    return torch_file(case, (PARITY / "tensors_legacy.pth").read_bytes())


def torch_file(case, content):
    """Return a file of torch.save with bytes flipped, truncated, or with changed pickle instructions."""
    draw = case.rng.random()
    if draw < 0.3:
        return flip(case, content)
    if draw < 0.4:
        return content[: case.rng.randrange(len(content))]
    start = content.index(b"\x80\x02")
    operations = bytes(ord(each.code) for each in pickletools.opcodes)
    changed = bytearray(content)
    for _ in range(case.rng.choice((1, 2, 5))):
        # The pickle comes first in both formats.
        place = min(start + case.rng.randrange(1500), len(changed) - 1)
        changed[place] = case.rng.choice((*operations, case.rng.randrange(256)))
    return bytes(changed)


SAFETENSORS = {
    each.__name__: each for each in (header_value, header_length, other_precision, cut, flipped)
}
TORCH = {each.__name__: each for each in (torch_zip, torch_legacy)}


def test_weights(case: Case) -> None:
    make = case.kind(SAFETENSORS | TORCH)
    content = make(case)
    path = epath.Path(case.folder / f"weights.{'pth' if make in TORCH.values() else 'safetensors'}")
    path.write_bytes(content)
    print(content[:300])
    check(read_state_dict, path, content)
    if make in SAFETENSORS.values():
        check(diffusers_folder.read_weights_file, path, content)


def check(read, path, content):
    """Assert that only numeric arrays no larger than the file are read, and correctly if safetensors."""
    found = attempt(lambda: read(path))
    if isinstance(found, Refusal):
        return
    assert all(isinstance(each, np.ndarray) and each.dtype.kind != "O" for each in found.values())
    assert sum(each.nbytes for each in found.values()) <= 10 * len(content)
    if path.suffix == ".pth":
        return
    expected = read_again(content)
    assert found.keys() == expected.keys()
    for name, each in found.items():
        assert each.shape == expected[name].shape
        np.testing.assert_array_equal(each.astype(expected[name].dtype), expected[name])
    tree = attempt(lambda: to_tree(found, TREE, source=path))
    if not isinstance(tree, Refusal):
        kernel = expected["conv.weight"].astype(np.float32).transpose(2, 3, 1, 0)
        np.testing.assert_array_equal(tree["conv"]["kernel"], kernel)

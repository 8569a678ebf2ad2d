"""safetensors: every kind of number, the tensors that are wanted, and what the library writes."""

import json
import struct

import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from guided_distill.errors import UserError
from guided_distill.formats.diffusers_folder import WEIGHTS, read_weights
from guided_distill.formats.safetensors_file import read_safetensors
from guided_distill.formats.torch_layout import to_tree

# By hand from the formats: sign, exponent (bias 7, 15, 127, 8, 16), mantissa.
KINDS = {
    "F8_E4M3": (b"\x38\xc0\x7e", [1, -2, 448]),
    "F8_E5M2": (b"\x3c\xc0\x7b", [1, -2, 57344]),
    "F8_E4M3FNUZ": (b"\x40\xc8\x7f", [1, -2, 240]),
    "F8_E5M2FNUZ": (b"\x40\xc4\x7f", [1, -2, 57344]),
    "F8_E8M0": (b"\x7f\x80\x7e", [1, 2, 0.5]),
    "BF16": (b"\x80\x3f\x00\xc0\x40\x40", [1, -2, 3]),
    "F16": (b"\x00\x3c\x00\xc0\xff\x7b", [1, -2, 65504]),
    "F32": (struct.pack("<3f", 1, -2, 3), [1, -2, 3]),
    "F64": (struct.pack("<3d", 1, -2, 3), [1, -2, 3]),
}


def write(path, kind, data):
    header = {"dense.bias": {"dtype": kind, "shape": [3], "data_offsets": [0, len(data)]}}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_every_precision_become_float32(tmp_path, kind):
    data, expected = KINDS[kind]
    write(tmp_path / f"{WEIGHTS}.safetensors", kind, data)
    tensors = read_weights(epath.Path(tmp_path), WEIGHTS)
    bias = to_tree(tensors, {"dense": {"bias": np.zeros(3)}}, source="a")["dense"]["bias"]
    assert bias.dtype == np.float32
    np.testing.assert_array_equal(bias, expected)


@pytest.mark.parametrize("kind", ["F4", "F6_E2M3", "I2"])
def test_a_kind_that_numpy_lacks_is_one_sentence(tmp_path, kind):
    write(tmp_path / "a.safetensors", kind, b"\x00\x00\x00")
    with pytest.raises(UserError, match=rf"'dense\.bias' has the unknown dtype '{kind}'"):
        read_safetensors(epath.Path(tmp_path / "a.safetensors"))


def test_what_the_library_writes_is_read(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "matrix": rng.standard_normal((3, 5)).astype(np.float32),
        "empty": np.zeros((0, 4)),
        "number": np.array(7),
        "truths": np.array([True, False]),
        "complex": np.array([1 + 2j], np.complex64),
        **{
            f"{kind}{bits}": rng.integers(0, 99, 3).astype(f"{kind}{bits}")
            for kind in ("int", "uint")
            for bits in (8, 16, 32, 64)
        },
    }
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    found = read_safetensors(epath.Path(path))
    assert found.keys() == tensors.keys()
    for name, expected in tensors.items():
        assert (found[name].dtype, found[name].shape) == (expected.dtype, expected.shape)
        np.testing.assert_array_equal(found[name], expected)
    some = read_safetensors(epath.Path(path), lambda name: name.startswith("int"))
    assert some.keys() == {"int8", "int16", "int32", "int64"}

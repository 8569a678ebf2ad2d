"""Weights files: those of torch are read, and those that could run code are refused."""

import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from guided_distill.errors import UserError
from guided_distill.evaluation.extractors import lite0
from guided_distill.evaluation.extractors.pretrained import tensor_shapes
from guided_distill.formats.torch_file import read_state_dict

FILES = Path(__file__).parents[1] / "parity"


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype, name
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_both_formats_of_torch(kind):
    found = read_state_dict(epath.Path(FILES / f"tensors_{kind}.pth"))
    whole = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert found["brain"].dtype == "bfloat16"
    found["brain"] = found["brain"].astype(np.float32)
    assert_same_tensors(
        found,
        {
            "whole": whole,
            "turned_part": whole[1:, 1:3].T,
            "parameter": np.array([1.5, -2], np.float32),
            "half": np.array([0.5], np.float16),
            "brain": np.array([3, 0.25], np.float32),
            "double": np.array([1e-300]),
            "count": np.array(7),
        },
    )


def test_safetensors(tmp_path):
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([1, 2])}
    file = tmp_path / "weights.safetensors"
    safetensors.numpy.save_file(tensors, file)
    assert_same_tensors(read_state_dict(epath.Path(file)), tensors)


class Touch:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def zipped(content):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(content, protocol=2))
    return data.getvalue()


def streamed(content):
    parts = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, content, []]
    return b"".join(pickle.dumps(part, protocol=2) for part in parts)


@pytest.mark.parametrize("write", [zipped, streamed, pickle.dumps])
def test_a_pickle_that_runs_a_command_is_refused(tmp_path, write):
    file, touched = tmp_path / "weights.pth", tmp_path / "touched"
    file.write_bytes(write({"a": Touch(touched)}))
    with pytest.raises(UserError, match=r"more than tensors \(it requests 'posix\.system'\)"):
        read_state_dict(epath.Path(file))
    assert not touched.exists()


@pytest.mark.parametrize("write", [zipped, streamed])
@pytest.mark.parametrize(
    ("content", "said"),
    [([1, 2], "a list instead of a dictionary"), ({"epoch": 3}, "'epoch' is a int")],
)
def test_anything_but_tensors_is_refused(tmp_path, write, content, said):
    file = tmp_path / "weights.pth"
    file.write_bytes(write(content))
    with pytest.raises(UserError, match=said):
        read_state_dict(epath.Path(file))


@pytest.mark.parametrize("name", ["tensors_zip.pth", "tensors_legacy.pth", "a.safetensors"])
@pytest.mark.parametrize("cut", [0, 60, -40])
def test_a_damaged_file_is_one_sentence(tmp_path, name, cut):
    file = tmp_path / name
    if name.endswith("pth"):
        whole = (FILES / name).read_bytes()
    else:
        whole = safetensors.numpy.save({"a": np.zeros(20)})
    file.write_bytes(whole[:cut])
    with pytest.raises(UserError, match="check that the file is complete"):
        read_state_dict(epath.Path(file))


def write_lite0(file, **changes):
    shapes = tensor_shapes(lite0.param_shapes(), lite0.source) | changes
    tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items() if shape}
    safetensors.numpy.save_file(tensors, file)
    return epath.Path(file)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"_blocks.4._depthwise_conv.weight": (144, 1, 5, 5)},
            r"holds _blocks\.4\._depthwise_conv\.weight of shape \(144, 1, 5, 5\), which should be "
            r"\(240, 1, 5, 5\)",
        ),
        (
            {"_conv_head.weight": ()},
            r"has no tensor _conv_head\.weight, which should be \(1280, 320, 1, 1\)",
        ),
        ({"_blocks.16._bn0.bias": (7,)}, r"'_blocks\.16\._bn0\.bias' of shape \(7,\), which this"),
    ],
    ids=["mismatched", "missing", "unexpected"],
)
def test_weights_of_another_network_name_a_tensor(tmp_path, changes, said):
    file = write_lite0(tmp_path / "weights.safetensors", **changes)
    with pytest.raises(UserError, match=said):
        lite0.lite0_params(file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="no weights file"):
        read_state_dict(epath.Path(tmp_path / "nothing.pth"))


@pytest.mark.parametrize("name", ["pipe.pth", "pipe.safetensors"])
def test_a_pipe_is_no_weights_file(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="there is no weights file"):
        read_state_dict(epath.Path(tmp_path / name))

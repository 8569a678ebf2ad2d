import functools
import gzip
import hashlib
import struct

import numpy as np
import pytest
from etils import epath

from guided_distill import cli
from guided_distill.data import sources
from guided_distill.data.pixels import to_uint8
from guided_distill.errors import UserError
from guided_distill.prepare import fashion_mnist
from guided_distill.prepare.fashion_mnist import FILES, Pinned, prepare_fashion_mnist, read_idx

# The modification time is fixed, because parametrized tests need the same names in every process.
compressed = functools.partial(gzip.compress, mtime=0)


def idx(array):
    """The content of an IDX file of unsigned bytes, as MNIST's page describes it."""
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Tiny files instead of the pinned ones: 20 and 10 images of 2 x 2."""
    pinned = {}
    for split, count in (("train", 20), ("test", 10)):
        arrays = np.arange(count * 4).reshape(count, 2, 2), np.arange(count) % 10
        pinned[split] = []
        for (name, _), array in zip(FILES[split], arrays, strict=True):
            content = gzip.compress(idx(array))
            (tmp_path / name).write_bytes(content)
            pinned[split].append(Pinned(name, hashlib.sha256(content).hexdigest()))
    monkeypatch.setattr(fashion_mnist, "FILES", pinned)
    return tmp_path


def test_the_source_reads_what_the_command_writes(folder, tmp_path, capsys):
    command = ["prepare", "fashion_mnist", "--from", str(folder), "--out", str(tmp_path / "data")]
    assert cli.main(command) == 0
    assert str(tmp_path / "data" / "fashion_mnist_train.npz") in capsys.readouterr().out
    with np.load(tmp_path / "data" / "fashion_mnist_test.npz") as file:
        kinds = {name: (file[name].dtype.kind, file[name].shape) for name in file}
    assert kinds == {
        "image": ("u", (10, 2, 2)),
        "label": ("i", (10,)),
        "class_names": ("U", (10,)),
    }
    for split, count in (("train", 20), ("test", 10)):
        source = sources.load_source(
            f"npz:{tmp_path}/data/fashion_mnist_{{split}}.npz", split=split
        )
        images, labels = source.arrays().values()
        np.testing.assert_array_equal(to_uint8(images).ravel(), np.arange(count * 4))
        np.testing.assert_array_equal(labels, np.arange(count) % 10)
        assert source.class_names[9] == "Ankle boot"


def test_missing_and_altered_files_are_named(folder, tmp_path, capsys):
    out = tmp_path / "data"
    labels = folder / FILES["test"][1].name
    labels.write_bytes(labels.read_bytes() + b"x")
    command = ["prepare", "fashion_mnist", "--from", str(folder), "--out", str(out)]
    assert cli.main(command) == 2
    assert "t10k-labels-idx1-ubyte.gz is not the pinned file" in capsys.readouterr().err
    labels.unlink()
    with pytest.raises(
        UserError, match=r"t10k-labels.* is missing: install .*dataset-fashion-mnist"
    ):
        prepare_fashion_mnist(epath.Path(out), epath.Path(folder))
    assert not out.exists()


IMAGES = idx(np.zeros((3, 2, 2)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (compressed(IMAGES[:-1]), "fewer than the 12 bytes"),
        (compressed(IMAGES + b"x"), "more than the 12 bytes"),
        (compressed(IMAGES[:9]), "ends within its header"),
        (compressed(b"\0\0\x0d" + IMAGES[3:]), "doesn't begin like"),
        (compressed(struct.pack(">HBBII", 0, 8, 2, 2**31, 2**31)), "which is too large"),
        (compressed(IMAGES)[:-9], "can't be read as an IDX file"),
        (b"no gzip", "can't be read as an IDX file"),
        (b"", "doesn't begin like"),
    ],
)
def test_damaged_files_are_refused(tmp_path, content, message):
    path = epath.Path(tmp_path / "a.gz")
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.gz can't be read as an IDX file") as refused:
        read_idx(path)
    assert message in str(refused.value)

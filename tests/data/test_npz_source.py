import collections
import io
import os
import zipfile

import numpy as np
import pytest
from PIL import Image

from guided_distill.data import fields, npz, sources
from guided_distill.data.pixels import from_uint8, to_uint8
from guided_distill.errors import UserError


def pixels(count, *, size=4, channels=3, start=0):
    """Images in which every value is the image's index, counted from `start`."""
    index = np.arange(start, start + count, dtype=np.uint8)
    return np.broadcast_to(index[:, None, None, None], (count, size, size, channels))


def both_splits(name):
    return [sources.load_source(name, split=split) for split in sources.SPLITS]


@pytest.fixture
def save(tmp_path):
    def save(**fields):
        path = tmp_path / "images.npz"
        np.savez(path, **fields)
        return f"npz:{path}"

    return save


def test_a_tenth_is_held_out_and_labels_stay_with_their_images(save):
    name = save(image=pixels(50), label=np.arange(50) % 7)
    parts = {split: sources.load_source(name, split=split) for split in ("train", "test")}
    assert (len(parts["train"]), len(parts["test"])) == (45, 5)
    seen = []
    for source in parts.values():
        images, labels = source.arrays().values()
        index = to_uint8(images)[:, 0, 0, 0]
        np.testing.assert_array_equal(labels, index % 7)
        seen += list(index)
        assert source.shape == (4, 4, 3)
        assert source.num_classes == 7
    assert sorted(seen) == list(range(50))


def test_own_test_arrays_and_names_are_used_as_they_are(save):
    name = save(
        images=pixels(6),
        labels=np.zeros(6, np.uint8),
        test_images=pixels(3, start=100),
        test_labels=np.array([1, 0, 2]),
        class_names=np.array(["ant", "bee", "cow"]),
    )
    assert len(sources.load_source(name)) == 6
    test = sources.load_source(name, split="test")
    images, labels = test.arrays().values()
    np.testing.assert_array_equal(images, from_uint8(pixels(3, start=100)))
    np.testing.assert_array_equal(labels, [1, 0, 2])
    assert test.class_names == sources.load_source(name).class_names == ("ant", "bee", "cow")


def test_both_splits_know_the_classes_of_either(save):
    labels = {"label": np.arange(3), "test_label": np.array([4])}
    name = save(image=pixels(3), test_image=pixels(1), **labels)
    assert [sources.load_source(name, split=split).num_classes for split in sources.SPLITS] == [
        5,
        5,
    ]


def test_gray_images_gain_a_channel_and_float_images_are_kept(save):
    gray = np.linspace(-1, 1, 10 * 25, dtype=np.float32).reshape(10, 5, 5)
    source = sources.load_source(save(image=gray), image_size=5)
    assert source.shape == (5, 5, 1)
    assert source.num_classes == 1
    found = {bytes(image) for image in source.arrays()["image"]}
    assert found < {bytes(image) for image in gray}


def test_float_images_are_never_resized(save):
    with pytest.raises(UserError, match=r"data.image_size is 8.*4 x 4 x 3"):
        sources.load_source(save(image=from_uint8(pixels(20))), image_size=8)


def test_captions_stay_with_their_images_and_groups_are_held_out_whole(save):
    group = np.arange(60) // 3 % 20
    name = save(
        image=pixels(60),
        caption=np.array([f"number {index}" for index in range(60)]),
        group=np.array([f"group {each}" for each in group]),
    )
    groups = {}
    for split in sources.SPLITS:
        source = sources.load_source(name, split=split)
        index = to_uint8(source.arrays()["image"])[:, 0, 0, 0]
        assert list(source.captions) == [f"number {each}" for each in index]
        groups[split] = set(group[index])
        assert len(source) == 3 * len(groups[split])
    assert not groups["train"] & groups["test"]
    assert (len(groups["train"]), len(groups["test"])) == (18, 2)

    some = np.flatnonzero(np.arange(60) % 3)
    fewer = save(image=pixels(60)[some], group=np.array([f"group {each}" for each in group[some]]))
    test = to_uint8(sources.load_source(fewer, split="test").arrays()["image"])[:, 0, 0, 0]
    assert set(group[test]) <= groups["test"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"picture": np.zeros(3)}, r"no field `image`.*picture"),
        ({"image": pixels(5).astype(np.int64)}, r"uint8 or float32.*int64"),
        ({"image": np.zeros((5, 4), np.uint8)}, r"\[N, H, W\].*\[5, 4\]"),
        ({"image": pixels(5).astype(np.float32)}, r"\[-1, 1\]"),
        ({"image": np.full((5, 2, 2), np.nan, np.float32)}, r"\[-1, 1\]"),
        (
            {"image": pixels(5).transpose(0, 3, 1, 2)},
            r"\[5, 3, 4, 4\].*transpose it by \(0, 2, 3, 1",
        ),
        ({"image": pixels(5, channels=5)}, r"1 or 3 channels"),
        ({"image": pixels(5, channels=4)}, r"1 or 3 channels"),
        ({"image": pixels(5), "label": np.array([1, 2, 3, 4, 10**9])}, r"up to 1000000000.* below"),
        (
            {"image": pixels(5), "label": np.full(5, 2**64 - 1, np.uint64)},
            r"up to 18446744073709551615",
        ),
        (
            {"image": pixels(5), "class_names": np.array("a")},
            r"class_names must be strings \[K\].*\[\]",
        ),
        ({"image": pixels(5), "class_names": np.arange(2)}, r"class_names must be strings.*int64"),
        (
            {"image": pixels(5), "class_names": np.array([b"\xff"])},
            r"class_names holds bytes that aren't UTF-8",
        ),
        (
            {"image": pixels(5), "caption": np.array(["a"] * 4 + ["\ud83d"])},
            r"caption holds '\\ud83d'",
        ),
        ({"jpeg": np.zeros(9, np.uint8), "offset": np.array(9)}, r"offset must be integers.*\[\]"),
        ({"jpeg": np.zeros(9, np.uint8), "offset": np.array([0, 5, 3, 9])}, r"offset must rise"),
        ({"jpeg": np.zeros(9, np.uint8), "offset": np.array([0, 99])}, r"offset must rise"),
        ({"jpeg": np.zeros(9), "offset": np.array([0, 9])}, r"jpeg must be bytes"),
        ({"image": pixels(5), "label": np.zeros(4, int)}, r"integers \[5\].*\[4\]"),
        ({"image": pixels(5), "label": np.zeros(5)}, r"integers \[5\].*float64"),
        ({"image": pixels(5), "label": np.full(5, -1)}, r"non-negative"),
        ({"image": pixels(5), "caption": np.array(["a"] * 4)}, r"caption must be strings \[5\]"),
        ({"image": pixels(5), "caption": np.zeros(5)}, r"caption must be strings.*float64"),
        ({"image": pixels(5), "group": np.zeros(5)}, r"group must be integers or strings"),
        ({"image": pixels(5), "group": np.zeros(4, int)}, r"group must be.*\[5\].*\[4\]"),
        (
            {"image": pixels(5), "test_image": pixels(2), "caption": np.array(["a"] * 5)},
            r"no `test_caption`",
        ),
        ({"image": pixels(1)}, r"no images for the test split"),
        ({"image": pixels(0)}, r"no images for the test split"),
        (
            {"image": pixels(5), "label": np.zeros(5, int), "test_image": pixels(2)},
            r"no `test_label`",
        ),
        ({"image": pixels(5), "test_image": pixels(2, size=5)}, r"make them one size"),
        (
            {"image": pixels(5), "label": np.arange(5), "class_names": np.array(["a"])},
            r"class_names has 1",
        ),
    ],
)
def test_bad_fields_are_named(save, fields, message):
    with pytest.raises(UserError, match=rf"images\.npz.*{message}"):
        sources.load_source(save(**fields), split="test")


def encoded(images, *, kind="png"):
    """The fields jpeg and offset for images; an image in bytes is used as it is."""
    files = []
    for image in images:
        file = io.BytesIO()
        if isinstance(image, bytes):
            file.write(image)
        else:
            Image.fromarray(image).save(file, kind)
        files.append(file.getvalue())
    offset = np.cumsum([0, *map(len, files)])
    return {"jpeg": np.frombuffer(b"".join(files), np.uint8), "offset": offset}


def test_encoded_files_of_two_splits(tmp_path):
    rng = np.random.default_rng(0)
    expected = {}
    for split, count in (("train", 5), ("test", 2)):
        expected[split] = rng.integers(0, 256, (count, 6, 4, 3), np.uint8)
        fields = {"label": np.arange(count), "class_names": np.array(list("abcde"))}
        np.savez(tmp_path / f"x_{split}.npz", **encoded(expected[split]), **fields)
    name = f"npz:{tmp_path}/x_{{split}}.npz"
    for split, images in expected.items():
        source = sources.load_source(name, split=split)
        found, labels = source.arrays().values()
        np.testing.assert_array_equal(to_uint8(found), images)
        np.testing.assert_array_equal(labels, np.arange(len(images)))
        assert source.num_classes == 5
    small = sources.load_source(name, image_size=2)
    assert small.shape == (2, 2, 3)
    # Only the middle 4 x 4 pixels count, not the rows above and below.
    found = small.arrays()["image"].mean((1, 2))
    middle = from_uint8(expected["train"][:, 1:5]).mean((1, 2))
    np.testing.assert_allclose(found, middle, atol=0.15)


def test_jpeg_files_and_a_held_out_tenth(save):
    shades = np.arange(20, dtype=np.uint8) * 10
    images = np.broadcast_to(shades[:, None, None, None], (20, 8, 8, 3))
    name = save(**encoded(images, kind="jpeg"), label=np.arange(20))
    parts = [sources.load_source(name, split=split) for split in sources.SPLITS]
    assert [len(part) for part in parts] == [18, 2]
    for part in parts:
        found, labels = part.arrays().values()
        np.testing.assert_allclose(to_uint8(found)[:, 4, 4, 0], shades[labels], atol=2)


WHOLE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
PNG = encoded([WHOLE])["jpeg"].tobytes()
# The header of the first chunk of pixels states too small a length.
assert PNG[37:41] == b"IDAT"
BROKEN = PNG[:33] + bytes([0, 0, 0, 5]) + PNG[37:]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([WHOLE, b"no image"], "image 1 of `jpeg` can't be read"),
        ([WHOLE, PNG[:400]], "image 1 of `jpeg` can't be read"),
        ([BROKEN, WHOLE], "image 0 of `jpeg` can't be read"),
        ([WHOLE, WHOLE[:8]], "differ in size"),
        ([], "offset must be integers"),
    ],
)
def test_bad_encoded_files_are_named(save, images, message):
    name = save(**encoded(images))
    with pytest.raises(UserError, match=rf"images\.npz: .*{message}"):
        both_splits(name)


def test_offsets_are_integers(save):
    fields = encoded([WHOLE])
    with pytest.raises(UserError, match=r"offset must be integers.*float64 \[2\]"):
        sources.load_source(save(jpeg=fields["jpeg"], offset=fields["offset"].astype(float)))


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no file .*none\.npz"):
        sources.load_source(f"npz:{tmp_path}/none.npz")
    damaged = {"text.npz": b"not an archive", "cut.npz": b"PK\x03\x04 cut", "empty.npz": b""}
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
    np.save(tmp_path / "single.npy", np.zeros(3))
    np.savez(tmp_path / "objects.npz", image=np.array([{}], dtype=object))
    for name in (*damaged, "single.npy", "objects.npz"):
        with pytest.raises(UserError, match=rf"{name} can't be read"):
            sources.load_source(f"npz:{tmp_path}/{name}")


def test_strings_may_be_bytes(save):
    fields = {"class_names": np.array([b"caf\xc3\xa9", b"bar"]), "caption": np.array([b"a"] * 5)}
    source = sources.load_source(save(image=pixels(5), label=np.array([0, 0, 0, 1, 1]), **fields))
    assert source.class_names == ("caf\u00e9", "bar")
    assert list(source.captions) == ["a"] * 4


@pytest.mark.parametrize("kind", [np.float16, np.float64])
def test_floats_of_any_precision_are_read_as_single(save, kind):
    values = np.linspace(-1, 1, 20 * 25).reshape(20, 5, 5).astype(kind)
    found = sources.load_source(save(image=values)).arrays()["image"]
    assert found.dtype == np.float32
    assert set(found.ravel()) < set(values.astype(np.float32).ravel())


def warnings_of(caplog, name):
    both_splits(name)
    return caplog.messages


def test_classes_without_images_are_warned_of_once(save, caplog):
    (line,) = warnings_of(caplog, save(image=pixels(20), label=np.arange(20) % 3 + 1))
    assert "1 of 4 classes have no image (0 '0')" in line


def test_names_without_images_are_warned_of(save, caplog):
    fields = {"label": np.arange(20) % 2, "class_names": np.array(["ant", "bee", "cow"])}
    (line,) = warnings_of(caplog, save(image=pixels(20), **fields))
    assert "1 of 3 classes have no image (2 'cow')" in line


def test_floats_in_half_of_the_range_are_warned_of(save, caplog):
    (line,) = warnings_of(caplog, save(image=np.linspace(0, 1, 500, dtype="f4").reshape(20, 5, 5)))
    assert "image lies in [0, 1], half of the range" in line


def test_classes_of_both_files_are_known(tmp_path, caplog):
    for split, count in (("train", 3), ("test", 5)):
        np.savez(tmp_path / f"x_{split}.npz", image=pixels(count), label=np.arange(count))
    name = f"npz:{tmp_path}/x_{{split}}.npz"
    assert [sources.load_source(name, split=split).num_classes for split in sources.SPLITS] == [
        5,
        5,
    ]
    assert not caplog.messages


def test_encoded_images_are_flattened_turned_and_scaled(save):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = io.BytesIO()
    Image.fromarray(np.array([[9, 9], [0, 0]], np.uint8)).save(turned, "TIFF", exif=exif)
    clear = np.zeros((2, 2, 4), np.uint8)
    deep = np.full((2, 2), 257 * 30, np.uint16)
    files = [turned.getvalue(), clear, deep] * 10
    source = sources.load_source(save(**encoded(files), label=np.arange(30) % 3))
    images, labels = source.arrays().values()
    expected = np.array([[[0, 9], [0, 9]], np.full((2, 2), 255), np.full((2, 2), 30)])
    np.testing.assert_array_equal(to_uint8(images)[..., 0], expected[labels])


def test_encoded_images_of_many_sizes_are_resized(save):
    files = [np.full((4 + i, 9, 3), 10 * i, np.uint8) for i in range(10)]
    source = sources.load_source(save(**encoded(files), label=np.arange(10)), image_size=4)
    images, labels = source.arrays().values()
    np.testing.assert_array_equal(to_uint8(images)[:, 0, 0, 0], 10 * labels)


def test_no_image_is_decoded_twice(save, monkeypatch):
    decoded = []
    whole = npz.decode_image

    def counting(content, *, what):
        decoded.append(what)
        return whole(content, what=what)

    monkeypatch.setattr(npz, "decode_image", counting)
    name = save(**encoded([WHOLE[:4, :4]] * 20))
    both_splits(name)
    counts = collections.Counter(decoded)
    assert len(counts) == 20
    # The first image is decoded a second time, for the size of all.
    assert sum(count > 1 for count in counts.values()) <= 1


def test_both_splits_share_what_is_read(save, monkeypatch):
    read = []
    whole = np.lib.format.read_array
    monkeypatch.setattr(
        np.lib.format, "read_array", lambda *args, **rest: read.append(1) or whole(*args, **rest)
    )
    name = save(image=pixels(20), note=np.arange(3))
    both_splits(name)
    assert len(read) == 1
    save(image=pixels(10, start=100))
    assert sources.load_source(name).arrays()["image"].min() > -0.5


def zip_of(path, method, shape, *, written=0):
    """An npz file whose field image has this shape by its header, but holds `written` bytes of zeros."""
    with zipfile.ZipFile(path, "w", method) as archive, archive.open("image.npy", "w") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for _ in range(written >> 20):
            file.write(bytes(1 << 20))
    return f"npz:{path}"


def test_fields_larger_than_the_memory_are_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(fields, "_memory", lambda: 1 << 20)
    name = zip_of(tmp_path / "a.npz", zipfile.ZIP_DEFLATED, (4 << 10, 32, 32), written=4 << 20)
    monkeypatch.setattr(np.lib.format, "read_array", None)
    with pytest.raises(
        UserError, match=r"a\.npz takes 0\.0 GiB of memory, but this machine has 0\.0"
    ):
        sources.load_source(name)


def test_decoded_images_larger_than_the_memory_are_refused(save, monkeypatch):
    monkeypatch.setattr(fields, "_memory", lambda: 10_000)
    with pytest.raises(UserError, match="`jpeg`, decoded, takes"):
        sources.load_source(save(**encoded([np.zeros((32, 32, 3), np.uint8)] * 20)))


def test_bombs_are_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(fields, "_LARGE", 8 << 20)
    name = zip_of(tmp_path / "a.npz", zipfile.ZIP_DEFLATED, (8 << 10, 32, 32), written=8 << 20)
    monkeypatch.setattr(np.lib.format, "read_array", None)
    with pytest.raises(UserError, match=r"a\.npz can't be read.*implausible for images"):
        sources.load_source(name)


def test_fields_shorter_than_their_header_states_are_refused_unread(tmp_path, monkeypatch):
    name = zip_of(tmp_path / "a.npz", zipfile.ZIP_STORED, (1 << 40, 32, 32))
    monkeypatch.setattr(np.lib.format, "read_array", None)
    with pytest.raises(
        UserError, match=r"a\.npz can't be read.*doesn't have the size that its header states"
    ):
        sources.load_source(name)


def test_encrypted_files_and_pipes_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, image=pixels(5))
    content = bytearray(path.read_bytes())
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(mark) + place] |= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.npz can't be read.*encrypted"):
        sources.load_source(f"npz:{path}")
    os.mkfifo(tmp_path / "b.npz")
    with pytest.raises(UserError, match=r"no file .*b\.npz"):
        sources.load_source(f"npz:{tmp_path}/b.npz")

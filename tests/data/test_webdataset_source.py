import gzip

import numpy as np
import pytest
from rows_on_disk import pictures, png, write_compressed, write_tar, write_webdataset

from guided_distill.data import sources
from guided_distill.errors import UserError

FILE = png(pictures(1)[0])


@pytest.fixture
def save(tmp_path):
    def save(members):
        write_tar(tmp_path / "images.tar", members)
        return f"webdataset:{tmp_path}/images.tar"

    return save


def test_compressed_files_hold_the_same(tmp_path):
    rows = [png(image) for image in pictures(20)], range(20), [[f"{i}"] for i in range(20)]
    write_webdataset(tmp_path / "a.tar", *rows)
    write_compressed(tmp_path / "b.tar.gz", *rows)
    plain, compressed = (
        sources.load_source(f"webdataset:{tmp_path}/{name}") for name in ("a.tar", "b.tar.gz")
    )
    assert list(plain.captions) == list(compressed.captions)
    for name, expected in plain.arrays().items():
        np.testing.assert_array_equal(compressed.arrays()[name], expected)


def test_only_compressed_files_are_copied(tmp_path, own_cache):
    rows = [png(image) for image in pictures(20)], range(20), [["a"]] * 20
    write_webdataset(tmp_path / "a.tar", *rows)
    sources.load_source(f"webdataset:{tmp_path}/a.tar")
    (copies,) = (own_cache / "data").glob("*.images")
    assert copies.stat().st_size == 0
    write_compressed(tmp_path / "b.tar.gz", *rows)
    sources.load_source(f"webdataset:{tmp_path}/b.tar.gz")
    sizes = [path.stat().st_size for path in (own_cache / "data").glob("*.images")]
    assert sorted(sizes) == [0, sum(map(len, rows[0]))]


def test_parts_are_found_by_what_follows_the_first_dot(save):
    members = {}
    for row in range(4):
        members |= {
            f"a/{row}.seg.png": b"not read",
            f"a/{row}.PNG": png(pictures(4)[row]),
            f"a/{row}.json": b'{"label": "ant", "caption": ["x", "y"], "id": 7}',
            f"a/._{row}.png": b"not read either",
        }
    found = [sources.load_source(save(members), split=split) for split in sources.SPLITS]
    assert [source.class_names for source in found] == [("ant",)] * 2
    assert [list(source.captions) for source in found] == [["x", "y"] * 3, ["x", "y"]]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.cls": b"1", "a.txt": b"x"}, r"images\.tar: a has no image, only cls, txt: add one"),
        ({"a.png": b"x"}, r"images\.tar: a\.png can't be read as an image"),
        ({"a.png": FILE, "a.json": b"{"}, r"images\.tar: a\.json is not JSON: fix it"),
        ({"a.png": FILE, "a.json": b"[" * 100_000}, r"images\.tar: a\.json is not JSON"),
        ({"a.png": FILE, "a.json": b"7"}, r"images\.tar: a\.json is not a JSON object"),
        ({"a.png": FILE, "a.txt": b"\xff"}, r"images\.tar: a\.txt isn't UTF-8: save it in UTF-8"),
        ({"a.png": FILE, "a.json": b'{"text": 7}'}, r"images\.tar: a has the caption 7: give"),
        ({"a.png": FILE, "a.json": b'{"label": 1e99}'}, r"images\.tar: row 0 has the label 1e\+99"),
        ({"a.png": FILE, "a.cls": b"9" * 30}, r"images\.tar: row 0 has the label 9+: give every"),
        ({"a.png": FILE, "a.cls": b"1", "b.png": FILE}, r"images\.tar: row 1 has the label None"),
        ({"a.png": FILE, "a.txt": b"x", "b.png": FILE}, r"images\.tar: row 1 has no caption"),
        ({}, r"images\.tar has no images: give files that hold some"),
    ],
)
def test_bad_members_are_named(save, members, message):
    with pytest.raises(UserError, match=rf"^\S*{message}"):
        sources.load_source(save(members))


@pytest.mark.parametrize("cut", ["between members", "within a header", "within a member", "empty"])
def test_archives_that_end_early_are_refused(tmp_path, cut):
    path = tmp_path / "images.tar"
    write_tar(path, {f"{i}.png": FILE for i in range(9)})
    one = 512 + -(-len(FILE) // 512) * 512
    lengths = {"between members": 4 * one, "within a header": 4 * one + 100}
    lengths |= {"within a member": 4 * one + 600, "empty": 0}
    path.write_bytes(path.read_bytes()[: lengths[cut]])
    with pytest.raises(UserError, match=rf"^{path} can't be read as a tar file .* again$"):
        sources.load_source(f"webdataset:{path}")


def test_a_damaged_header_does_not_end_an_archive(tmp_path):
    path = tmp_path / "images.tar"
    write_tar(path, {f"{i}.png": FILE for i in range(9)})
    content = bytearray(path.read_bytes())
    start = 4 * (512 + -(-len(FILE) // 512) * 512)
    content[start : start + 300] = b"x" * 300
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"it is damaged at byte {start}"):
        sources.load_source(f"webdataset:{path}")


def test_a_compressed_archive_that_ends_early_is_refused(tmp_path):
    path = tmp_path / "images.tar.gz"
    write_tar(path, {f"{i}.png": FILE for i in range(9)}, mode="w:gz")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match=rf"^{path} can't be read as a tar file .* again$"):
        sources.load_source(f"webdataset:{path}")
    path.write_bytes(gzip.compress(b"not a tar file" * 100))
    with pytest.raises(UserError, match=rf"^{path} can't be read as a tar file"):
        sources.load_source(f"webdataset:{path}")


def test_shards_may_be_a_range_of_numbers(tmp_path):
    for shard in range(8, 12):
        write_tar(
            tmp_path / f"a-{shard:03}.tar", {f"{shard}.png": FILE, f"{shard}.txt": b"%d" % shard}
        )
    name = f"webdataset:{tmp_path}/a-{{008..010}}.tar"
    found = [sources.load_source(name, split=split) for split in sources.SPLITS]
    assert sorted(text for source in found for text in source.captions) == ["10", "8", "9"]
    with pytest.raises(UserError, match=r"no file \S*a-012\.tar, which \S* names: add it"):
        sources.load_source(f"webdataset:{tmp_path}/a-{{008..012}}.tar")
    for numbers, count in (("5..4", "0"), ("0..999999999", "1000000000")):
        with pytest.raises(UserError, match=rf"names {count} files: give a range of 1 to"):
            sources.load_source(f"webdataset:{tmp_path}/a-{{{numbers}}}.tar")


def test_a_file_that_is_cut_off_later_is_named(tmp_path):
    path = tmp_path / "images.tar"
    write_tar(path, {f"{i}.png": FILE for i in range(9)})
    source = sources.load_source(f"webdataset:{path}")
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(UserError, match=rf"^{path} has become shorter since it was listed: start"):
        source.arrays()

import collections
import json
import os

import numpy as np
import pytest
from PIL import Image

from guided_distill.data import folder, sources
from guided_distill.data.pixels import to_uint8
from guided_distill.errors import UserError

COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}


@pytest.fixture
def colour_folder(tmp_path):
    """Three classes of 20, 10 and 10 plain images, in several formats."""
    for name, count in {"red": 20, "green": 10, "blue": 10}.items():
        (tmp_path / name).mkdir()
        for i in range(count):
            suffix = ("png", "bmp", "webp", "PNG")[i % 4]
            Image.new("RGB", (6, 6), COLOURS[name]).save(tmp_path / name / f"{i}.{suffix}")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "red" / "notes.txt").write_text("not an image")
    return tmp_path


def load(path, **options):
    return sources.load_source(f"folder:{path}", **options)


def test_classes_are_the_sorted_folders_and_labels_match(colour_folder):
    for split, counts in {"train": [9, 9, 18], "test": [1, 1, 2]}.items():
        source = load(colour_folder, split=split)
        assert source.class_names == ("blue", "green", "red")
        assert source.shape == (6, 6, 3)
        images, labels = source.arrays().values()
        np.testing.assert_array_equal(np.bincount(labels), counts)
        expected = np.array(list(COLOURS.values()))[labels]
        error = np.abs(to_uint8(images)[:, 3, 3].astype(int) - expected)
        assert error.max() < 12  # WebP is lossy.


def test_images_directly_in_the_folder_are_one_class(tmp_path):
    for i in range(20):
        Image.new("L", (5, 4), 10 * i).save(tmp_path / f"{i}.png")
    train, test = load(tmp_path), load(tmp_path, split="test")
    assert train.num_classes == 1
    assert train.shape == (4, 5, 3)
    shades = [to_uint8(part.arrays()["image"])[:, 0, 0, 0].tolist() for part in (train, test)]
    assert sorted(shades[0] + shades[1]) == list(range(0, 200, 10))
    assert len(shades[1]) == 2


def test_resizing_keeps_the_centre_square(tmp_path):
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = (200, 100, 50)
    for name in "ab":
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    image = to_uint8(load(tmp_path, image_size=10)[0]["image"])
    assert image.shape == (10, 10, 3)
    np.testing.assert_array_equal(image, np.broadcast_to([200, 100, 50], (10, 10, 3)))


def test_transparent_pixels_are_white_and_rotated_photos_upright(tmp_path):
    clear = Image.new("RGBA", (4, 4), (9, 9, 9, 0))
    for name in "ab":
        clear.save(tmp_path / f"{name}.png")
    assert (load(tmp_path)[0]["image"] == 1).all()

    (tmp_path / "turned").mkdir()
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # Stored rotated: the white half belongs on the right.
    for name in "ab":
        Image.fromarray(pixels).save(tmp_path / "turned" / f"{name}.jpg", exif=exif, quality=95)
    image = load(tmp_path / "turned")[0]["image"]
    assert image[:, 12].min() > 0.9
    assert image[:, 3].max() < -0.9


def test_sizes_that_differ_need_image_size(colour_folder):
    Image.new("RGB", (7, 6)).save(colour_folder / "red" / "wide.png")
    with pytest.raises(UserError, match=r"wide\.png is 7 x 6.*6 x 6.*data\.image_size"):
        load(colour_folder)
    assert load(colour_folder, image_size=6).shape == (6, 6, 3)


def test_damaged_header_is_found_at_load(colour_folder):
    (colour_folder / "green" / "bad.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match=r"bad\.png can't be read"):
        load(colour_folder)


def test_damaged_pixels_are_found_at_access(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for name in "ab":
        file = tmp_path / f"{name}.png"
        Image.fromarray(noise).save(file)
        file.write_bytes(file.read_bytes()[:3000])
    source = load(tmp_path)
    with pytest.raises(UserError, match=r"[ab]\.png can't be read"):
        source[0]


def test_gray_of_32_bits_is_refused(tmp_path):
    for name in "ab":
        Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / f"{name}.tif")
    with pytest.raises(UserError, match=r"[ab]\.tif .*32 bits per pixel"):
        load(tmp_path)[0]


@pytest.mark.parametrize("options", [{}, {"compression": "tiff_lzw"}])
def test_sizes_are_those_of_upright_images(tmp_path, options):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a.jpg", "b.tif"):
        Image.new("RGB", (6, 4)).save(tmp_path / name, exif=exif, **options)
    Image.new("RGB", (4, 6)).save(tmp_path / "c.png")
    source = load(tmp_path)
    assert source.shape == (6, 4, 3)
    assert source.arrays()["image"].shape == (2, 6, 4, 3)


def test_every_header_is_opened_once_for_both_splits(colour_folder, monkeypatch):
    opened = collections.Counter()
    whole = Image.open

    def counting(stream, **options):
        opened[stream.name] += 1
        return whole(stream, **options)

    monkeypatch.setattr(Image, "open", counting)
    for split in sources.SPLITS:
        load(colour_folder, split=split)
    assert len(opened) == 40
    assert set(opened.values()) == {1}
    Image.new("RGB", (7, 7)).save(colour_folder / "red" / "0.png")
    with pytest.raises(UserError, match=r"0\.png is 7 x 7"):
        load(colour_folder)


def test_skipped_files_are_counted(colour_folder, caplog):
    (colour_folder / "red" / "older").mkdir()
    for name in ("a.gif", "b.tif", "c.jfif"):
        kind = "jpeg" if name == "c.jfif" else None
        Image.new("RGB", (6, 6)).save(colour_folder / "red" / name, kind)
    os.mkfifo(colour_folder / "red" / "pipe.png")
    sizes = [len(load(colour_folder, split=split)) for split in sources.SPLITS]
    assert sum(sizes) == 43
    (line,) = caplog.messages
    for message in ("43 images are read", "3 other files and folders", "1 of .txt", "1 of .png"):
        assert message in line


def test_folders_without_images_are_named(colour_folder, tmp_path):
    with pytest.raises(UserError, match=r"no folder .*nowhere"):
        load(tmp_path / "nowhere")
    (colour_folder / "void").mkdir()
    with pytest.raises(UserError, match=r"no images in .*void"):
        load(colour_folder)
    with pytest.raises(UserError, match=r"no images in .*void"):
        load(colour_folder / "void")
    Image.new("RGB", (6, 6)).save(colour_folder / "stray.png")
    with pytest.raises(UserError, match=r"both images, such as stray\.png"):
        load(colour_folder)


def test_a_class_of_one_image_has_no_test_split(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "only.png")
    assert len(load(tmp_path)) == 1
    with pytest.raises(UserError, match="too few images for a test split"):
        load(tmp_path, split="test")


def write_captions(folder, rows):
    (folder / "metadata.jsonl").write_text("".join(f"{row}\n" for row in rows))


def rows_of(folder):
    return [
        json.dumps(
            {"file_name": f"{path.parent.name}/{path.name}", "text": f"{path.parent.name} {path}"}
        )
        for path in folder.glob("*/*.*")
    ]


def test_captions_belong_to_their_images_in_both_splits(colour_folder):
    write_captions(colour_folder, rows_of(colour_folder)[::-1])
    seen = []
    for split in sources.SPLITS:
        source = load(colour_folder, split=split)
        labels = source.arrays()["label"]
        assert [text.split()[0] for text in source.captions] == [
            source.class_names[label] for label in labels
        ]
        seen += list(source.captions)
    assert len(set(seen)) == len(seen) == 40


def test_an_image_with_several_captions_is_one_example_per_caption(colour_folder):
    more = [
        json.dumps({"file_name": f"./{name}/0.png", "text": f"{name} once more"})
        for name in COLOURS
    ]
    write_captions(colour_folder, [*rows_of(colour_folder), "", *more])
    seen = {}
    for split in sources.SPLITS:
        source = load(colour_folder, split=split)
        examples = source.arrays()
        assert len(source.captions) == len(source) == len(examples["image"])
        for text, label in zip(source.captions, examples["label"], strict=True):
            assert text.split()[0] == source.class_names[label]
        seen[split] = list(source.captions)
    assert len(seen["train"] + seen["test"]) == 43
    for name in COLOURS:
        first = f"{name} {colour_folder / name / '0.png'}"
        (both,) = [texts for texts in seen.values() if first in texts]
        assert both[both.index(first) + 1] == f"{name} once more"


def test_lines_of_other_files_are_counted(colour_folder, caplog):
    write_captions(colour_folder, [*rows_of(colour_folder), '{"file_name": "x.png", "text": "x"}'])
    load(colour_folder)
    assert any("2 lines whose file_name isn't one of the images" in m for m in caplog.messages)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[1:], "has no text for"),
        (lambda rows: ["{", *rows], "line 1, is not JSON"),
        (lambda rows: [*rows, "[" * 100_000], "line 42, is not JSON"),
        (lambda rows: [*rows, "7"], "line 42, is not a JSON object"),
        (lambda rows: [*rows, '{"file_name": "a.png"}'], "line 42, is not a JSON object"),
        (
            lambda rows: [*rows, '{"file_name": "a.png", "text": null}'],
            "line 42, has the text null",
        ),
        (lambda rows: [*rows, '{"file_name": "a.png", "text": ["a"]}'], r"the text \[.a.\]"),
        (lambda rows: [*rows, '{"file_name": "a.png", "text": 7}'], "line 42, has the text 7"),
        (lambda rows: [*rows, '{"file_name": 7, "text": "a"}'], "line 42, has the file_name 7"),
        (
            lambda rows: [*rows, '{"file_name": "a.png", "text": "\\ud83d"}'],
            "line 42, has the text",
        ),
    ],
)
def test_captions_that_are_missing_or_damaged_are_named(colour_folder, change, message):
    write_captions(colour_folder, change(rows_of(colour_folder)))
    with pytest.raises(UserError, match=message):
        load(colour_folder)


def test_captions_are_utf_8(colour_folder):
    text = "".join(f"{row}\n" for row in rows_of(colour_folder))
    (colour_folder / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert len(load(colour_folder).captions) == 36
    (colour_folder / "metadata.jsonl").write_bytes(text.encode() + "caf\u00e9".encode("latin-1"))
    with pytest.raises(
        UserError, match=r"metadata\.jsonl can't be read as text .*: save it in UTF-8"
    ):
        load(colour_folder)


@pytest.fixture
def listed_once(monkeypatch):
    """Folders of 40 images are large enough to be listed once."""
    monkeypatch.setattr(folder, "LISTED_ONCE", 40)


@pytest.mark.usefixtures("listed_once")
@pytest.mark.parametrize("flat", [False, True])
def test_a_large_folder_is_listed_once(colour_folder, tmp_path, monkeypatch, flat):
    root = colour_folder
    if flat:
        root = tmp_path / "flat"
        root.mkdir()
        for i in range(40):
            Image.new("L", (6, 6), 5 * i).save(root / f"{i}.png")
    before = [load(root, split=split) for split in sources.SPLITS]
    folder._header_sizes.cache_clear()
    monkeypatch.setattr(folder, "_list_images", None)
    for split, expected in zip(sources.SPLITS, before, strict=True):
        found = load(root, split=split)
        assert (found.class_names, found.shape) == (expected.class_names, expected.shape)
        for name, values in expected.arrays().items():
            np.testing.assert_array_equal(found.arrays()[name], values)


@pytest.mark.usefixtures("listed_once")
@pytest.mark.parametrize("change", ["add", "remove", "rename", "add a class"])
def test_a_large_folder_that_has_changed_is_listed_again(colour_folder, caplog, change):
    def names():
        found = [load(colour_folder, split=split) for split in sources.SPLITS]
        return sum(map(len, found)), found[0].num_classes

    assert names() == (40, 3)
    assert len(caplog.messages) == 1  # A file is skipped.
    image = colour_folder / "red" / "0.png"
    if change == "add":
        Image.new("RGB", (6, 6)).save(colour_folder / "red" / "new.png")
    elif change == "remove":
        image.unlink()
    elif change == "rename":
        image.rename(image.with_name("other.png"))
    else:
        (colour_folder / "white").mkdir()
        image.rename(colour_folder / "white" / "0.png")
    assert names() == {"add": (41, 3), "remove": (39, 3), "rename": (40, 3)}.get(change, (40, 4))
    assert sum("has changed since it was listed" in line for line in caplog.messages) >= 1


@pytest.mark.usefixtures("listed_once")
def test_the_list_of_a_bucket_warns_that_it_may_be_old(colour_folder, bucket, monkeypatch, caplog):
    for name in COLOURS:
        (colour_folder / name).rename(bucket / name)
    before = load("gs://bucket").arrays()["image"]
    monkeypatch.setattr(folder, "_list_images", None)
    folder._header_sizes.cache_clear()
    np.testing.assert_array_equal(load("gs://bucket").arrays()["image"], before)
    assert "folders in a bucket have no times: remove the list if" in caplog.text


def test_a_small_folder_leaves_no_list(colour_folder, own_cache):
    load(colour_folder)
    assert not own_cache.exists()

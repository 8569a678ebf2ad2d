"""The sources that read rows of an image, a label and captions: the same rows give the same examples."""

import itertools
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from rows_on_disk import COUNT, WRITERS, pictures, png, write, write_npz

from guided_distill.data import listing, pipeline, sources
from guided_distill.data.contents import array_bytes
from guided_distill.data.pixels import to_uint8
from guided_distill.errors import UserError


@pytest.fixture(params=sorted(set(WRITERS) - {"hf"}))
def kind(request):
    """A kind of source whose name has the path of files."""
    return request.param


@pytest.fixture(params=WRITERS)
def any_kind(request):
    if request.param == "hf":
        request.getfixturevalue("own_datasets")
    return request.param


def take(source, count=12, **options):
    iterator = pipeline.batches(source, batch_size=5, seed=3, flip=True, **options)
    taken = list(itertools.islice(iterator, count))
    iterator.close()
    return taken


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])
        np.testing.assert_array_equal(a["label"], b["label"])


@pytest.mark.parametrize("split", sources.SPLITS)
def test_batches_are_those_of_the_same_images_in_an_npz_file(any_kind, split, tmp_path):
    path = write(any_kind, tmp_path)
    write_npz(
        tmp_path / "same.npz",
        [png(image) for image in pictures()],
        np.arange(COUNT) % 3,
        [[f"picture {i}"] for i in range(COUNT)],
    )
    found = sources.load_source(f"{any_kind}:{path}", split=split, image_size=4)
    expected = sources.load_source(f"npz:{tmp_path}/same.npz", split=split, image_size=4)
    assert (found.shape, found.size, found.class_names) == (
        expected.shape,
        expected.size,
        expected.class_names,
    )
    assert list(found.captions) == list(expected.captions)
    np.testing.assert_array_equal(found.labels, expected.labels)
    assert_same(take(found), take(expected))


@pytest.mark.parametrize("place", ["gs://bucket", "gs://bucket/al*", "gs://bucket/all{suffix}"])
def test_batches_from_a_bucket_are_those_from_a_disk(kind, tmp_path, bucket, place):
    write(kind, bucket)
    here = sources.load_source(f"{kind}:{bucket}")
    there = sources.load_source(f"{kind}:{place.format(suffix=WRITERS[kind][1])}")
    assert list(here.captions) == list(there.captions)
    assert_same(take(here), take(there))


def test_files_of_both_splits_are_used_as_they_are(kind, tmp_path):
    halves = {"train": np.arange(30), "test": np.arange(30, COUNT)}
    for split, rows in halves.items():
        for part, chosen in enumerate(np.array_split(rows, 3)):
            write(
                kind,
                tmp_path,
                images=pictures()[chosen],
                labels=chosen // 10,
                captions=[[f"{i}"] for i in chosen],
                stem=f"{split}-{part:05}-of-00003",
            )
    suffix = WRITERS[kind][1]
    for split, rows in halves.items():
        source = sources.load_source(f"{kind}:{tmp_path}/{{split}}-*{suffix}", split=split)
        np.testing.assert_array_equal(to_uint8(source.arrays()["image"]), pictures()[rows])
        assert list(source.captions) == [f"{i}" for i in rows]
        assert source.num_classes == 4


def test_a_row_with_several_captions_is_an_example_for_each(any_kind, tmp_path):
    captions = [[f"{i} {j}" for j in range(1 + i % 3)] for i in range(COUNT)]
    path = write(any_kind, tmp_path, captions=captions)
    seen = []
    for split in sources.SPLITS:
        source = sources.load_source(f"{any_kind}:{path}", split=split)
        images = to_uint8(source.arrays()["image"])
        for text, image in zip(source.captions, images, strict=True):
            np.testing.assert_array_equal(image, pictures()[int(text.split()[0])])
        seen.append({text.split()[0] for text in source.captions})
        assert len(source.captions) == sum(len(captions[int(i)]) for i in seen[-1])
    assert not seen[0] & seen[1]
    assert len(seen[0] | seen[1]) == COUNT


def test_arrays_of_gray_floats_are_kept(any_kind, tmp_path):
    images = np.linspace(-1, 1, 20 * 30, dtype=np.float32).reshape(20, 5, 6)
    path = write(any_kind, tmp_path, images=images, encode=array_bytes)
    source = sources.load_source(f"{any_kind}:{path}")
    assert source.shape == (5, 6, 1)
    assert {bytes(each) for each in source.arrays()["image"]} < {bytes(each) for each in images}
    with pytest.raises(UserError, match=r"data\.image_size is 4.*5 x 6"):
        sources.load_source(f"{any_kind}:{path}", image_size=4)


def test_resumed_batches_are_the_next_ones(any_kind, tmp_path):
    path = write(any_kind, tmp_path)
    expected = take(sources.load_source(f"{any_kind}:{path}"), 20)
    script = f"""
        import json
        from guided_distill.data import pipeline, sources
        iterator = pipeline.batches(
            sources.load_source("{any_kind}:{path}"), batch_size=5, seed=3, flip=True
        )
        for _ in range(11):
            next(iterator)
        print(json.dumps(iterator.get_state()), flush=True)
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == -9
    iterator = pipeline.batches(
        sources.load_source(f"{any_kind}:{path}"), batch_size=5, seed=3, flip=True
    )
    iterator.set_state(json.loads(done.stdout))
    assert_same(itertools.islice(iterator, 9), expected[11:])
    iterator.close()


def test_processes_have_disjoint_parts_of_every_batch(any_kind, tmp_path):
    captions = [[f"{i}"] for i in range(COUNT)]
    source = sources.load_source(f"{any_kind}:{write(any_kind, tmp_path, captions=captions)}")
    parts = [take(source, 3, process_index=i, process_count=2) for i in range(2)]
    seen = [
        {bytes(image) for batch in part for image in np.sort(batch["image"].reshape(5, -1))}
        for part in parts
    ]
    assert len(seen[0]) == len(seen[1]) == 15
    assert not seen[0] & seen[1]


def test_files_are_listed_once_until_they_change(kind, tmp_path, monkeypatch, caplog):
    path = write(kind, tmp_path)
    before = sources.load_source(f"{kind}:{path}").arrays()["image"]
    listing._listed.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(listing, "_write", None)
        after = sources.load_source(f"{kind}:{path}").arrays()["image"]
    np.testing.assert_array_equal(before, after)
    assert not caplog.messages
    write(kind, tmp_path, images=pictures(30, seed=1))
    os.utime(path, (1, 1))
    assert len(sources.load_source(f"{kind}:{path}")) == 27
    (line,) = caplog.messages
    assert f"{path} has changed since it was listed" in line


def test_a_change_of_the_files_does_not_reach_an_open_source(tmp_path):
    """The copies of one opening are not replaced by those of the next."""
    path = write("parquet", tmp_path)
    first = sources.load_source(f"parquet:{path}")
    before = first.arrays()["image"]
    write("parquet", tmp_path, images=pictures(seed=1))
    os.utime(path, (1, 1))
    second = sources.load_source(f"parquet:{path}").arrays()["image"]
    assert not np.array_equal(before, second)
    np.testing.assert_array_equal(first.arrays()["image"], before)


def test_files_that_are_opened_twice_at_once_are_listed_once(tmp_path, monkeypatch):
    path = write("parquet", tmp_path)
    whole, begun = listing._write, threading.Semaphore(0)

    def slow(*args):
        begun.release()
        time.sleep(0.5)
        return whole(*args)

    monkeypatch.setattr(listing, "_write", slow)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(sources.load_source, [f"parquet:{path}"] * 2)
    assert begun.acquire(blocking=False)
    assert not begun.acquire(blocking=False)
    assert_same(take(first, 3), take(second, 3))


def test_copies_that_are_cut_off_are_made_again(tmp_path, own_cache, caplog):
    path = write("parquet", tmp_path)
    before = sources.load_source(f"parquet:{path}").arrays()["image"]
    (copies,) = (own_cache / "data").glob("*.images")
    copies.write_bytes(copies.read_bytes()[:-1])
    listing._listed.cache_clear()
    np.testing.assert_array_equal(sources.load_source(f"parquet:{path}").arrays()["image"], before)
    assert "incomplete" in caplog.text


def test_mixed_sizes_are_named_at_once(kind, tmp_path):
    images = [*pictures(5), *pictures(1, size=(6, 7)), *pictures(5)]
    path = write(kind, tmp_path, images=images)
    with pytest.raises(
        UserError,
        match=rf"^{kind}:{path}: the image of row 5 is 6 x 7 x 3, but .* 6 x 6 x 3: set data\.image_size",
    ):
        sources.load_source(f"{kind}:{path}")
    assert sources.load_source(f"{kind}:{path}", image_size=4).shape == (4, 4, 3)


def test_damaged_files_are_named(kind, tmp_path):
    path = write(kind, tmp_path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 5])
    with pytest.raises(UserError, match=rf"^{path} .*again$"):
        sources.load_source(f"{kind}:{path}")


def test_damaged_pixels_are_named_when_they_are_read(any_kind, tmp_path):
    images = pictures(12, size=(40, 40))
    path = write(any_kind, tmp_path, images=images, encode=lambda each: png(each)[:2000])
    with pytest.raises(
        UserError, match=rf"^{any_kind}:{path}: the image of row \d+ can't be read as an image"
    ):
        sources.load_source(f"{any_kind}:{path}").arrays()


@pytest.mark.parametrize("place", ["{folder}", "{folder}/none-*{suffix}", "{folder}/none"])
def test_places_without_files_are_named(kind, tmp_path, place):
    suffix = WRITERS[kind][1]
    with pytest.raises(UserError, match=rf"no {suffix} files at .*: give {kind}:PATH"):
        sources.load_source(f"{kind}:{place.format(folder=tmp_path, suffix=suffix)}")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, -1] * 4, "label must be non-negative integers"),
        ([0, 10**7, 1] * 4, "goes up to 10000000"),
    ],
)
def test_bad_labels_are_named(any_kind, tmp_path, labels, message):
    path = write(any_kind, tmp_path, images=pictures(12), labels=labels)
    with pytest.raises(UserError, match=message):
        sources.load_source(f"{any_kind}:{path}")

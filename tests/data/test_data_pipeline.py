import itertools
import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from PIL import Image

from guided_distill.data import pipeline, sources
from guided_distill.data.source import from_arrays
from guided_distill.errors import UserError


def numbered(count):
    """A source whose image i is i in its left half and -i in its right half, with label i % 5."""
    index = np.arange(count, dtype=np.float32)[:, None, None, None]
    images = np.concatenate([index, index, -index, -index], axis=2)
    return from_arrays(
        "numbered",
        split="train",
        images=images,
        labels=np.arange(count) % 5,
        class_names=list("abcde"),
    )


def take(count, source, **options):
    iterator = pipeline.batches(source, **options)
    taken = list(itertools.islice(iterator, count))
    iterator.close()
    return taken


def order(batches):
    """The examples' indices, in the order of the batches."""
    return np.concatenate([np.abs(batch["image"][:, 0, 0, 0]) for batch in batches]).astype(int)


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])
        np.testing.assert_array_equal(a["label"], b["label"])


def test_batches_have_the_promised_form():
    (batch,) = take(1, numbered(20), batch_size=8, seed=0)
    assert set(batch) == {"image", "label"}
    assert (batch["image"].shape, batch["image"].dtype) == ((8, 1, 4, 1), np.float32)
    assert (batch["label"].shape, batch["label"].dtype) == ((8,), np.int32)


def test_labels_stay_with_their_images():
    for batch in take(10, numbered(23), batch_size=6, seed=1, flip=True):
        np.testing.assert_array_equal(batch["label"], order([batch]) % 5)


@pytest.mark.parametrize(("size", "batch_size"), [(12, 4), (10, 4), (7, 20), (3, 1)])
def test_every_epoch_visits_each_example_once(size, batch_size):
    epochs = 8
    batches = take(-(-epochs * size // batch_size), numbered(size), batch_size=batch_size, seed=3)
    seen = order(batches)[: epochs * size].reshape(epochs, size)
    np.testing.assert_array_equal(np.sort(seen), np.broadcast_to(np.arange(size), seen.shape))
    assert len({tuple(epoch) for epoch in seen}) > 2


def test_order_depends_only_on_the_seed():
    def first(seed):
        return order(take(3, numbered(50), batch_size=10, seed=seed)).tolist()

    assert first(4) == first(4)
    assert first(4) != first(5)
    # The second epoch of one seed is not the first of the next.
    assert order(take(10, numbered(50), batch_size=10, seed=4))[50:80].tolist() != first(5)


@pytest.mark.parametrize("step", [0, 1, 7])
def test_resumes_from_any_state(step):
    options = {"batch_size": 6, "seed": 7, "flip": True}
    expected = take(step + 9, numbered(20), **options)
    iterator = pipeline.batches(numbered(20), **options)
    for _ in range(step):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    assert_same(itertools.islice(iterator, 9), expected[step:])

    iterator.set_state(state)
    assert_same(itertools.islice(iterator, 9), expected[step:])
    iterator.close()

    restored = pipeline.batches(numbered(20), **options)
    restored.set_state(state)
    assert_same(itertools.islice(restored, 9), expected[step:])
    restored.close()


@pytest.mark.parametrize("count", [2, 3])
def test_processes_divide_the_same_global_batches(count):
    common = {"seed": 2, "flip": True}
    whole = take(9, numbered(20), batch_size=4 * count, **common)
    parts = [
        take(9, numbered(20), batch_size=4, process_index=i, process_count=count, **common)
        for i in range(count)
    ]
    for step, batch in enumerate(whole):
        for key, value in batch.items():
            shared = np.concatenate([part[step][key] for part in parts])
            np.testing.assert_array_equal(shared, value)


def test_processes_are_disjoint_and_cover_each_epoch():
    parts = [
        order(take(3, numbered(24), batch_size=4, seed=0, process_index=i, process_count=2))
        for i in range(2)
    ]
    assert not set(parts[0]) & set(parts[1])
    assert set(parts[0]) | set(parts[1]) == set(range(24))


def test_flip_mirrors_the_width_of_about_half():
    images = np.concatenate(
        [b["image"] for b in take(40, numbered(50), batch_size=50, seed=0, flip=True)]
    )
    images = images[images[:, 0, 0, 0] != 0][:, 0, :, 0]
    np.testing.assert_array_equal(images[:, :2], -images[:, 2:])
    mirrored = images[:, 0] < 0
    assert 0.46 < mirrored.mean() < 0.54
    # Each epoch draws anew for each image, rather than once per batch or per example.
    assert len({tuple(row) for row in mirrored[: 49 * 40].reshape(40, 49)}) == 40
    unflipped = np.concatenate([b["image"] for b in take(2, numbered(50), batch_size=50, seed=0)])
    assert (unflipped[:, 0, 0, 0] >= 0).all()


@pytest.mark.parametrize("batch_size", [1, 10])
def test_source_arrays_are_not_changed_by_flips(batch_size):
    source = numbered(10)
    before = source.arrays()["image"].copy()
    take(9, source, batch_size=batch_size, seed=0, flip=True)
    np.testing.assert_array_equal(source.arrays()["image"], before)


def test_unreadable_examples_surface_as_user_errors(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for name in "abc":
        Image.fromarray(noise).save(tmp_path / f"{name}.png")
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:3000])
    iterator = pipeline.batches(sources.load_source(f"folder:{tmp_path}"), batch_size=2, seed=0)
    with pytest.raises(UserError, match=r"\.png can't be read"):
        next(iterator)
    iterator.close()


def test_bad_requests_are_refused():
    with pytest.raises(UserError, match="batch size is 0"):
        pipeline.batches(numbered(5), batch_size=0, seed=0)
    points = from_arrays(
        "points", split="train", images=np.zeros((9, 2)), labels=np.zeros(9), class_names=["a"]
    )
    with pytest.raises(UserError, match=r"data\.flip.*'points'"):
        pipeline.batches(points, batch_size=4, seed=0, flip=True)


def test_an_open_iterator_does_not_prevent_exit():
    script = """
        import numpy as np
        from guided_distill.data import pipeline, source
        zeros = np.zeros((9, 2), np.float32), np.zeros(9, int)
        source = source.from_arrays(
            "zeros", split="train", images=zeros[0], labels=zeros[1], class_names=["a"]
        )
        iterator = pipeline.batches(source, batch_size=64, seed=0)
        next(iterator)
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")

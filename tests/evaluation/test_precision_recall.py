import tracemalloc

import numpy as np
import pytest
from scipy.spatial import cKDTree

from guided_distill.errors import UserError
from guided_distill.evaluation.metrics.precision_recall import Manifold, precision_recall


def line(*points):
    return np.asarray(points, dtype=np.float64)[:, None]


def compare(real, generated, k=3):
    return precision_recall(
        Manifold.from_features(real, k=k), Manifold.from_features(generated, k=k)
    )


def test_radius_reaches_the_kth_other_point():
    points = line(0, 1, 3, 7)
    expected = {1: [1, 1, 4, 16], 2: [9, 4, 9, 36], 3: [49, 36, 16, 49]}
    for k, squared_radii in expected.items():
        np.testing.assert_allclose(Manifold.from_features(points, k=k).squared_radii, squared_radii)


def test_default_is_three_neighbours():
    points = np.random.default_rng(0).normal(size=(20, 2))
    np.testing.assert_array_equal(
        Manifold.from_features(points).squared_radii,
        Manifold.from_features(points, k=3).squared_radii,
    )


def test_points_on_a_line_by_hand():
    # Real balls: [-1, 1], [0, 2], [1, 7]; generated balls: [1.5, 2.5], [2, 3], [2.5, 17.5].
    found = compare(line(0, 1, 4), line(2, 2.5, 10), k=1)
    assert found.precision == pytest.approx(2 / 3)
    assert found.recall == pytest.approx(1 / 3)


def test_surface_of_a_ball_belongs_to_it():
    assert compare(line(0, 1), line(2, 30), k=1) == (0.5, 1.0)
    assert compare(line(0, 1), line(2.001, 2.002), k=1) == (0.0, 0.0)


def test_a_missed_mode_costs_recall_and_an_invented_one_precision():
    rng = np.random.default_rng(1)
    left, right = rng.normal(size=(2, 100, 2))
    right += 100
    both = np.concatenate([left, right])
    dropped = compare(both, left)
    assert dropped == (1.0, 0.5)
    assert compare(left, both) == (dropped.recall, dropped.precision)
    assert compare(left, right) == (0.0, 0.0)


def test_collapse_keeps_precision_and_loses_recall():
    real = np.random.default_rng(2).normal(size=(200, 2))
    found = compare(real, np.tile(real[:1], (200, 1)))
    assert found == (1.0, 1 / 200)


def test_identical_sets_cover_each_other_even_with_copies():
    points = np.random.default_rng(3).normal(size=(30, 7)) * 0.1 + 3
    assert compare(points, points) == (1.0, 1.0)
    copies = np.repeat(points, 5, axis=0)
    assert compare(copies, copies) == (1.0, 1.0)
    assert compare(copies, copies[::-1]) == (1.0, 1.0)


def test_agrees_with_a_tree_search_across_blocks():
    rng = np.random.default_rng(4)
    real, generated = rng.normal(size=(1300, 3)), rng.normal(size=(1100, 3)) * 1.2 + 0.8
    real_tree, generated_tree = cKDTree(real), cKDTree(generated)
    real_radii = real_tree.query(real, k=4)[0][:, 3]
    generated_radii = generated_tree.query(generated, k=4)[0][:, 3]
    realistic = np.zeros(1100, dtype=bool)
    for members in generated_tree.query_ball_point(real, real_radii):
        realistic[members] = True
    covered = np.zeros(1300, dtype=bool)
    for members in real_tree.query_ball_point(generated, generated_radii):
        covered[members] = True
    found = compare(real, generated)
    assert found == (realistic.mean(), covered.mean())
    assert 0.1 < found.precision < 0.95
    assert 0.1 < found.recall < 0.95


def test_laws_of_shift_scale_rotation_and_order():
    rng = np.random.default_rng(5)
    real, generated = rng.normal(size=(200, 3)), rng.normal(size=(150, 3)) + 1
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    expected = compare(real, generated)
    assert compare(real + 1e6, generated + 1e6) == expected
    assert compare(1e-6 * real, 1e-6 * generated) == expected
    assert compare(real @ rotation, generated @ rotation) == expected
    assert compare(rng.permutation(real), generated[::-1]) == expected


def test_memory_grows_with_the_rows_and_not_with_their_pairs():
    points = np.random.default_rng(6).normal(size=(5000, 2))
    tracemalloc.start()
    compare(points, points)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.6 * 8 * len(points) ** 2


def test_input_that_makes_no_manifold():
    with pytest.raises(UserError, match="at least 4 rows, got 3"):
        Manifold.from_features(np.zeros((3, 2)))
    with pytest.raises(UserError, match="k must be at least 1"):
        Manifold.from_features(np.zeros((3, 2)), k=0)
    with pytest.raises(UserError, match="NaN or infinity"):
        Manifold.from_features(np.full((5, 2), np.nan))
    with pytest.raises(UserError, match="same dimension, got 2 and 3"):
        compare(np.zeros((5, 2)), np.zeros((5, 3)))


def test_devices_make_no_difference(mesh_of):
    rng = np.random.default_rng(7)
    real, generated = rng.normal(size=(1100, 5)), rng.normal(size=(1050, 5)) * 1.1 + 0.4
    found = []
    for count in (1, 4):
        mesh = mesh_of(count)
        manifolds = [Manifold.from_features(each, mesh=mesh) for each in (real, generated)]
        found.append((manifolds[0].squared_radii, precision_recall(*manifolds, mesh=mesh)))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert 0.1 < found[0][1].precision < 0.95


def test_points_that_float32_cannot_distinguish():
    # Clusters of points at 1e-6 of their distance from each other.
    rng = np.random.default_rng(8)
    centres = rng.normal(size=(10, 1, 4))
    real, generated = (
        (centres + 1e-6 * rng.normal(size=(10, 30, 4))).reshape(-1, 4) for _ in range(2)
    )
    distances = np.linalg.norm(real[:, None] - generated, axis=2)
    real_radii, generated_radii = (cKDTree(x).query(x, k=4)[0][:, 3] for x in (real, generated))
    found = Manifold.from_features(real).squared_radii
    np.testing.assert_allclose(found, real_radii**2, rtol=1e-6)
    realistic = (distances <= real_radii[:, None]).any(axis=0)
    covered = (distances <= generated_radii).any(axis=1)
    assert 0.3 < realistic.mean() < 1
    assert compare(real, generated) == (realistic.mean(), covered.mean())

"""What earlier versions left on disk: it loads, samples, is started from and resumed as it was then.

`old_runs/9ec6d88.tar.xz` is a run of configs/mixture2d.py:runlocal with a tiny network, by the code of
that commit; its last round stopped at update 6 of 8. Its `expected.json` has what that code returned:
samples of four classes at w = 1, seed 5, and the last line of the whole log.
`about_before_conditions.json` is of a checkpoint from before networks took conditions other than labels.
"""

import json
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

from guided_distill import cli
from guided_distill.runs.files import read_stages
from guided_distill.runs.folder import finished_stages
from guided_distill.runs.trained import Description, load_finished
from guided_distill.sampling.labels import of_labels
from guided_distill.sampling.request import Request
from guided_distill.sampling.sample import sample
from guided_distill.training.digests import FILE
from guided_distill.training.record import read_metrics

ROOT = Path(__file__).parents[1]
OLD_RUNS = Path(__file__).with_name("old_runs")
CONFIG = [
    *("--config", f"{ROOT / 'configs' / 'mixture2d.py'}:runlocal"),
    "--config.model.options={'width': 8, 'depth': 1, 'embedding_width': 8}",
    "--config.halving.samplers=('ddim',)",
    "--config.halving.first_num_steps=2",
    "--config.halving.last_num_steps=1",
    "--config.checkpoints_to_keep=2",
]


@pytest.fixture
def run(tmp_path):
    with tarfile.open(OLD_RUNS / "9ec6d88.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return epath.Path(tmp_path / "old_run")


def expected(run):
    return json.loads((run / "expected.json").read_text())


def train(workdir, *more):
    return cli.main(["train", "--workdir", str(workdir), *CONFIG, *more])


@pytest.mark.parametrize("with_digests", [True, False], ids=["digests", "no_digests"])
def test_its_stages_load_and_sample_the_same(run, with_digests):
    """The first checkpoints of all had no digests."""
    assert finished_stages(run) == ["teacher", "guidance", "halving_ddim_2"]
    for stage, then in expected(run)["samples"].items():
        if not with_digests:
            (digests,) = (run / stage).glob(f"checkpoints/*/{FILE}")
            digests.unlink()
        trained = load_finished(run / stage)
        found = sample(
            trained,
            Request(condition=of_labels([0, 1, 2, 3]), w=1.0, num_steps=then["num_steps"], seed=5),
        )
        np.testing.assert_allclose(found, then["samples"], atol=1e-5)


def test_it_resumes_where_it_stopped(run):
    assert train(run) == 0
    assert list(read_stages(run)) == finished_stages(run)
    rows = read_metrics(run / "halving_ddim_1")
    # The noise of an update is drawn in another way since, so its loss is another, but of that size.
    then = expected(run)["resumed"]
    assert rows[-1].keys() == then.keys()
    assert rows[-1]["step"] == then["step"] == 8
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
    assert rows[-1]["loss"] == pytest.approx(then["loss"], rel=0.5)


def test_another_run_starts_from_it(run, tmp_path):
    new = epath.Path(tmp_path / "new")
    start = f"--config.start_from={run / 'halving_ddim_2'}"
    assert train(new, start, "--config.halving.first_num_steps=1") == 0
    about = load_finished(new / "halving_ddim_1").description
    assert about.teacher == {"path": str(run / "halving_ddim_2"), "step": 8}
    assert read_stages(new) == {"halving_ddim_1": 8}


def test_a_description_without_conditions_is_of_labels():
    values = json.loads((OLD_RUNS / "about_before_conditions.json").read_text())
    about = Description.from_json(values)
    assert about.condition_shapes == {"label": ()}
    assert not about.latent
    assert about.network().w_conditioned
    shapes = jax.eval_shape(about.network().init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 1_911_996

"""The rows of a stage that `evaluate` measures."""

import pytest

from guided_distill.config import Evaluation, Experiment, Halving
from guided_distill.objectives.stage import Stage

EXPERIMENT = Experiment(
    halving=Halving(first_num_steps=8),
    evaluation=Evaluation(teacher_samplers=("ddim", "ancestral"), teacher_num_steps=(2, 16)),
)
OF_TEACHERS = [("ddim", 2), ("ddim", 16), ("ancestral", 2), ("ancestral", 16)]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, OF_TEACHERS),
        ({"w_range": (0.0, 4.0)}, [("ddim", 16)]),
        ({"w_range": (0.0, 4.0), "num_steps": 4, "sampler": "ddim"}, [("ddim", 4)]),
        ({"w_range": (0.0, 4.0), "num_steps": 4, "sampler": "stochastic"}, [("stochastic", 4)]),
        ({"w_range": (0.0, 4.0), "num_steps": 4, "sampler": "encode"}, []),
        ({"num_steps": 2, "sampler": "ddim"}, [("ddim", 2)]),
    ],
)
def test_a_stage_of_any_kind_lists_its_samplings(fields, expected):
    class Rectified(Stage):
        kind = "rectified"

        @classmethod
        def extend(cls, chain, experiment):
            raise NotImplementedError

        def loss(self, student, teacher):
            raise NotImplementedError

    stage = Rectified(settings=EXPERIMENT.teacher, total_steps=1, **fields)
    assert stage.samplings(EXPERIMENT) == expected

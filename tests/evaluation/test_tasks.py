"""Which rows `evaluate` measures of a stage."""

import dataclasses

import pytest

from guided_distill.config import Evaluation, Experiment, Halving
from guided_distill.stages import Stage, samplings

EXPERIMENT = Experiment(halving=Halving(first_num_steps=8))
EVALUATION = Evaluation(teacher_samplers=("ddim", "ancestral"), teacher_num_steps=(2, 16))
OF_TEACHERS = [("ddim", 2), ("ddim", 16), ("ancestral", 2), ("ancestral", 16)]


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ({"kind": "teacher", "takes_w": False}, OF_TEACHERS),
        ({"kind": "guidance", "takes_w": True}, [("ddim", 16)]),
        ({"kind": "halving", "num_steps": 4, "sampler": "ddim"}, [("ddim", 4)]),
        ({"kind": "halving", "num_steps": 4, "sampler": "stochastic"}, [("stochastic", 4)]),
        ({"kind": "halving", "num_steps": 4, "sampler": "encode"}, []),
        ({"kind": "rectified", "takes_w": True}, [("ddim", 16)]),
        ({"kind": "rectified", "takes_w": False}, OF_TEACHERS),
        ({"kind": "rectified", "num_steps": 2, "sampler": "ddim"}, [("ddim", 2)]),
    ],
)
def test_a_stage_of_any_kind_says_how_it_is_sampled(stage, expected):
    stage = Stage(settings=EXPERIMENT.teacher, total_steps=1, **{"takes_w": True, **stage})
    assert samplings(stage, EXPERIMENT, EVALUATION) == expected
    assert samplings(dataclasses.replace(stage, kind="other"), EXPERIMENT, EVALUATION) == expected

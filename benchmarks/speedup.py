"""Measure how much faster a student samples than its teacher, beside the ratio of their network calls.

    python benchmarks/speedup.py runs/digits/teacher runs/digits/halving_ddim_4 64

Arguments: a class-conditional teacher and student, each the folder of a stage or a .safetensors file, and
the teacher's number of steps.
"""

import sys
import time

from etils import epath

from guided_distill.runs.trained import Trained, load_finished
from guided_distill.sampling.labels import cycling_labels, of_labels
from guided_distill.sampling.request import Request
from guided_distill.sampling.sample import sample

COUNT = 256
REPEATS = 4


def seconds(trained: Trained, num_steps: int) -> float:
    labels = cycling_labels(COUNT, len(trained.description.class_names))
    start = time.perf_counter()
    sample(
        trained, Request(condition=of_labels(labels), w=1.0, num_steps=num_steps, batch_size=COUNT)
    )
    return time.perf_counter() - start


def main() -> None:
    teacher, student = (load_finished(epath.Path(path)) for path in sys.argv[1:3])
    teacher_steps = int(sys.argv[3])
    steps = student.description.num_steps or 1
    # Compile both before timing.
    seconds(teacher, 1)
    seconds(student, steps)
    slow = seconds(teacher, teacher_steps)
    fast = sum(seconds(student, steps) for _ in range(REPEATS)) / REPEATS
    print(
        f"teacher {slow:.2f} s, student {fast:.3f} s: {slow / fast:.1f} times faster, "
        f"with {2 * teacher_steps / steps:g} times fewer network calls"
    )


if __name__ == "__main__":
    main()

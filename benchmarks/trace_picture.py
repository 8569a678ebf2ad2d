"""A picture of the trace that `guided-distill train --profile` wrote: what each thread did when.

python benchmarks/trace_picture.py runs/digits/teacher docs/images/trace.png
"""

import gzip
import json
import sys
from collections import defaultdict

import matplotlib
from etils import epath

matplotlib.use("agg")
import matplotlib.pyplot as plt

COLORS = {"input": "tab:orange", "train": "tab:blue", "checkpoint": "tab:red"}
"""The loop's own annotations."""

OPERATION = "0.75"
THREADS = 4


def read_events(stage: epath.Path) -> list[dict]:
    """Return the timed events of the newest trace in a stage's folder."""
    newest = max((stage / "profile" / "plugins" / "profile").iterdir())
    text = gzip.decompress((newest / "perfetto_trace.json.gz").read_bytes())
    return [each for each in json.loads(text)["traceEvents"] if each.get("ph") == "X"]


def draw(events: list[dict], out: epath.Path) -> None:
    """Draw the thread of the loop above the busiest threads of the compiled program."""
    threads = defaultdict(list)
    for event in events:
        threads[event["tid"]].append(event)
    loop = next(each["tid"] for each in events if each["name"] == "train")
    others = [tid for tid in threads if tid != loop]
    others.sort(key=lambda tid: -sum(each["dur"] for each in threads[tid]))
    annotated = [each for each in threads[loop] if each["name"] in COLORS]
    start = min(each["ts"] for each in annotated)
    lanes = [("loop", annotated)]
    lanes += [(f"thread {n}", threads[tid]) for n, tid in enumerate(others[:THREADS], start=1)]
    figure, axes = plt.subplots(figsize=(9, 3), layout="constrained")
    for row, (_, drawn) in enumerate(lanes):
        spans = [((each["ts"] - start) / 1e3, max(each["dur"] / 1e3, 0.05)) for each in drawn]
        colors = [COLORS.get(each["name"], OPERATION) for each in drawn]
        axes.broken_barh(spans, (row - 0.4, 0.8), color=colors)
    axes.set_yticks(range(len(lanes)), [name for name, _ in lanes])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("milliseconds")
    named = {each["name"] for each in annotated}
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLORS[name]) for name in COLORS if name in named]
    handles.append(plt.Rectangle((0, 0), 1, 1, color=OPERATION))
    labels = [name for name in COLORS if name in named] + ["operations of the step"]
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    with out.open("wb") as file:
        figure.savefig(file, dpi=120)


if __name__ == "__main__":
    stage, out = map(epath.Path, sys.argv[1:])
    draw(read_events(stage), out)

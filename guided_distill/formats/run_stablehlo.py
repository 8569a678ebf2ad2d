"""Draw samples with the exported program beside this file; needs only jax, numpy and safetensors.

python run_stablehlo.py --num 8 --w 1.0 --seed 0
"""

import argparse
import json
from pathlib import Path

import numpy as np
from jax import export
from safetensors.numpy import load_file

FOLDER = Path(__file__).parent
about = json.loads((FOLDER / "about.json").read_text())
takes = about["condition_shapes"]

parser = argparse.ArgumentParser()
parser.add_argument("--num", type=int, default=8, help="number of samples; classes alternate")
parser.add_argument(
    "--condition", type=Path, help=f"an npz file with the arrays {', '.join(takes)}"
)
parser.add_argument("--w", type=float, default=min(max(1.0, about["w_min"]), about["w_max"]))
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("samples.npz"))
options = parser.parse_args()
if not about["w_min"] <= options.w <= about["w_max"]:
    parser.error(
        f"--w is {options.w}; choose one from {about['w_min']} to {about['w_max']}, as trained"
    )

if options.condition:
    with np.load(options.condition) as given:
        if missing := [name for name in takes if name not in given]:
            parser.error(f"--condition {options.condition} lacks {', '.join(missing)}")
        condition = {name: given[name] for name in takes}
elif list(takes) == ["label"]:
    condition = {"label": np.arange(options.num) % about["num_classes"]}
else:
    parser.error(f"give --condition, an npz file with {', '.join(takes)}: see README.md")
condition = {
    name: np.asarray(each, np.int32 if name == "label" else np.float32)
    for name, each in condition.items()
}
count = len(next(iter(condition.values())))

sampler = export.deserialize(bytearray((FOLDER / "sampler.stablehlo").read_bytes()))
weights = load_file(FOLDER / "weights.safetensors")
w = np.full(count, options.w, np.float32)
drawn = np.asarray(sampler.call(weights, np.uint32(options.seed), condition, w))
arrays = {"latent" if about["latent"] else "image": drawn}
if "label" in condition:
    arrays["label"] = condition["label"]
np.savez(options.out, allow_pickle=False, **arrays)

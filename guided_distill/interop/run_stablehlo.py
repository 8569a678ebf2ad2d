"""Draw samples by the exported program beside this file, with jax, numpy and safetensors alone.

python run_stablehlo.py --num 8 --w 1.0 --seed 0
"""

import argparse
import json
from pathlib import Path

import numpy as np
from jax import export
from safetensors.numpy import load_file

FOLDER = Path(__file__).parent
parser = argparse.ArgumentParser()
parser.add_argument("--num", type=int, default=8)
parser.add_argument("--w", type=float, default=1.0)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("samples.npz"))
options = parser.parse_args()

about = json.loads((FOLDER / "about.json").read_text())
sampler = export.deserialize(bytearray((FOLDER / "sampler.stablehlo").read_bytes()))
weights = load_file(FOLDER / "weights.safetensors")
labels = np.arange(options.num, dtype=np.int32) % about["num_classes"]
w = np.full(options.num, options.w, np.float32)
images = sampler.call(weights, np.uint32(options.seed), {"label": labels}, w)
np.savez(options.out, image=np.asarray(images), label=labels)

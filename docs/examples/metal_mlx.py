"""Run an artifact for Metal inside MLX, and compare with the test vector in it.

pip install opcompile mlx; python metal_mlx.py DIR

MLX writes the kernel's head itself and takes the body alone, and its grid counts threads.
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np

from opcompile.simulate import Simulated

place = Path(sys.argv[1])
launch = json.loads((place / "launch.json").read_text())
layer = Simulated(place)  # for its test vector and its packing; nothing is simulated
golden = layer.golden()
arrays = {"x": golden.x, "w": layer.packing(golden.w), "b": golden.b}
names = {"x": "X_ptr", "w": "W_ptr", "b": "B_ptr"}

text = (place / "kernel.metal").read_text()
head, kernel = text.split("kernel void", 1)
body = kernel[kernel.index(") {") + 3 : kernel.rindex("}")]
# simdgroups that multiply matrices lie along y
index, axes = ("uint2", "xy") if launch["block"][1] > 1 else ("uint", "x")
here = f"{index} blockIdx = threadgroup_position_in_grid.{axes};\n"
here += f"{index} threadIdx = thread_position_in_threadgroup.{axes};\n"
inputs = [name for name in launch["arguments"] if name in arrays]
if "batch" in launch["arguments"]:
    sys.exit("MLX passes arrays alone; compile for a fixed batch")
call = mx.fast.metal_kernel(
    name="conv_transpose3d",
    input_names=[names[name] for name in inputs],
    output_names=["output_ptr"],
    header=head.split("using namespace metal;")[1],
    source=here + body,
)
y_shape = (golden.x.shape[0], *layer.spec.y_shape[1:])
(y,) = call(
    inputs=[mx.array(arrays[name]) for name in inputs],
    grid=(launch["grid"][0] * launch["block"][0], *launch["block"][1:]),
    threadgroup=tuple(launch["block"]),
    output_shapes=[y_shape],
    output_dtypes=[getattr(mx, layer.spec.dtype)],
)
difference = np.array(y).reshape(-1)[golden.indices] - golden.expected
print("largest difference from the test vector:", np.abs(difference).max())

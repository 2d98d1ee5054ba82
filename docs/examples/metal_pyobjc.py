"""Run an artifact for Metal on a Mac, and compare with the test vector in it.

pip install opcompile pyobjc-framework-Metal; python metal_pyobjc.py DIR
"""

import json
import sys
from pathlib import Path

import Metal
import numpy as np

from opcompile.simulate import Simulated

place = Path(sys.argv[1])
launch = json.loads((place / "launch.json").read_text())
layer = Simulated(place)  # for its test vector and its packing; nothing is simulated
golden = layer.golden()
batch = golden.x.shape[0]
y_bytes = golden.x.itemsize * batch * int(np.prod(layer.spec.y_shape[1:]))
arrays = {"x": golden.x, "w": layer.packing(golden.w), "b": golden.b}

device = Metal.MTLCreateSystemDefaultDevice()
options = Metal.MTLCompileOptions.new()
options.setFastMathEnabled_(False)  # the error bound holds for IEEE arithmetic
library, error = device.newLibraryWithSource_options_error_((place / "kernel.metal").read_text(), options, None)
if library is None:
    sys.exit(str(error))
function = library.newFunctionWithName_(launch["kernel"])
pipeline, error = device.newComputePipelineStateWithFunction_error_(function, None)
if pipeline is None:
    sys.exit(str(error))
threads = int(np.prod(launch["block"]))
if threads > pipeline.maxTotalThreadsPerThreadgroup():
    sys.exit(f"this GPU runs at most {pipeline.maxTotalThreadsPerThreadgroup()} threads of the kernel, not {threads}")

result = device.newBufferWithLength_options_(y_bytes, Metal.MTLResourceStorageModeShared)
command = device.newCommandQueue().commandBuffer()
encoder = command.computeCommandEncoder()
encoder.setComputePipelineState_(pipeline)
for index, name in enumerate(launch["arguments"]):
    if name == "batch":
        encoder.setBytes_length_atIndex_(np.int64(batch).tobytes(), 8, index)
        continue
    buffer = result
    if name != "y":
        content = np.ascontiguousarray(arrays[name]).tobytes()
        buffer = device.newBufferWithBytes_length_options_(content, len(content), Metal.MTLResourceStorageModeShared)
    encoder.setBuffer_offset_atIndex_(buffer, 0, index)
blocks = launch["grid"][0] or launch["blocks_per_image"] * batch
encoder.dispatchThreadgroups_threadsPerThreadgroup_(
    Metal.MTLSizeMake(blocks, 1, 1), Metal.MTLSizeMake(*launch["block"])
)
encoder.endEncoding()
command.commit()
command.waitUntilCompleted()
if command.error() is not None:
    sys.exit(str(command.error()))

y = np.frombuffer(result.contents().as_buffer(y_bytes), golden.x.dtype)
print("largest difference from the test vector:", np.abs(y[golden.indices] - golden.expected).max())

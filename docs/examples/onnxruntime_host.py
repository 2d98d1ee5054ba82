"""Run a model whose nodes were replaced.

python onnxruntime_host.py DIR/model.onnx DIR/opcompile_ops.so
"""

import sys

import numpy as np
import onnxruntime

model, library = sys.argv[1:]
options = onnxruntime.SessionOptions()
options.register_custom_ops_library(library)
options.intra_op_num_threads = 2
session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

# an open size counts as 1
feeds = {i.name: np.ones([n if isinstance(n, int) else 1 for n in i.shape], np.float32) for i in session.get_inputs()}
for output, y in zip(session.get_outputs(), session.run(None, feeds), strict=True):
    print(output.name, y.shape, y.dtype, "sum of magnitudes", np.abs(y, dtype=np.float64).sum())

"""Call the layers in the directories that are named, each on its own test vector, on this machine's GPU.

A program that NVIDIA's checkers can watch: it allocates by the driver, and nothing but our kernels runs.
"""

from __future__ import annotations

import sys
from pathlib import Path

from opcompile._measure_gpu import _require_right
from opcompile.cuda_driver import Gpu
from opcompile.manifest import opened
from opcompile.runtime_cuda import CudaArtifact

if __name__ == "__main__":
    gpu = Gpu()
    for directory in sys.argv[1:]:
        layer = CudaArtifact(*opened(Path(directory)))
        _require_right(gpu, layer, layer.golden())
        print(directory)

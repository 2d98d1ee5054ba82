"""Other people's words -> layers: one module a system, with that system's functions by their own names.

`onnx` reads models; `torch`, `mlx`, `rmlx`, `lucid`, `keras`, `tensorflow` and `jax` read calls, and what they can
of modules and models; `files` reads weights; `imported` is what all but `onnx` give.
"""

"""CUDA C++ kernels for SM90, compiled on first use by NVRTC through `cuda.bindings`; imported only there."""

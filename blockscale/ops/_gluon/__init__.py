"""Kernels in Gluon, Triton's explicit dialect, for Hopper (SM90): the large-M end of the block-scaled GEMMs.

gemm.py    warp-specialized persistent GEMM, dense and grouped (contiguous), one kernel
compat.py  the Gluon names that differ between Triton releases
"""

"""Triton kernels and their launchers; importing a module of this package imports triton."""

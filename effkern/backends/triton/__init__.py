"""Triton kernels, for GPUs without a CUDA build of effkern; in the interpreter, for CPU tensors.

One file per op family. This package imports nothing, so that it can be named where Triton is not
installed; its modules import Triton.
"""

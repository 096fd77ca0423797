"""Kernels for GPUs, in Triton. Nothing here is imported before a call needs it: triton need not be installed."""

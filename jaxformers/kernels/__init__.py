"""Kernels: a family a file, each with its reference in ``jax.numpy``, its Pallas kernels, and the choice between them.

Nothing here imports anything but jax, so that a kernel can be tried on a machine that has no more than that.
"""

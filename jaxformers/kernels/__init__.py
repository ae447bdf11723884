"""Kernels: a family a file, each with its reference in ``jax.numpy``, its Pallas kernels, and the choice between them.

Nothing here imports anything but jax, so that a kernel can be tried on a machine that has no more than that.

There is no product with N:M sparse weights: JAX has given up its own (``jax.experimental.sparse.nm``), the ``dot`` of
Pallas on Triton does not reach the sparse tensor cores, and without them 2:4 weights save bytes only. They would read
0.56 of bfloat16's, where 4-bit weights read 0.27 and gained 2.1 to 2.75 (benchmarks/results/kernels_lowbit.md).
"""

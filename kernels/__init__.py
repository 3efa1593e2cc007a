"""Triton kernels and their launchers, installed as `fastgan.kernels`. Autograd is in `fastgan.ops`.

Modules import each other relatively: type checkers see this folder as a package of its own, in which absolute imports
of `fastgan.kernels` have no types.
"""

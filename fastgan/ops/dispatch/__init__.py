"""The implementations of an op and which of them runs: choice, entries of compiled kernels, their compilation."""

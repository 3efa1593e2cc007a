"""Attention that can be differentiated twice, in models of other packages. Each file needs the package of its name."""

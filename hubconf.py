"""For torch.hub: `torch.hub.load("OWNER/fastgan", "generator", path="RUN")`; see docs/export.md."""

dependencies = ["torch", "numpy", "safetensors"]


def trained(path, device="cpu"):
    """What `fastgan.load(path)` gives, with `.sample(n, seed)` and `.interpolate(rows, columns, seed)`.

    path: a run, a checkpoint, an exported .safetensors or .onnx file, or a folder with one.
    """
    import fastgan

    return fastgan.load(path, device)


def generator(path, device="cpu"):
    """The network of such a path as a module: latent [N, latent] (and labels int64 [N]) -> images [N, C, R, R]."""
    return trained(path, device).module

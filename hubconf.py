"""Entry points of torch.hub: `torch.hub.load("OWNER/fastgan", "generator", path="RUN")`; see docs/export.md."""

dependencies = ["torch", "numpy", "safetensors"]


def trained(path, device="cpu"):
    """A `fastgan.generator.TrainedGenerator`, with `.sample(n, seed)` and `.interpolate(rows, columns, seed)`.

    Args:
        path: a run, a checkpoint, an exported .safetensors or .onnx file, or a folder with one.
        device: "cpu", "cuda" or "cuda:1".
    """
    import fastgan

    return fastgan.load(path, device)


def generator(path, device="cpu"):
    """The network of `path` as a module: latent [N, latent] (and labels int64 [N]) -> images [N, C, R, R]."""
    return trained(path, device).module

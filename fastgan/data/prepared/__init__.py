"""A prepared set on disk: its manifest, which is written last, and the images. docs/data.md describes every file."""

from fastgan.data.prepared.manifest import Manifest, is_prepared, read_manifest
from fastgan.data.prepared.reader import Level, PreparedSource

__all__ = ["Level", "Manifest", "PreparedSource", "is_prepared", "read_manifest"]

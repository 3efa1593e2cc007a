"""Listing the input images: the first step of a preparation, and the check that they are still the same."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator

from fastgan.data.preparation.collection import InputCollection, InputImage
from fastgan.data.preparation.state import PreparationState
from fastgan.errors import ArgumentError, printable


def iterate(collection: InputCollection, on_image: Callable[[int], object]) -> Iterator[InputImage]:
    """Yield all images, and call `on_image(1)` after each.

    Raises:
        ArgumentError: the collection is damaged or cannot be read.
    """
    try:
        for image in collection.images():
            yield image
            on_image(1)
    except OSError as error:
        problem = f"it cannot be read ({error.filename or collection.path}: {error.strerror or error})"
        raise ArgumentError("SRC", collection.title, problem) from error


def digest_of(collection: InputCollection) -> str:
    """Return 16 hex digits that change with the images or their order."""
    digest = hashlib.sha256()
    for image in iterate(collection, lambda count: None):
        digest.update(collection.identity(image))
    return digest.hexdigest()[:16]


def write_list(
    state: PreparationState, collection: InputCollection, per_shard: int, images: Iterator[InputImage]
) -> tuple[int, str]:
    """Write the list of images shard by shard; return their number and their digest, as `digest_of` computes it."""
    count, shard, digest = 0, 0, hashlib.sha256()
    while part := list(itertools.islice(images, per_shard)):
        for image in part:
            digest.update(collection.identity(image))
        state.write("items", shard, part)
        count, shard = count + len(part), shard + 1
    return count, digest.hexdigest()[:16]


def listing_change(state: PreparationState, count: int, per_shard: int, images: Iterator[InputImage]) -> str:
    """Return the first difference between the stored list and `images`, as in "a.png is new", or ""."""
    stored = (image for shard in range(-(-count // per_shard)) for image in state.images(shard))
    for old, new in itertools.zip_longest(stored, images):
        if old == new:
            continue
        if old is None or (new is not None and new.name < old.name):
            return f"{printable(new.name)} is new"
        if new is None or new.name != old.name:
            return f"{printable(old.name)} is gone"
        return f"{printable(old.name)} has changed"
    return ""

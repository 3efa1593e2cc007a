"""Gradient buckets."""

from __future__ import annotations

from fastgan.utils.buckets import pack


def test_buckets_close_when_they_are_full() -> None:
    assert pack([3, 3, 3, 9, 1], limit=6) == [[0, 1], [2, 3], [4]]
    assert pack([20], limit=6) == [[0]] and pack([], limit=6) == []

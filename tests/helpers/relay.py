"""A link between two tap devices: the first one's packets are delayed or lost, the second one's pass at once.

    python relay.py TAP TAP SECONDS SHARE

A tap device delivers whole packets with checksums, whatever the sender's offloads.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import os
import random
import select
import struct
import sys
import time

_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000


def _open(name: str) -> int:
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TAP | _IFF_NO_PI))
    return device


def _pass_on(device: int, packet: bytes) -> None:
    with contextlib.suppress(OSError):  # the other device is down
        os.write(device, packet)


def main() -> None:
    near, far, delay, loss = _open(sys.argv[1]), _open(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])
    draw = random.Random(0)
    waiting: collections.deque[tuple[float, bytes]] = collections.deque()
    print("ready", flush=True)
    while True:
        wait = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        readable = select.select([near, far], [], [], wait)[0]
        for device in readable:
            for _ in range(64):
                try:
                    packet = os.read(device, 65536)
                except OSError:  # no more packets, or the device is not up yet
                    break
                if device == far:
                    _pass_on(near, packet)
                elif draw.random() >= loss:
                    waiting.append((time.monotonic() + delay, packet))
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _pass_on(far, waiting.popleft()[1])


if __name__ == "__main__":
    main()

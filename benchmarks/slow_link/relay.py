"""A wire in user space: carries packets between TUN devices, one a namespace, with a delay and a rate for each sender.

    python -m benchmarks.slow_link.relay DELAY_MS RATE_MBIT NAMESPACE:ADDRESS ...

Prints "up" when the devices are ready, and runs until it is terminated. A sender's queue is 100 ms long; what comes
when it is full is dropped, as a router would. RATE 0 is no limit.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import os
import select
import socket
import struct
import subprocess
import sys
import time
from contextlib import suppress

CLONE_NEWNET = 0x40000000
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
QUEUE = 0.1  # seconds
MTU = 9000
BATCH = 32  # packets read from one device before the others have their turn


def _enter(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")


def opened(namespace: str, address: str) -> int:
    """A TUN device called `line` in the namespace, up, with this address; its descriptor, which stays valid here."""
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    there = os.open(f"/var/run/netns/{namespace}", os.O_RDONLY)
    try:
        _enter(there)
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH14x", b"line", IFF_TUN | IFF_NO_PI))
    finally:
        _enter(home)
        os.close(there)
        os.close(home)
    ip = ["ip", "-n", namespace]
    subprocess.run([*ip, "addr", "add", f"{address}/24", "dev", "line"], check=True)
    subprocess.run([*ip, "link", "set", "line", "up", "mtu", str(MTU), "txqueuelen", "2000"], check=True)
    return device


def carry(devices: dict[bytes, int], delay: float, rate: float) -> None:
    """Forever: take a packet, wait for its sender's line to be free, hand it over `delay` seconds later."""
    sender = {device: address for address, device in devices.items()}
    free = dict.fromkeys(devices, 0.0)
    waiting: list[tuple[float, int, int, bytes]] = []
    count, poll = 0, select.epoll()
    for device in sender:
        poll.register(device, select.EPOLLIN)
    while True:
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, _, device, packet = heapq.heappop(waiting)
            with suppress(BlockingIOError):  # a full device drops, as a full port does
                os.write(device, packet)
        for device, _ in poll.poll(max(0.0, waiting[0][0] - time.monotonic()) if waiting else -1):
            for packet in _packets(device):
                target = devices.get(packet[16:20])
                begin = max(time.monotonic(), free[sender[device]])
                if target is None or (rate and begin - time.monotonic() > QUEUE):
                    continue
                free[sender[device]] = begin + (len(packet) / rate if rate else 0.0)
                count += 1
                heapq.heappush(waiting, (free[sender[device]] + delay, count, target, packet))


def _packets(device: int) -> list[bytes]:
    """What the device has at hand, IPv4 alone."""
    found = []
    for _ in range(BATCH):
        try:
            packet = os.read(device, 65536)
        except BlockingIOError:
            break
        if packet[0] >> 4 == 4:
            found.append(packet)
    return found


if __name__ == "__main__":
    lines = [word.split(":") for word in sys.argv[3:]]
    tuns = {socket.inet_aton(address): opened(namespace, address) for namespace, address in lines}
    print("up", flush=True)
    carry(tuns, float(sys.argv[1]) / 1e3, float(sys.argv[2]) * 1e6 / 8)

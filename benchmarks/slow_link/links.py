"""Slow links between network namespaces on one machine: a rate in both directions, and a delay where one is asked for.

Without a delay the kernel shapes: one namespace a rank, a bridge in a namespace of its own between them, and a token
bucket (tbf) at both ends of every cable. The kernels at hand often lack netem, so a delay is made by `relay`, which
carries the packets of one TUN device a namespace in user space.

Needs root, and iproute2. Everything is removed at the end, also after an exception; names hold this process's id.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

SUBNET = "10.77.0"
BURST = {10: "32kb", 100: "64kb"}  # a token bucket must hold what arrives between two of the kernel's ticks


@dataclass(frozen=True)
class Link:
    """What every rank's line can do: `rate` Mbit/s each way (None: unshaped), `delay` ms one way."""

    rate: float | None
    delay: float = 0.0

    def __str__(self) -> str:
        rate = "unshaped" if self.rate is None else f"{self.rate:g} Mbit/s"
        return rate + (f", {self.delay:g} ms" if self.delay else "")


@dataclass(frozen=True)
class Place:
    """A rank's namespace, the device its line ends in, and its address."""

    namespace: str
    device: str
    address: str

    def command(self, words: list[str]) -> list[str]:
        """The command that runs these words there."""
        return ["ip", "netns", "exec", self.namespace, *words]

    def counted(self) -> tuple[int, int]:
        """(sent, received) bytes of the device so far, headers of all protocols included."""
        said = _ip("-n", self.namespace, "-s", "-j", "link", "show", "dev", self.device)
        statistics = json.loads(said)[0]["stats64"]
        return int(statistics["tx"]["bytes"]), int(statistics["rx"]["bytes"])


def _ip(*words: str) -> str:
    return _run("ip", *words)


def _run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(words)}: {done.stderr.strip() or f'exit {done.returncode}'}")
    return done.stdout


def missing() -> str | None:
    """Why namespaces cannot be made here; None if they can."""
    if sys.platform != "linux":
        return f"network namespaces need Linux, and this is {sys.platform}"
    if os.geteuid() != 0:
        return "network namespaces need root: run the command with sudo"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed: install iproute2"
    return None


@contextmanager
def links(ranks: int, link: Link) -> Iterator[list[Place]]:
    """A place for each rank. Raises OSError where the kernel refuses (the reason is in the words)."""
    why = missing()
    if why is not None:
        raise OSError(why)
    names = [f"shoal{os.getpid()}-{rank}" for rank in range(ranks)]
    with ExitStack() as stack:
        for name in names:
            _namespace(name, stack)
        yield (_relayed if link.delay else _bridged)(names, link, stack)


def _namespace(name: str, stack: ExitStack) -> None:
    _ip("netns", "add", name)
    stack.callback(_ip, "netns", "del", name)
    _ip("-n", name, "link", "set", "lo", "up")


def _bridged(names: list[str], link: Link, stack: ExitStack) -> list[Place]:
    """A cable from each namespace to one bridge, shaped at both ends: up and down are limited apart."""
    hub = f"shoal{os.getpid()}-hub"
    _namespace(hub, stack)
    _ip("-n", hub, "link", "add", "bridge", "type", "bridge")
    _ip("-n", hub, "link", "set", "bridge", "up")
    places = []
    for rank, name in enumerate(names):
        port = f"port{rank}"
        _ip("link", "add", "line", "netns", name, "type", "veth", "peer", "name", port, "netns", hub)
        _ip("-n", hub, "link", "set", port, "master", "bridge", "up")
        _ip("-n", name, "addr", "add", f"{SUBNET}.{rank + 1}/24", "dev", "line")
        _ip("-n", name, "link", "set", "line", "up")
        if link.rate is not None:
            burst = BURST.get(int(link.rate), "256kb")
            shape = ("root", "tbf", "rate", f"{link.rate:g}mbit", "burst", burst, "latency", "100ms")
            _run("tc", "-n", name, "qdisc", "add", "dev", "line", *shape)
            _run("tc", "-n", hub, "qdisc", "add", "dev", port, *shape)
        places.append(Place(name, "line", f"{SUBNET}.{rank + 1}"))
    return places


def _relayed(names: list[str], link: Link, stack: ExitStack) -> list[Place]:
    """One TUN device a namespace, with the relay between them as a process of its own."""
    places = [Place(name, "line", f"{SUBNET}.{rank + 1}") for rank, name in enumerate(names)]
    words = [sys.executable, "-m", "benchmarks.slow_link.relay", str(link.delay), str(link.rate or 0.0)]
    words += [f"{place.namespace}:{place.address}" for place in places]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    stack.callback(process.wait)
    stack.callback(process.terminate)
    assert process.stdout is not None
    if process.stdout.readline().strip() != "up":
        raise OSError("the relay did not start; what it said stands above.")
    return places

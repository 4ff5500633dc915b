"""Pull the plug of one of two machines that train, or kill its rank, and compare the model with the undisturbed one.

    sudo python scripts/plug.py                  # all of it, about four minutes
    sudo python scripts/plug.py --only kill      # one disturbance

Two network namespaces stand for the machines, with a line of 100 Mbit/s each way between them; in each of them one
torchrun starts one rank of examples/train.py, with a disk (a folder) of its own. "Pulled" means that the cable's far
end goes down: the machine sees no carrier, and packets are lost in both directions. Needs root and iproute2; whatever
happens, the namespaces and the processes are gone at the end. Exit status 1 unless all ended at the identical model.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console

from benchmarks.slow_link.links import Link, Place, links, missing

ROOT = Path(__file__).resolve().parent.parent
PORT = 29400
SAID = re.compile(r"SHA-256 of the model: ([0-9a-f]{64})")


class Machine:
    """A namespace with a disk of its own, and the torchrun that runs there."""

    def __init__(self, node: int, place: Place, host: Place, folder: Path, given: argparse.Namespace) -> None:
        self.node, self.place, self.disk = node, place, folder / f"machine{node}"
        self.log = folder / f"machine{node}.log"
        self.disk.mkdir()
        words = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
            "--max-restarts", "3", *RENDEZVOUS[given.rdzv](node, host), "--local-addr", place.address,
            str(ROOT / "examples" / "train.py"), "--steps", str(given.steps), "--every", str(given.every),
            "--batch", "16", "--timeout", str(given.timeout), "--checkpoint", str(self.disk),
        ]  # fmt: skip
        env = os.environ | {
            "GLOO_SOCKET_IFNAME": place.device, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR",
            "COLUMNS": "200", "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        with self.log.open("wb") as stream:
            self.agent = subprocess.Popen(
                place.command(words), env=env, stdout=stream, stderr=stream, start_new_session=True
            )

    def step(self) -> int:
        """The newest step on its disk."""
        return max((int(file.name[4:12]) for file in self.disk.glob("step*.shoal")), default=0)

    def worker(self) -> int:
        """The rank's process id: the child of torchrun that has a RANK."""
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == self.agent.pid and b"\0RANK=" in (entry / "environ").read_bytes():
                    return int(entry.name)
            except (OSError, ValueError):  # it has ended meanwhile
                continue
        raise RuntimeError(f"machine {self.node} has no rank: {self.log.read_text()[-2000:]}")

    def end(self) -> None:
        """torchrun ends its rank; after five seconds nobody asks."""
        self.agent.terminate()
        try:
            self.agent.wait(5)
        except subprocess.TimeoutExpired:
            with suppress(RuntimeError, ProcessLookupError):
                os.kill(self.worker(), signal.SIGKILL)  # torchrun gives it a session of its own
            os.killpg(self.agent.pid, signal.SIGKILL)
            self.agent.wait()


RENDEZVOUS = {
    "c10d": lambda node, host: [
        "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{host.address}:{PORT}", "--rdzv-id", "plug",
        "--rdzv-conf", f"is_host={int(node == 0)},read_timeout=600",
    ],
    "static": lambda node, host: [
        "--node-rank", str(node), "--master-addr", host.address, "--master-port", str(PORT),
    ],
}  # fmt: skip


@contextmanager
def machines(folder: Path, given: argparse.Namespace) -> Iterator[list[Machine]]:
    """Two machines at work on one training."""
    folder.mkdir()
    started: list[Machine] = []
    with links(2, Link(given.rate)) as places:
        try:
            for node, place in enumerate(places):
                started.append(Machine(node, place, places[0], folder, given))
            yield started
        finally:
            for machine in started:
                machine.end()


def plug(node: int, way: str) -> None:
    """Put the far end of the machine's cable "up" or "down"."""
    words = ["ip", "-n", f"shoal{os.getpid()}-hub", "link", "set", f"port{node}", way]
    subprocess.run(words, check=True, capture_output=True)


def trial(name: str, cut: float | None, folder: Path, given: argparse.Namespace) -> tuple[str, float, int]:
    """(SHA-256, seconds, how often all began again) of one training that is disturbed halfway. Raises RuntimeError."""
    began, end = time.monotonic(), time.monotonic() + given.limit
    with machines(folder, given) as pair:

        def wait(done: object) -> None:
            while not done():  # type: ignore[operator]
                if time.monotonic() > end:
                    raise RuntimeError(f"{name}: not done after {given.limit:g} s\n{told(pair)}")
                if any(machine.agent.poll() for machine in pair):
                    raise RuntimeError(f"{name}: a torchrun has given up\n{told(pair)}")
                time.sleep(0.01)

        if name != "undisturbed":
            wait(lambda: min(machine.step() for machine in pair) >= given.steps // 2)
            if cut is None:
                os.kill(pair[1].worker(), signal.SIGKILL)
            else:
                plug(1, "down")
                time.sleep(cut)
                plug(1, "up")
        wait(lambda: all(machine.agent.poll() == 0 for machine in pair))
        said = pair[0].log.read_text() + pair[1].log.read_text()
    found = SAID.findall(said)
    if len(found) != 1:
        raise RuntimeError(f"{name}: {len(found)} ranks said what they ended at\n{said[-3000:]}")
    return found[0], time.monotonic() - began, said.count("going on from step")


def told(pair: list[Machine]) -> str:
    """The end of what both said."""
    return "\n".join(f"machine {m.node}: {m.log.read_text()[-3000:]}" for m in pair)


def main() -> int:
    """Do the trials, print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("short", "long", "kill"), help="one disturbance")
    parser.add_argument("--rdzv", choices=tuple(RENDEZVOUS), default="c10d", help="torchrun's rendezvous")
    parser.add_argument("--rate", type=float, default=100.0, help="Mbit/s each way")
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds until a rank counts as lost")
    parser.add_argument("--short", type=float, default=4.0, help="seconds that the plug is out, fewer than --timeout")
    parser.add_argument("--long", type=float, default=20.0, help="seconds that the plug is out, more than --timeout")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=20, help="steps between two checkpoints")
    parser.add_argument("--limit", type=float, default=180.0, help="seconds that one training may take")
    given = parser.parse_args()
    if (why := missing()) is not None:
        parser.error(f"{why}.")
    if not 0 < given.short < given.timeout < given.long:
        parser.error("0 < --short < --timeout < --long.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that everything is taken away
    cuts = {"short": given.short, "long": given.long, "kill": None}
    names = ["undisturbed", *([given.only] if given.only else cuts)]
    console, expected, wrong = Console(stderr=True), "", 0
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            with console.status(f"{name}: training on two machines"):
                try:
                    sha, seconds, again = trial(name, cuts.get(name), Path(folder) / name, given)
                except (RuntimeError, OSError) as error:
                    print(f"{name:12} failed: {error}")
                    wrong += 1
                    continue
            expected = expected or sha
            wrong += sha != expected
            verdict = "identical" if sha == expected else "NOT the undisturbed model"
            print(f"{name:12} {seconds:6.1f} s, begun again {again} times, {sha[:16]}... {verdict}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())

"""Two hosts, each with one process and a torchrun agent of its own, train as one process does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.test_resume import PAIR, compare
from tests.train_helpers import ROOT, command, plain_network, read_json

pytestmark = pytest.mark.long

Host = tuple[list[str], str, str]  # what a command starts with there, its address, its network interface


@contextmanager
def namespaces() -> Iterator[list[Host]]:
    """Two network namespaces joined by a cable."""
    names = [f"feather{os.getpid()}{side}" for side in "ab"]

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    with ExitStack() as stack:
        try:
            for name in names:
                ip("netns", "add", name)
                stack.callback(subprocess.run, ["ip", "netns", "del", name], check=False)
            # interface names have at most 15 characters
            ends = [f"fe{os.getpid()}{side}" for side in "ab"]
            ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
            for name, end, address in zip(names, ends, ("10.99.0.1", "10.99.0.2"), strict=True):
                ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
                for device in (end, "lo"):
                    ip("-n", name, "link", "set", device, "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces here: {error}")
        yield [
            (["ip", "netns", "exec", name], address, end)
            for name, address, end in zip(names, ("10.99.0.1", "10.99.0.2"), ends, strict=True)
        ]


@contextmanager
def loopback() -> Iterator[list[Host]]:
    """Two addresses of this machine."""
    yield [([], "127.0.0.1", "lo"), ([], "127.0.0.2", "lo")]


def train(hosts: Sequence[Host], cwd: Path, *arguments: str) -> list[tuple[str, str]]:
    """What `torchrun --nnodes=2` prints on each host; the network has no BatchNorm."""
    program = cwd / "program.py"
    program.write_text(f"""
import runpy, sys
sys.path.insert(0, {str(ROOT)!r})
from tests.train_helpers import plain_network
plain_network()
sys.argv[0] = {str(ROOT / "train.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
""")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    agents = []
    for index, (prefix, address, interface) in enumerate(hosts):
        launch = [
            *prefix, sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={index}",
            "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint={hosts[0][1]}:{port}", "--rdzv-id=test",
            f"--local-addr={address}", f"--rdzv-conf=is_host={not index}", str(program), *arguments,
        ]  # fmt: skip
        env = {**os.environ, "GLOO_SOCKET_IFNAME": interface, "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        agents.append(subprocess.Popen(launch, cwd=cwd, env=env, text=True, **pipes))
    ended = [agent.communicate(timeout=300) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], ended
    return ended


@pytest.mark.parametrize("hosts", [loopback, namespaces])
def test_two_hosts_train_as_one_process_and_only_the_first_writes(hosts, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    assert command(*PAIR, cwd=one, before=plain_network).status == 0
    with hosts() as pair:
        (out, _), (other_out, other_err) = train(pair, two, *PAIR, "trainer.accumulate=2")
    assert "2 x cpu" in out
    assert "top-1" not in other_out + other_err
    compare(two / "run", one / "run")
    # each process has written down its own thresholds, zeros and sums of weights
    assert read_json(two / "rank0.json") == read_json(two / "rank1.json")
    assert read_json(two / "run" / "result.json")["world_size"] == 2
    assert read_json(two / "run" / "result.json")["zeros"] == read_json(one / "run" / "result.json")["zeros"] > 0

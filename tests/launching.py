"""
Scripts in several processes: by `accelerate launch`, as users start them, or forked from a process that has imported
everything.

A launch of two processes imports torch, Transformers and TRL three times, some ten seconds each time. So each suite
starts one of its runs by the launcher, which shows that the launcher works, and forks the others.
"""

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path


TESTS = Path(__file__).resolve().parent
CONFIG = TESTS.parent / "recipes" / "accelerate" / "cpu_2proc.yaml"
TIMEOUT = 300


def environment() -> dict[str, str]:
    """Of a script that imports the tests' helpers and this checkout, offline, on one thread."""
    paths = (TESTS.parent, TESTS, TESTS / "diffusion", TESTS / "d2po")
    return dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(map(str, paths)), HF_HUB_OFFLINE="1")


def launch(script: Path, *arguments: str, config: Path = CONFIG, options: tuple[str, ...] = ()) -> str:
    """
    Runs `script` by `accelerate launch`, in two processes by default, and returns what it printed. `options` are the
    launcher's.
    """
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(config)]
    # Port 0 is a free one: other workers launch at the same time.
    command += ["--main_process_port", "0", *options, str(script), *arguments]
    done = subprocess.run(
        command, env=environment(), timeout=TIMEOUT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


def fork(script: Path, *arguments: str, processes: int = 2) -> str:
    """Like [`launch`], in processes that are forked from one that has imported everything."""
    return _Server.started().run(script, arguments, processes)


def fork_and_kill(when: Callable[[], bool], script: Path, *arguments: str) -> None:
    """Forks a process that runs `script`, and ends it by SIGKILL once `when` holds."""
    server = _Server.started()
    with tempfile.NamedTemporaryFile("w+", prefix="trl-ext-fork-") as printed:
        pid = server.ask(kind="start", script=str(script), arguments=arguments, output=printed.name)
        deadline, status = time.monotonic() + TIMEOUT, None
        try:
            while not when():
                status = server.ask(kind="poll", pid=pid)
                assert status is None and time.monotonic() < deadline, Path(printed.name).read_text()[-5000:]
                time.sleep(0.05)
        finally:
            if status is None:
                os.kill(pid, signal.SIGKILL)
                server.ask(kind="wait", pid=pid)


class _Server:
    """`scripts/fork_server.py`, one for each worker of the tests."""

    _instance = None

    @classmethod
    def started(cls) -> "_Server":
        if cls._instance is None:
            cls._instance = cls()
            atexit.register(cls._instance.stop)
        return cls._instance

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, str(TESTS / "scripts" / "fork_server.py")],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, script: Path, arguments: tuple[str, ...], processes: int) -> str:
        with tempfile.NamedTemporaryFile("w+", prefix="trl-ext-fork-") as printed:
            request = {"script": str(script), "arguments": arguments, "processes": processes, "output": printed.name}
            codes = self.ask(kind="run", timeout=TIMEOUT, **request)
            output = Path(printed.name).read_text()
        assert codes == [0] * processes, f"exit statuses {codes}\n{output[-5000:]}"
        return output

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], TIMEOUT + 120)
        reply = self.process.stdout.readline() if ready else ""
        assert reply, "The server of forked processes does not answer."
        return json.loads(reply)

    def stop(self):
        self.process.stdin.close()
        self.process.wait(timeout=30)

"""
Forks processes that run a script together, as `accelerate launch` would start them; see `tests/launching.py`.

Reads one JSON request a line and answers in one:

- `{"kind": "run", "script", "arguments", "processes", "output", "timeout"}` -> the exit statuses; `output` is the file
  for what they print;
- `{"kind": "start", "script", "arguments", "output"}` -> the process id;
- `{"kind": "poll", "pid"}` -> its exit status, or null while it runs; `{"kind": "wait", "pid"}` waits for it.
"""

import gc
import json
import os
import runpy
import signal
import socket
import sys
import time
import traceback
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import conftest  # noqa: E402, F401 - sets the environment
import methods  # noqa: E402, F401 - imports torch, TRL and the trainers
import peft  # noqa: E402, F401
import transformers  # noqa: E402, F401


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def child(request: dict, rank: int, port: int) -> None:
    """Becomes process `rank`, with the variables that torchrun and accelerate set, and does not return."""
    status = 1
    try:
        os.setpgrp()  # so that whatever it starts can be ended with it
        output = os.open(request["output"], os.O_WRONLY | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        size = request.get("processes", 1)
        if size > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_MIXED_PRECISION="no")
        sys.argv = [request["script"], *request["arguments"]]
        sys.path.insert(0, str(Path(request["script"]).parent))
        runpy.run_path(request["script"], run_name="__main__")
        status = 0
    except SystemExit as left:
        status = int(left.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def serve(request: dict):
    if request["kind"] == "run":
        return run(request)
    if request["kind"] == "start":
        pid = os.fork()
        return pid or child(request, 0, 0)
    pid, status = os.waitpid(request["pid"], os.WNOHANG if request["kind"] == "poll" else 0)
    return os.waitstatus_to_exitcode(status) if pid else None


def run(request: dict) -> list[int]:
    port = free_port()
    running = {}
    for rank in range(request["processes"]):
        pid = os.fork()
        if pid == 0:
            child(request, rank, port)
        running[pid] = rank
    codes = [-1] * request["processes"]
    deadline = time.monotonic() + request["timeout"]
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in running:
            codes[running.pop(pid)] = code = os.waitstatus_to_exitcode(status)
        # A process that waits for one that failed waits for ever.
        if (pid and code != 0) or time.monotonic() > deadline:
            for other in running:
                os.killpg(other, signal.SIGKILL)
                os.waitpid(other, 0)
            return codes
        if not pid:
            time.sleep(0.02)
    return codes


if __name__ == "__main__":
    gc.collect()
    gc.freeze()  # for the forked processes, which would look through all that was imported at each training's start
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), flush=True)

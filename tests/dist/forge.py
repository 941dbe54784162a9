"""Starts ranks quickly: one process imports everything once, then forks a world for each request.

Reads one JSON request a line (`folder`, `world`, `argv`, `env`, `log`), answers with the process
ids of its ranks. `{"codes": [ids]}` answers with the exit code of each, null while it runs. Every
rank calls `mmtrain.cli.main(argv)`, the function behind the `mmtrain` command, with the environment
a launcher would give it; or the `main(argv)` of a module of this folder (`module`). A request may
hold `patch`, as in `module:function:word`: that function of a module of this folder is called with
the rank and the word first, to make something fail that does not fail by itself.
"""

import importlib
import json
import os
import socket
import sys
import traceback
from typing import Any


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def become_rank(rank: int, request: dict[str, Any], port: int) -> None:
    """Run the command as one rank and leave with its exit code."""
    log = os.open(f"{request['log']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(request["folder"])
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(request["world"]),
        LOCAL_WORLD_SIZE=str(request["world"]),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        **request["env"],
    )
    code = 1
    try:
        if request.get("patch"):
            module, function, word = request["patch"].split(":", 2)
            getattr(importlib.import_module(module), function)(rank, word)
        command = importlib.import_module(request.get("module", "mmtrain.cli"))
        code = int(command.main(request["argv"]))
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(pid: int, codes: dict[int, int]) -> int | None:
    """Exit code of a rank, as soon as it has one; `codes` keeps those that were collected."""
    if pid not in codes:
        found, status = os.waitpid(pid, os.WNOHANG)
        if not found:
            return None
        codes[pid] = os.waitstatus_to_exitcode(status)
    return codes[pid]


def main() -> None:
    """Serve requests until standard input ends."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import mmtrain.cli
    import mmtrain.run  # noqa: F401 the heavy import, once

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    codes: dict[int, int] = {}
    for line in sys.stdin:
        request, port = json.loads(line), free_port()
        if "codes" in request:
            answers.write(json.dumps([ended(pid, codes) for pid in request["codes"]]) + "\n")
            continue
        children = []
        for rank in range(request["world"]):
            child = os.fork()
            if child == 0:
                become_rank(rank, request, port)
            codes.pop(child, None)  # ids come again
            children.append(child)
        answers.write(json.dumps(children) + "\n")


if __name__ == "__main__":
    main()

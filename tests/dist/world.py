"""Front-door runs on several ranks: the tiny recipe, overrides, a folder of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from mmtrain.checkpoint.manifest import Manifest
from mmtrain.checkpoint.pieces import Pieces

REPOSITORY = Path(__file__).parents[2]
TINY = REPOSITORY / "configs/emu/tiny.yaml"


class Forge:
    """A process that has imported everything and forks ranks on demand (`forge.py`)."""

    def __init__(self) -> None:
        """Start it."""
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("forge.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def ask(self, request: dict[str, Any]) -> Any:
        """Its answer to one request."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


class Ranks:
    """Ranks that run: signal them, wait for them, read what they said."""

    def __init__(self, forge: Forge, pids: list[int], log: Path) -> None:
        """Take what the forge has started."""
        self.pids = pids
        self._forge, self._log = forge, log

    def codes(self) -> list[int | None]:
        """Exit code of each rank; None while it runs, negative when a signal killed it."""
        codes: list[int | None] = self._forge.ask({"codes": self.pids})
        return codes

    def signal(self, rank: int, number: int) -> None:
        """Send a signal to one rank."""
        os.kill(self.pids[rank], number)

    def kill(self) -> None:
        """End what still runs."""
        for rank, code in enumerate(self.codes()):
            if code is None:
                self.signal(rank, signal.SIGKILL)

    def wait(self, seconds: float = 300, ranks: Sequence[int] | None = None) -> list[int | None]:
        """Exit codes of some ranks (all) once they have ended; the time up, all are killed."""
        ranks = range(len(self.pids)) if ranks is None else ranks
        patience = time.monotonic() + seconds
        while None in (codes := [self.codes()[rank] for rank in ranks]):
            if time.monotonic() > patience:
                self.kill()
                raise TimeoutError(f"exit codes {codes} after {seconds} s\n{self.text()}")
            time.sleep(0.02)
        return codes

    def wait_until(self, holds: Callable[[], Any], seconds: float = 120) -> None:
        """Wait for something to hold; the ranks must live until then."""
        patience = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > patience or None not in self.codes():
                codes = self.codes()
                self.kill()
                raise TimeoutError(f"did not come; exit codes {codes}\n{self.text()}")
            time.sleep(0.02)

    def text(self, rank: int | None = None) -> str:
        """What one rank (or each) wrote to its terminal."""
        if rank is not None:
            return Path(f"{self._log}.{rank}").read_text()
        return "\n".join(self.text(rank)[-4000:] for rank in range(len(self.pids)))


class World:
    """Starts `mmtrain` on N ranks in `folder`, where `demo_data` lies."""

    def __init__(self, folder: Path, forge: Forge, patch: str = "") -> None:
        """Take a folder of its own and the shared forge; `patch` is for every command."""
        self.folder = folder
        self.forge = forge
        self.patch = patch

    def start(
        self,
        ranks: int,
        *argv: str,
        env: dict[str, str] | None = None,
        patch: str = "",
        module: str = "mmtrain.cli",
    ) -> Ranks:
        """One command on `ranks` ranks, which run; `patch` and `module` are the forge's."""
        log = self.folder / f"log-{len(list(self.folder.glob('log-*.0')))}"
        request = {"folder": str(self.folder), "world": ranks, "argv": list(argv), "module": module}
        for rank in range(ranks):
            Path(f"{log}.{rank}").touch()
        request |= {"env": env or {}, "log": str(log), "patch": patch or self.patch}
        pids = self.forge.ask(request)
        return Ranks(self.forge, pids, log)

    def run(
        self,
        ranks: int,
        *argv: str,
        env: dict[str, str] | None = None,
        patch: str = "",
        module: str = "mmtrain.cli",
    ) -> list[int]:
        """Exit codes of one command on `ranks` ranks; `patch` and `module` are the forge's."""
        started = self.start(ranks, *argv, env=env, patch=patch, module=module)
        codes = started.wait(600)
        self.last_log = started.text()
        return [code for code in codes if code is not None]

    def train(
        self, name: str, ranks: int, *overrides: str, recipe: Path = TINY
    ) -> list[dict[str, Any]]:
        """Train the tiny recipe, or another; returns the lines of `metrics.jsonl`."""
        codes = self.run(ranks, "train", str(recipe), f"name={name}", *overrides)
        assert codes == [0] * ranks, f"{name}: exit codes {codes}\n{self.last_log}"
        return self.metrics(name)

    def tool(self, name: str, *argv: str) -> subprocess.CompletedProcess[str]:
        """Run a script of `tools/` in the folder."""
        return subprocess.run(
            [sys.executable, str(REPOSITORY / "tools" / name), *argv],
            cwd=self.folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )

    def tool_here(self, monkeypatch: pytest.MonkeyPatch, name: str, *argv: str) -> int:
        """Exit code of a script of `tools/` in the folder, run in this process."""
        spec = spec_from_file_location("tool", REPOSITORY / "tools" / name)
        assert spec is not None and spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.chdir(self.folder)
        monkeypatch.setattr(sys, "argv", [name, *argv])
        return int(module.main())

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """The lines of a run's `metrics.jsonl`."""
        path = self.folder / "runs" / name / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]


def kept(folder: Path) -> dict[tuple[str, str], Tensor]:
    """Every full tensor of a checkpoint, by kind and name."""
    manifest = Manifest.read(folder)
    pieces = Pieces(folder, manifest)
    return {
        (kind, name): pieces.full(kind, name)
        for name in manifest.weights
        for kind in pieces.kinds_of(name)
    }

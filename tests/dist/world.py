"""Front-door runs on several ranks: the tiny recipe, overrides, a folder of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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

    def start(self, request: dict[str, Any]) -> list[int]:
        """Exit codes of the ranks of one request."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        codes: list[int] = json.loads(self._process.stdout.readline())
        return codes

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


class World:
    """Starts `mmtrain` on N ranks in `folder`, where `demo_data` lies."""

    def __init__(self, folder: Path, forge: Forge, prepare: str = "") -> None:
        """Take a folder of its own and the shared forge.

        `prepare` names what every rank calls first, as `module:function` of this folder.
        """
        self.folder = folder
        self.forge = forge
        self.prepare = prepare

    def run(self, ranks: int, *argv: str, env: dict[str, str] | None = None) -> list[int]:
        """Exit codes of one command on `ranks` ranks."""
        log = self.folder / f"log-{len(list(self.folder.glob('log-*.0')))}"
        request = {"folder": str(self.folder), "world": ranks, "argv": list(argv)}
        codes = self.forge.start(
            request | {"env": env or {}, "log": str(log), "prepare": self.prepare}
        )
        self.last_log = "\n".join(
            Path(f"{log}.{rank}").read_text()[-4000:] for rank in range(ranks)
        )
        return codes

    def train(self, name: str, ranks: int, *overrides: str) -> list[dict[str, Any]]:
        """Train the tiny recipe; returns the lines of `metrics.jsonl`."""
        codes = self.run(ranks, "train", str(TINY), f"name={name}", *overrides)
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

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """The lines of a run's `metrics.jsonl`."""
        path = self.folder / "runs" / name / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

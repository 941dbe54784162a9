"""Front-door runs on several ranks: the tiny recipe, overrides, a folder of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
TINY = REPOSITORY / "configs/emu/tiny.yaml"


class World:
    """Starts `mmtrain` on N ranks in `folder`, where `demo_data` lies."""

    def __init__(self, folder: Path) -> None:
        """Start the forge."""
        self.folder = folder
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        self.forge = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("forge.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=folder,
            env=environment,
            text=True,
        )

    def run(self, ranks: int, *argv: str, env: dict[str, str] | None = None) -> list[int]:
        """Exit codes of one command on `ranks` ranks."""
        log = self.folder / f"log-{len(list(self.folder.glob('log-*.0')))}"
        request = {"world": ranks, "argv": list(argv), "env": env or {}, "log": str(log)}
        assert self.forge.stdin is not None and self.forge.stdout is not None
        self.forge.stdin.write(json.dumps(request) + "\n")
        self.forge.stdin.flush()
        codes: list[int] = json.loads(self.forge.stdout.readline())
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

    def close(self) -> None:
        """End the forge."""
        assert self.forge.stdin is not None
        self.forge.stdin.close()
        self.forge.wait(30)

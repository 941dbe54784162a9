"""One rank of a run that also speaks DeepSpeed's own checkpoint format.

`universal_rank.py save RECIPE [KEY=VALUE ...]` trains, and every save is DeepSpeed's too;
`universal_rank.py load FOLDER RECIPE [KEY=VALUE ...]` lets DeepSpeed load a universal checkpoint,
and mmtrain save what the engine then holds.
"""

import os
import sys
from pathlib import Path
from typing import Any

from mmtrain import feed, run
from mmtrain import recipe as recipes
from mmtrain.cli import main as mmtrain
from mmtrain.layout.dims import dims_for
from mmtrain.parallel.mesh import open_mesh
from mmtrain.train.engine import EngineSettings
from mmtrain.train.save import Saver
from mmtrain.train.state import TrainState


def save(*argv: str) -> int:
    """Train; beside each checkpoint DeepSpeed writes its own, to `RUN/deepspeed`."""
    ours = Saver.save

    def both(saver: Saver, state: TrainState) -> None:
        folder = saver.target.root.with_name("deepspeed")
        saver.engine.deepspeed.save_checkpoint(str(folder), tag=f"global_step{state.step}")
        ours(saver, state)

    Saver.save = both  # type: ignore[method-assign]
    return mmtrain(["train", *argv])


def load(folder: str, path: str, *overrides: str) -> int:
    """Build the engine with `checkpoint.load_universal` and let it load."""
    plain = EngineSettings.to_json

    def universal(settings: EngineSettings) -> dict[str, Any]:
        return {**plain(settings), "checkpoint": {"load_universal": True}}

    EngineSettings.to_json = universal  # type: ignore[method-assign]
    world = int(os.environ["WORLD_SIZE"])
    recipe = recipes.read(Path(path), list(overrides), world)
    setting, layout = feed.read_setting(recipe), recipe.parallel
    dims = dims_for(
        world,
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        zero_stage=layout.zero_stage,
        sequence=layout.sequence,
    )
    with open_mesh(dims, layout.timeout_seconds) as mesh:
        if mesh.rank == 0:
            setting.folder.mkdir(parents=True)
        mesh.barrier()
        engine = run.build_engine(setting, mesh)
        loaded, client = engine.deepspeed.load_checkpoint(folder)
        assert loaded is not None
        print("engine at step", engine.deepspeed.global_steps, sorted(client))
        saver = run._saver(setting, engine, None, None)
        saver.save(TrainState(**client["mmtrain"]["state"]))
        saver.finish(engine.deepspeed.global_steps)
    return 0


if __name__ == "__main__":
    command, *rest = sys.argv[1:]
    sys.exit({"save": save, "load": load}[command](*rest))

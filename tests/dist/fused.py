"""Makes a rank's trunk take the kernels' way between projections and attention, on a CPU.

The op `mmtrain::qk_norm_rope` and its derivative run, by their torch formulas; the modules' own
forward passes of norms, rotary embedding and similarity do not. Under ZeRO-3 even the smallest
parameters are partitioned, which DeepSpeed by itself gathers once a step and keeps.
"""

from pathlib import Path
from typing import Any

from mmtrain.nn import attention
from mmtrain.ops.select import QkBackend
from mmtrain.train.engine import EngineSettings

CALLED = "fused-"  # file in the run's world by which rank N says that the op ran in it


def force(rank: int, word: str) -> None:
    """Choose the op, and leave a sign when it has run."""
    op, to_json = attention.qk_norm_rope, EngineSettings.to_json

    def seen(*tensors: Any, **options: Any) -> Any:
        Path(f"{CALLED}{rank}").touch()
        return op(*tensors, **options)

    def partitioned(settings: EngineSettings) -> dict[str, Any]:
        content = to_json(settings)
        content["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return content

    attention.qk_backend = lambda device: QkBackend.KERNEL
    attention.qk_norm_rope = seen
    EngineSettings.to_json = partitioned

"""How many ranks share what: the layout of a run as five numbers, without torch.

Rank order is DeepSpeed's `(pipe, data, model)`, which equals Megatron-core's `tp-cp-ep-dp-pp`:
the tensor rank runs fastest, so ranks that talk most are neighbours on one host.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from mmtrain.errors import Problem

ZERO_STAGES = (0, 1, 2, 3)


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


@dataclass(frozen=True, kw_only=True)
class ParallelDims:
    """Sizes of the three axes and what rides on them.

    Attributes:
        data: ranks that see different packs.
        tensor: ranks that share each layer.
        pipeline: stages.
        zero_stage: DeepSpeed ZeRO over the data ranks: 0 replicates everything, 1 shards the
            optimizer, 2 gradients too, 3 weights too.
        sequence: whether trunk rows are split over the tensor ranks.
    """

    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    zero_stage: int = 1
    sequence: bool = False

    @property
    def world_size(self) -> int:
        """Ranks of the whole run."""
        return self.data * self.tensor * self.pipeline

    def coord(self, rank: int) -> tuple[int, int, int]:
        """The (pipeline, data, tensor) place of a rank."""
        assert 0 <= rank < self.world_size, (rank, self)
        rest, tensor = divmod(rank, self.tensor)
        pipeline, data = divmod(rest, self.data)
        return pipeline, data, tensor

    def rank(self, coord: tuple[int, int, int]) -> int:
        """The rank at a (pipeline, data, tensor) place; undoes `coord`."""
        pipeline, data, tensor = coord
        assert 0 <= pipeline < self.pipeline and 0 <= data < self.data, (coord, self)
        assert 0 <= tensor < self.tensor, (coord, self)
        return (pipeline * self.data + data) * self.tensor + tensor

    def problems(self, world_size: int | None = None) -> Iterator[Problem]:
        """Every reason why the engines refuse this layout.

        Args:
            world_size: ranks the launcher started; None checks the layout in itself. `data`
                is then not looked at, otherwise `data * tensor * pipeline` must be the world.
        """
        sizes = {"tensor": self.tensor, "pipeline": self.pipeline, "data": self.data}
        wrong = [name for name, size in sizes.items() if size < 1]
        for name in wrong:
            yield Problem(f"parallel.{name}", f"{sizes[name]} ranks; use 1 or more")
        if self.zero_stage not in ZERO_STAGES:
            yield Problem("parallel.zero_stage", f"{self.zero_stage}; allowed: 0, 1, 2, 3")
        elif self.pipeline > 1 and self.zero_stage != 1:
            # DeepSpeed refuses 2 and 3 with stages; at 0 its clipping norm counts stage 0 only
            yield Problem(
                "parallel.zero_stage",
                f"{self.zero_stage} with parallel.pipeline = {self.pipeline}; pipeline stages "
                "work with ZeRO 1 only: set parallel.zero_stage=1 or parallel.pipeline=1",
            )
        if self.sequence and self.tensor == 1:
            yield Problem(
                "parallel.sequence",
                "true with parallel.tensor = 1; rows are split over the tensor ranks: set "
                "parallel.tensor above 1 or parallel.sequence=false",
            )
        if world_size is not None and not wrong and self.world_size != world_size:
            yield self._misfit(world_size)

    def _misfit(self, world_size: int) -> Problem:
        model = self.tensor * self.pipeline
        return Problem(
            "parallel",
            f"parallel.tensor = {self.tensor} times parallel.pipeline = {self.pipeline} is "
            f"{model}, which does not divide the {world_size} rank(s) started; start a multiple "
            f"of {model} ranks, or choose tensor * pipeline among {divisors(world_size)}",
        )


def dims_for(
    world_size: int, *, tensor: int, pipeline: int, zero_stage: int, sequence: bool
) -> ParallelDims:
    """The layout of a world: what tensor and pipeline leave over becomes data ranks.

    When they do not divide the world the result misfits it, and `problems(world_size)` says so.
    """
    data = max(1, world_size // max(1, tensor * pipeline))
    return ParallelDims(
        data=data, tensor=tensor, pipeline=pipeline, zero_stage=zero_stage, sequence=sequence
    )

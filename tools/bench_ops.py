"""What the ops layer costs on a CPU: a training step with it and without it, in turns.

    python tools/bench_ops.py [--rounds N] [--seconds S]

Both sides are the same engine on the tiny recipe (every kind of document, one rank); without the
layer, queries and keys go through norm, rotary embedding and similarity by plain calls, and dense
attention is torch's function, as before `mmtrain.ops.select` was asked. One thread, by the clock of
its processor, so that other work widens the spread little. Prints the row of docs/benchmarks.md.
"""

import argparse
import contextlib
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench_cpu import Pace, Side, load, loader_of, race, ratios, spread, training
from torch.nn.functional import scaled_dot_product_attention

from mmtrain import feed, log, run
from mmtrain.data.shapes import write_shapes
from mmtrain.encoders import causal_transformer, eva_clip
from mmtrain.layout.dims import dims_for
from mmtrain.nn.attention import PackedAttention, adapted
from mmtrain.ops import attention
from mmtrain.ops.dense_attention import dense_attention
from mmtrain.ops.rotary import rotate
from mmtrain.parallel.mesh import open_mesh
from mmtrain.train.engine import Engine

LAYERED, DOOR = PackedAttention.forward, dense_attention
CALLERS = (attention, eva_clip, causal_transformer)  # of dense attention


def plain(self: PackedAttention, x_TD, rotary, keys, noise=None):  # type: ignore[no-untyped-def]
    """`PackedAttention.forward` without a choice."""
    x_TD = self.enter(x_TD)
    q, k, v = (
        adapted(project, adapter, x_TD, noise).view(len(x_TD), -1, self.head_width)
        for project, adapter in (
            (self.q, self.q_lora),
            (self.k, self.k_lora),
            (self.v, self.v_lora),
        )
    )
    q = rotate(self.q_norm(q), *rotary)
    k = rotate(self.k_norm(k), *rotary)
    q, k, scale = self.similarity(q, k)
    attended = keys.attend(self, q, k, v, scale).flatten(-2)
    return adapted(self.out, self.out_lora, attended, noise)


def torchs(q, k, v, *, mask=None, causal=False, scale=None, shapes=None):  # type: ignore[no-untyped-def]
    """`dense_attention` without a choice."""
    return scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=scale)


def by(
    forward: Callable[..., torch.Tensor],
    dense: Callable[..., torch.Tensor],
    engine: Engine,
    batches: list,
) -> Side:
    """Training steps whose attention layers run `forward`, and dense ones `dense`."""
    side = training(engine, forward.__name__, batches)

    def step(number: int) -> None:
        PackedAttention.forward = forward  # type: ignore[method-assign]
        for caller in CALLERS:
            caller.dense_attention = dense  # type: ignore[attr-defined]
        side.step(number)

    return Side(side.name, step, side.units)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="turns of each side")
    parser.add_argument("--seconds", type=float, default=2.0, help="a turn lasts at least so long")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    log.start(rank=0)
    logging.getLogger("mmtrain").setLevel(logging.WARNING)
    dims = dims_for(1, tensor=1, pipeline=1, zero_stage=1, sequence=False)
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        open_mesh(dims, timeout_seconds=600.0) as mesh,
    ):
        log.quiet_engines()
        write_shapes(Path("demo_data"), 500, seed=0)
        setting = feed.read_setting(load("tiny"))
        engine = run.build_engine(setting, mesh)
        loader = loader_of(setting, workers=0)
        batches = [loader.step(number) for number in range(4)]
        sides = [by(LAYERED, DOOR, engine, batches), by(plain, torchs, engine, batches)]
        ours, theirs = race(sides, Pace(asked.rounds, asked.seconds, time.process_time))
    print(f"load average {os.getloadavg()[0]:.2f}, {asked.rounds} turns, torch {torch.__version__}")
    print(f"| tiny | {spread(ours)} | {spread(theirs)} | **{ratios(ours, theirs)}** |")
    return 0


if __name__ == "__main__":
    sys.exit(main())

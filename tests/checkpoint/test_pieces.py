"""Any run of numbers of any slice is found, whatever layout wrote the files."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtrain.checkpoint import store
from mmtrain.checkpoint.manifest import Manifest, WeightEntry
from mmtrain.checkpoint.pieces import WEIGHT, Pieces, Place, key_of
from mmtrain.checkpoint.reshape import reshape
from mmtrain.errors import ContentError, StorageError
from mmtrain.layout.dims import ParallelDims
from mmtrain.layout.plan import Slice
from mmtrain.nn.init import take_slice

KIND = "moment.exp_avg"  # cut by every ZeRO stage above 0


def write(root: Path, full: torch.Tensor, dim: int | None, dims: ParallelDims) -> Path:
    """A committed checkpoint of one parameter `w` on stage 0, as training would write it."""
    partial = store.begin(root, 1)
    files = {}
    for rank in range(dims.world_size):
        stage, data, tensor = dims.coord(rank)
        held = {}
        if stage == 0 and not (tensor and dim is None):
            cut = None if dim is None else Slice(dim, padded=True)
            part = take_slice(full, cut, tensor, dims.tensor).flatten()
            share = -(-len(part) // dims.data)
            piece = part[data * share : (data + 1) * share]
            if len(piece):
                held = {key_of(KIND, "w", data * share): piece}
        name, entry = store.write_part(partial, rank, held)
        files[name] = entry
    manifest = Manifest(
        step=1,
        dims=dims,
        state={},
        recipe_hash="",
        code_version="",
        weights={"w": WeightEntry(tuple(full.shape), dim, 0)},
        files=files,
    )
    return store.commit(root, manifest)


def opened(folder: Path) -> Pieces:
    return Pieces(folder, Manifest.read(folder))


shapes = st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple)
layouts = st.builds(
    lambda data, tensor, pipeline: ParallelDims(data=data, tensor=tensor, pipeline=pipeline),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 2),
)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), shape=shapes, source=layouts, ranks=st.integers(1, 4))
def test_every_rank_of_every_layout_finds_its_numbers(
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    shape: tuple[int, ...],
    source: ParallelDims,
    ranks: int,
) -> None:
    dim = data.draw(st.none() | st.integers(0, len(shape) - 1))
    full = torch.arange(1.0, 1 + math.prod(shape)).view(shape)
    pieces = opened(write(tmp_path_factory.mktemp("run"), full, dim, source))
    assert torch.equal(pieces.full(KIND, "w"), full)
    for tensor in range(ranks):
        cut = None if dim is None else Slice(dim, padded=True)
        wanted = take_slice(full, cut, tensor, ranks).flatten()
        start = data.draw(st.integers(0, len(wanted)))
        stop = data.draw(st.integers(start, len(wanted)))
        if stop > start:
            found = pieces.read(KIND, "w", Place(tensor, ranks, start, stop))
            assert torch.equal(found, wanted[start:stop])


@settings(max_examples=20, deadline=None)
@given(data=st.data(), shape=shapes, source=layouts, target=layouts)
def test_cut_for_another_layout_the_tensor_is_the_same(
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    shape: tuple[int, ...],
    source: ParallelDims,
    target: ParallelDims,
) -> None:
    dim = data.draw(st.none() | st.integers(0, len(shape) - 1))
    stage = data.draw(st.integers(0, target.pipeline - 1))
    full = torch.arange(1.0, 1 + math.prod(shape)).view(shape)
    root = tmp_path_factory.mktemp("run")
    made = reshape(write(root / "a", full, dim, source), root / "b", target, {"w": stage})
    assert Manifest.read(made).dims == target
    assert torch.equal(opened(made).full(KIND, "w"), full)
    with pytest.raises(StorageError, match="is there already"):
        reshape(root / "a/step-00000001", root / "b", target, {"w": stage})


def test_numbers_that_no_file_holds_are_named(tmp_path: Path) -> None:
    dims = ParallelDims(data=2)
    folder = write(tmp_path, torch.arange(10.0), None, dims)
    (folder / "rank-00001.safetensors").write_bytes(
        (folder / "rank-00000.safetensors").read_bytes()
    )
    with pytest.raises(ContentError, match=r"moment.exp_avg of w: numbers 5 to 8 .* in no file"):
        opened(folder).read(KIND, "w", Place(0, 1, 3, 8))
    with pytest.raises(ContentError, match="holds no weight of w"):
        opened(folder).info(WEIGHT, "w")

"""LLaMA as Meta distributes it: `params.json` and `consolidated.00.pth`, `consolidated.01.pth`, ...

Two things differ from Hugging Face's layout. The files are the ranks of a tensor-parallel run: each
linear is cut by rows or by columns, norms are whole in every file. And the rotary embedding pairs
neighbouring channels (2k, 2k + 1) where ours pairs (k, k + K/2), so rows of q and k are put into
another order, head by head.

Source of the layout: meta-llama/llama (model.py: which linears are column and row parallel).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mmtrain.checkpoint.names import Dropped, NameMap, Same
from mmtrain.checkpoint.tensorfile import TensorInfo
from mmtrain.convert.llama import described, trunk_shapes
from mmtrain.convert.plan import Draft, Made, Plan, raise_faults
from mmtrain.convert.recognise import kind_of
from mmtrain.convert.sources import Source, open_file, read_json
from mmtrain.errors import ContentError, MissingError
from mmtrain.models.emu.config import LanguageConfig
from mmtrain.models.emu.sizes import sizes_of

_PART = re.compile(r"consolidated\.(\d+)\.(?:pth|safetensors)")
_ROWS, _COLUMNS, _WHOLE = 0, 1, None
_CUTS: dict[str, int | None] = {
    "attention.wq": _ROWS,
    "attention.wk": _ROWS,
    "attention.wv": _ROWS,
    "attention.wo": _COLUMNS,
    "feed_forward.w1": _ROWS,
    "feed_forward.w2": _COLUMNS,
    "feed_forward.w3": _ROWS,
    "attention_norm": _WHOLE,
    "ffn_norm": _WHOLE,
    "norm": _WHOLE,
    "output": _ROWS,
}
NAMES = NameMap(
    "Meta's LLaMA",
    (
        Same("tok_embeddings.weight", "embed.tokens.weight"),
        Same("norm.weight", "head.norm.weight"),
        Same("output.weight", "head.unembed.weight"),
        *(
            Same(f"layers.*.{theirs}.weight", f"blocks.*.{ours}.weight")
            for theirs, ours in (
                ("attention_norm", "norm1"),
                ("attention.wq", "attention.q"),
                ("attention.wk", "attention.k"),
                ("attention.wv", "attention.v"),
                ("attention.wo", "attention.out"),
                ("ffn_norm", "norm2"),
                ("feed_forward.w1", "mlp.gate"),
                ("feed_forward.w3", "mlp.up"),
                ("feed_forward.w2", "mlp.down"),
            )
        ),
        Dropped("rope.freqs", "recomputed in float32"),
        Dropped("layers.*.attention.inner_attention.rope.freqs", "recomputed in float32"),
    ),
)


@dataclass(frozen=True)
class Parameters:
    """What `params.json` says."""

    width: int
    heads: int
    key_heads: int
    norm_eps: float
    rope_theta: float


def read_meta(path: Path) -> Plan:
    """A folder of Meta's to full tensors of the trunk.

    Raises:
        MissingError: parts are missing.
        ContentError: parts do not fit together or `params.json`.
    """
    parameters = _parameters(path / "params.json")
    parts = _parts(path)
    source = _joined(path, parts, parameters.width)
    draft = Draft(source, "Meta's LLaMA").read(NAMES)
    for name, heads in (("q", parameters.heads), ("k", parameters.key_heads)):
        for target, made in list(draft.made.items()):
            if re.fullmatch(rf"blocks\.\d+\.attention\.{name}\.weight", target):
                draft.made[target] = _reordered(made, heads)
    language = _language(draft, parameters)
    draft.require(trunk_shapes(language), NAMES.foreign_name)
    return draft.plan(f"{path} -> full tensors of the trunk", described(language, None))


def pair_halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k from neighbouring pairs to paired halves, in every head."""
    rows, inputs = weight.shape
    return weight.view(heads, rows // heads // 2, 2, inputs).transpose(1, 2).reshape(rows, inputs)


def _reordered(made: Made, heads: int) -> Made:
    how = f"rows reordered in {heads} heads"
    if made.how:
        how = f"{made.how}, {how}"
    return Made(made.target, made.info, lambda: pair_halves(made.make(), heads), made.sources, how)


def _parameters(path: Path) -> Parameters:
    found = read_json(path)
    try:
        heads = int(found["n_heads"])
        scaled = found.get("use_scaled_rope", False)
        if scaled:
            raise ContentError(
                f"{path}: use_scaled_rope is set (LLaMA 3.1 and later); our trunk has plain rotary "
                "positions"
            )
        return Parameters(
            width=int(found["dim"]),
            heads=heads,
            key_heads=int(found.get("n_kv_heads") or heads),
            norm_eps=float(found["norm_eps"]),
            rope_theta=float(found.get("rope_theta", 10000.0)),
        )
    except KeyError as error:
        raise ContentError(f"{path}: {error.args[0]} is missing") from error


def _parts(path: Path) -> list[Source]:
    numbered = {int(hit[1]): p for p in path.iterdir() if (hit := _PART.fullmatch(p.name))}
    if not numbered:
        raise MissingError(f"{path}: no consolidated.00.pth; expected Meta's files of one model")
    absent = [number for number in range(max(numbered)) if number not in numbered]
    if absent:
        names = ", ".join(f"consolidated.{number:02d}.pth" for number in absent)
        raise MissingError(f"{path}: {names} missing; copy all parts of the model")
    if len(numbered) & (len(numbered) - 1):
        raise MissingError(
            f"{path}: {len(numbered)} parts, but models are cut into 1, 2, 4, 8, ...; the last are "
            "missing"
        )
    return [open_file(numbered[number]) for number in sorted(numbered)]


def _joined(path: Path, parts: Sequence[Source], width: int) -> Source:
    """The parts as one source of whole tensors."""
    first = parts[0]
    faults = [
        f"{part.path.name}: {name} is in {'it' if name in part.infos else first.path.name} alone"
        for part in parts[1:]
        for name in part.infos.keys() ^ first.infos.keys()
    ]
    if faults:
        raise_faults(first, "the other parts", faults)
    dims: dict[str, int | None] = {}
    infos: dict[str, TensorInfo] = {}
    for name, info in first.infos.items():
        dims[name] = _cut(name, info, width)
        infos[name] = TensorInfo(_whole(name, parts, dims[name]), info.dtype)
    if unknown := [name for name in infos if NAMES.rule_of(name) is None]:
        looks = kind_of(infos)
        hint = f"; it looks like {looks}" if looks else ""
        raise_faults(first, f"Meta's LLaMA{hint}", [f"{name}: unknown name" for name in unknown])

    def get(name: str) -> Tensor:
        tensors = [part.get(name) for part in parts]
        dim = dims[name]
        if dim is not None:
            return torch.cat(tensors, dim) if len(tensors) > 1 else tensors[0]
        if any(not torch.equal(tensor, tensors[0]) for tensor in tensors[1:]):
            raise ContentError(
                f"{path}: {name} differs between parts, which must all hold it whole; they are not "
                "of one model"
            )
        return tensors[0]

    return Source(path, infos, {name: first.files[name] for name in infos}, get)


def _cut(name: str, info: TensorInfo, width: int) -> int | None:
    """The dim that parts share, or None when each holds the whole."""
    if name == "tok_embeddings.weight":  # by width up to LLaMA 2, by words from LLaMA 3 on
        return _ROWS if info.shape[1] == width else _COLUMNS
    key = name.removesuffix(".weight")
    return _CUTS.get(re.sub(r"layers\.\d+\.", "", key))


def _whole(name: str, parts: Sequence[Source], dim: int | None) -> tuple[int, ...]:
    shapes = [part.infos[name].shape for part in parts]
    if any(shape != shapes[0] for shape in shapes):
        raise_faults(
            parts[0], "the other parts", [f"{name}: shapes differ between parts: {shapes}"]
        )
    shape = list(shapes[0])
    if dim is not None:
        shape[dim] *= len(parts)
    return tuple(shape)


def _language(draft: Draft, parameters: Parameters) -> LanguageConfig:
    shapes = {name: made.info.shape for name, made in draft.made.items()}
    try:
        found = sizes_of(shapes, parameters.width // parameters.heads).config.language
    except (KeyError, ZeroDivisionError) as error:
        raise_faults(draft.source, draft.what, [f"{error.args[0]}: missing", *draft.faults])
        raise
    key_heads = 0 if parameters.key_heads == parameters.heads else parameters.key_heads
    return LanguageConfig(
        vocabulary=found.vocabulary,
        layers=found.layers,
        width=parameters.width,
        heads=parameters.heads,
        kv_heads=key_heads,
        mlp_width=found.mlp_width,
        norm_eps=parameters.norm_eps,
        rope_theta=parameters.rope_theta,
    )

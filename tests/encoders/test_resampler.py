"""The resampler against numbers of the published Unified-IO 2, and what its masks promise."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mmtrain.encoders import resampler as module
from mmtrain.encoders.resampler import (
    LatentAttention,
    Resampler,
    ResamplerBlock,
    initial_rules,
    tensor_rules,
)
from mmtrain.layout.plan import TensorPlan
from mmtrain.nn import attention as parts
from mmtrain.nn.attention import Cosine, DotProduct
from mmtrain.nn.init import draw_by_name
from mmtrain.nn.norm import RMSNorm
from mmtrain.ops.cosine_attention import CosinePath
from mmtrain.ops.select import QkBackend

EPS = 1e-6
# of gradients; float64 formulas are 1.5e-6 and 1.5e-5 away from the published float32 numbers
LIMITS = {"qk": 5e-6, "cosine": 3e-5}
SIDES = {"image": (6, 48, 4, 80), "audio": (4, 40, 5, 72)}  # latents, width, heads, mlp width
LEAVES = {
    "context_norm.scale": "context_norm.weight",
    "perceiver_norm.scale": "norm.weight",
    "pre_xattention_norm.scale": "norm1.weight",
    "pre_mlp_norm.scale": "norm2.weight",
    "xattention.query.weight": "attention.q.weight",
    "xattention.key.weight": "attention.k.weight",
    "xattention.value.weight": "attention.v.weight",
    "xattention.out.weight": "attention.out.weight",
    "xattention.query_norm.scale": "attention.q_norm.weight",
    "xattention.key_norm.scale": "attention.k_norm.weight",
    "xattention.logit_scale": "attention.similarity.log_scale",
    "mlp.wi.weight": "mlp.up.weight",
    "mlp.wo.weight": "mlp.down.weight",
    "latents": "latents",
}


def made(
    kind: str, latents: int, width: int, heads: int, mlp_width: int, layers: int = 2, **more: int
) -> Resampler:
    """A resampler of the kind `qk` or `cosine`."""

    def attention() -> LatentAttention:
        norm: Callable[[], nn.Module] = nn.Identity
        if kind == "qk":
            norm = lambda: RMSNorm(width // heads, EPS)  # noqa: E731
        similarity = DotProduct() if kind == "qk" else Cosine(heads)
        return LatentAttention(width, heads, q_norm=norm(), k_norm=norm(), similarity=similarity)

    blocks = [
        ResamplerBlock(width=width, mlp_width=mlp_width, attention=attention(), norm_eps=EPS)
        for _ in range(layers)
    ]
    return Resampler(latents=latents, width=width, blocks=blocks, norm_eps=EPS, **more)


def drawn(kind: str, *sizes: int, **more: int) -> Resampler:
    """The same with random weights, none of them at its initial value."""
    torch.manual_seed(0)
    resampler = made(kind, *sizes, **more)
    for parameter in resampler.parameters():
        torch.nn.init.normal_(parameter, 0.8 if parameter.dim() == 1 else 0.0, 0.3)
    return resampler


def ours(published: str) -> str:
    """Name of a parameter here."""
    layer, _, leaf = published.rpartition("layers_")[2].partition(".")
    if layer.isdigit():
        return f"blocks.{layer}.{LEAVES[leaf]}"
    return LEAVES[published]


def results(
    resampler: Resampler, context: Tensor, mask: Tensor | None, upstream: Tensor
) -> dict[str, Tensor]:
    """Output, gradient of the context and of every parameter."""
    context = context.detach().requires_grad_()
    out = resampler(context, mask)
    named = dict(resampler.named_parameters())
    gradients = torch.autograd.grad((out * upstream).sum(), [context, *named.values()])
    return {"out": out.detach(), **dict(zip(["context", *named], gradients, strict=True))}


def error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, as a share of the largest entry."""
    return float((found - wanted).detach().abs().max() / wanted.abs().max())


@pytest.fixture(params=["qk", "cosine"])
def kind(request: pytest.FixtureRequest) -> str:
    """Of attention."""
    return str(request.param)


@pytest.fixture(params=SIDES)
def side(request: pytest.FixtureRequest) -> str:
    """Of the history."""
    return str(request.param)


class Golden:
    """Tensors of one kind and side, and our resampler with their weights."""

    def __init__(self, folder: Path, kind: str, side: str) -> None:
        """Read them; every weight has a place and every place a weight."""
        stored = load_file(folder / f"{side}.safetensors")
        start = f"{kind}/"
        self.io = {k.removeprefix(start): v for k, v in stored.items() if k.startswith(start)}
        self.resampler = made(kind, *SIDES[side])
        places = dict(self.resampler.named_parameters())
        weights = {
            ours(name.removeprefix("weights/")): tensor
            for name, tensor in stored.items()
            if name.startswith("weights/")
        }
        self.resampler.load_state_dict({name: weights[name] for name in places})


@pytest.fixture
def golden(repository: Path, kind: str, side: str) -> Golden:
    """Numbers of the published model."""
    return Golden(repository / "tests/golden/uio2_resampler", kind, side)


def test_outputs_and_gradients_are_those_of_the_published_model(golden: Golden, kind: str) -> None:
    io = golden.io
    assert (io["mask"].diff(dim=1) > 0).any(), "masks with holes are wanted here"
    found = results(golden.resampler, io["context"], io["mask"], io["probe"])
    assert error(found["out"], io["out"]) < 5e-6
    assert error(found["context"], io["grad_context"]) < LIMITS[kind]
    gradients = {ours(k.removeprefix("grad/")): v for k, v in io.items() if k.startswith("grad/")}
    assert len(gradients) >= 12
    for name, wanted in gradients.items():
        assert error(found[name], wanted) < LIMITS[kind], name


def test_logits_are_those_of_the_published_model(golden: Golden) -> None:
    resampler, io = golden.resampler, golden.io
    block = resampler.blocks[0]
    attention = block.attention
    context = resampler.context_norm(io["context"])
    q = attention.q(block.norm1(resampler.latents)).unflatten(-1, (-1, attention.head_width))
    k = attention.k(context).unflatten(-1, (-1, attention.head_width))
    q, k, scale = attention.compared(q[None].expand(len(k), -1, -1, -1), k)
    logits = torch.einsum("nqhk,nshk->nhqs", q, k) * scale
    assert error(logits, io["layer0_logits_unmasked"]) < 5e-6


# --- Masks --------------------------------------------------------------------------------------


def frames(kind: str) -> tuple[Resampler, Tensor, Tensor, Tensor]:
    """Resampler, context, a mask with holes and an empty frame, gradient of the output."""
    resampler = drawn(kind, 3, 16, 2, 24)
    context, upstream = torch.randn(4, 7, 16), torch.randn(4, 3, 16)
    mask = torch.rand(4, 7) < 0.5
    mask[0], mask[1] = True, torch.arange(7) < 3
    mask[2, :4], mask[3] = torch.tensor([False, True, False, True]), False
    return resampler, context, mask, upstream


@pytest.mark.parametrize("padding", [1e4, float("inf"), float("nan")])
def test_what_is_masked_has_no_influence_and_no_gradient(kind: str, padding: float) -> None:
    resampler, context, mask, upstream = frames(kind)
    wanted = results(resampler, context, mask, upstream)
    other = context.masked_fill(~mask[..., None], padding)
    found = results(resampler, other, mask, upstream)
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
    assert not wanted["context"][~mask].any() and wanted["context"][mask].all()


def test_a_mask_is_the_same_as_leaving_features_out(kind: str) -> None:
    resampler, context, mask, upstream = frames(kind)
    wanted = results(resampler, context, mask, upstream)
    for i in range(3):
        short = context[i : i + 1, mask[i]]
        found = results(resampler, short, None, upstream[i : i + 1])
        torch.testing.assert_close(found["out"], wanted["out"][i : i + 1], rtol=1e-5, atol=1e-5)
        left = wanted["context"][i : i + 1, mask[i]]
        torch.testing.assert_close(found["context"], left, rtol=1e-4, atol=1e-4)


def test_a_frame_without_features_runs_through_the_perceptrons_alone(kind: str) -> None:
    resampler, context, mask, _ = frames(kind)
    x = resampler.latents
    for block in resampler.blocks:
        x = x + block.mlp(block.norm2(x))
    out = resampler(context, mask)
    torch.testing.assert_close(out[3], resampler.norm(x), rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(
        out[3].sum(), list(resampler.parameters()), retain_graph=True, allow_unused=True
    )
    touched = {
        name
        for (name, _), gradient in zip(resampler.named_parameters(), gradients, strict=True)
        if gradient is not None and gradient.any()
    }
    assert touched == {"latents", "norm.weight"} | {
        f"blocks.{i}.{leaf}.weight" for i in range(2) for leaf in ("norm2", "mlp.up", "mlp.down")
    }


def test_frames_do_not_see_each_other(kind: str) -> None:
    resampler, context, mask, _ = frames(kind)
    whole = resampler(context, mask)
    for i in range(4):
        alone = resampler(context[i : i + 1], mask[i : i + 1])
        torch.testing.assert_close(alone, whole[i : i + 1], rtol=1e-5, atol=1e-5)


def test_projections_stand_where_widths_differ(kind: str) -> None:
    resampler = drawn(kind, 3, 16, 2, 24, context_width=10, output_width=20)
    context = torch.randn(2, 5, 10)
    inside = drawn(kind, 3, 16, 2, 24)
    inside.load_state_dict(
        {k: v for k, v in resampler.state_dict().items() if "projection" not in k}
    )
    wanted = (
        inside(context @ resampler.pre_projection.weight.T) @ resampler.post_projection.weight.T
    )
    torch.testing.assert_close(resampler(context), wanted, rtol=1e-5, atol=1e-5)
    assert wanted.shape == (2, 3, 20)


# --- Who computes it ----------------------------------------------------------------------------


def test_the_fused_way_gives_what_the_composed_gives(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and all gradients; on a GPU the fused way is the kernels."""
    torch.manual_seed(1)
    resampler = drawn(kind, 8, 64, 2, 48)
    context, upstream = torch.randn(3, 20, 64), torch.randn(3, 8, 64)
    mask = torch.rand(3, 20) < 0.6
    mask[2] = False
    wanted = results(resampler, context, mask, upstream)
    calls: list[str] = []

    def counted(owner: object, name: str) -> None:
        op = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: calls.append(name) or op(*a, **k))

    counted(module, "cosine_attention")
    counted(parts, "qk_norm_rope")
    monkeypatch.setattr(module, "cosine_path", lambda q, keys: CosinePath.FUSED)
    monkeypatch.setattr(parts, "qk_backend", lambda device: QkBackend.KERNEL)
    found = results(resampler, context, mask, upstream)
    for name, tensor in wanted.items():
        assert error(found[name], tensor) < 1e-5, name
    assert calls == ["qk_norm_rope" if kind == "qk" else "cosine_attention"] * 2


@pytest.mark.parametrize("latents, keys, fits", [(8, 20, True), (8, 21, True), (3, 700, False)])
def test_the_norm_op_takes_latents_and_features_whose_tokens_agree(
    latents: int, keys: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are numbered anew so that both have as many; heads of one row are limited."""
    similarity = Cosine(2)
    attention = LatentAttention(
        64, 2, q_norm=RMSNorm(32, EPS), k_norm=RMSNorm(32, EPS), similarity=similarity
    )
    torch.nn.init.normal_(similarity.log_scale, 1.0)
    q, k = torch.randn(3, latents, 2, 32), torch.randn(3, keys, 2, 32)
    wanted = attention.compared(q, k)
    monkeypatch.setattr(parts, "qk_backend", lambda device: QkBackend.KERNEL)
    op, calls = parts.qk_norm_rope, []
    monkeypatch.setattr(
        parts, "qk_norm_rope", lambda *a, **k: calls.append(len(a[0]) == len(a[1])) or op(*a, **k)
    )
    found = attention.compared(q, k)
    for a, b in zip(found[:2], wanted[:2], strict=True):
        torch.testing.assert_close(a, b)
    assert calls == [True] * (2 if fits else 0)


# --- Tables -------------------------------------------------------------------------------------


def test_every_parameter_has_an_initial_rule_and_matrices_of_heads_are_split(kind: str) -> None:
    resampler = made(kind, 3, 16, 2, 24, context_width=10, output_width=20)
    rules = initial_rules("history", width=16, mlp_width=24, context_width=10)
    plan = TensorPlan(tensor_rules("history"))
    split = set()
    for name, parameter in resampler.named_parameters():
        full = draw_by_name(f"history.{name}", tuple(parameter.shape), rules, seed=0)
        assert full.shape == parameter.shape
        if plan.slice_of(f"history.{name}") is not None:
            split.add(name.partition("blocks.0.")[2])
    heads = {"attention.similarity.log_scale"} if kind == "cosine" else set()
    matrices = {f"attention.{leaf}.weight" for leaf in ("q", "k", "v", "out")}
    assert split - {""} == matrices | heads | {"mlp.up.weight", "mlp.down.weight"}
    wide = draw_by_name("history.blocks.0.mlp.up.weight", (600, 600), rules, seed=0)
    assert float(wide.std()) == pytest.approx(16**-0.5, rel=0.02)

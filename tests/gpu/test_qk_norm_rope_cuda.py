"""K1 on a GPU: the op's kernel against its torch formulas in float64.

Under the sanitizer (one pass each for memcheck, racecheck, initcheck, synccheck):

    compute-sanitizer --tool memcheck python -m pytest -m gpu tests/gpu/test_qk_norm_rope_cuda.py
"""

from itertools import product

import pytest
import torch
from torch import Tensor

from mmtrain.ops import qk_norm_rope as ours
from mmtrain.ops.extension import load_kernels
from mmtrain.ops.qk_norm_rope import Norm, Pairing

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

WIDTHS = (32, 40, 64, 72, 80, 88, 96, 104, 128, 144, 192, 256)
LIMITS = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 2e-6}
PARAMETER_LIMIT = 1e-5


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    loaded = load_kernels()
    assert loaded.path is not None, loaded.reason


def drawn(
    norm: Norm,
    pairing: Pairing,
    width: int,
    kind: torch.dtype = torch.bfloat16,
    tokens: int = 300,
    heads: tuple[int, int] = (5, 3),
    device: str = "cuda",
) -> tuple:
    """Positional arguments of the op: packed queries and keys, positions in no order."""
    torch.manual_seed(width + tokens)
    whole = torch.randn(tokens, sum(heads) + 2, width).to(kind)
    q, k, _ = whole.to(device).split([*heads, 2], dim=1)

    def leaves(*sizes: int, wanted: bool) -> list[Tensor | None]:
        made = ((torch.rand(size) + 0.5).to(device).requires_grad_() for size in sizes)
        return [leaf if wanted else None for leaf in made]

    angle = 6.0 * torch.rand(50, width // 2, device=device)
    turned = pairing is not Pairing.NONE
    return (
        q.detach().requires_grad_(),
        k.detach().requires_grad_(),
        *leaves(width, width, wanted=norm in (Norm.RMS, Norm.LAYER)),
        *leaves(width, width, wanted=norm is Norm.LAYER),
        *leaves(*heads, wanted=norm is Norm.L2),
        *((angle.cos(), angle.sin()) if turned else (None, None)),
        torch.randint(0, 50, (tokens,), device=device) if turned else None,
        int(norm),
        int(pairing),
        1e-6,
    )


def results(given: tuple) -> list[Tensor]:
    """Queries, keys and the gradients of everything that can be trained."""
    out = torch.ops.mmtrain.qk_norm_rope(*given)[:2]
    leaves = [x for x in given[:8] if x is not None]
    torch.manual_seed(1)
    upstream = [torch.randn(x.shape).to(x) for x in out]
    return [*out, *torch.autograd.grad(out, leaves, upstream)]


def exact(given: tuple) -> list[Tensor]:
    """The same in float64 on the host, from the inputs as they are rounded."""
    wide = [
        x.detach().cpu().double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in given
    ]
    wide = [x.cpu() if isinstance(x, Tensor) else x for x in wide]
    torch.manual_seed(1)
    upstream = [torch.randn(x.shape).to(x.dtype).double() for x in given[:2]]
    outputs = ours._forward(*wide)
    gradients = ours._backward(*upstream, *wide[:11], *outputs[2:], *wide[11:])
    present = [g for g, x in zip(gradients, wide[:8], strict=True) if x is not None]
    return [*outputs[:2], *present]


def check(given: tuple) -> None:
    for i, (found, wanted) in enumerate(zip(results(given), exact(given), strict=True)):
        error = float((found.double().cpu() - wanted).norm() / wanted.norm())
        assert error < (LIMITS[given[0].dtype] if i < 4 else PARAMETER_LIMIT), (i, error)


@pytest.mark.parametrize("width", WIDTHS)
def test_every_norm_and_pairing_agrees_with_float64(width: int) -> None:
    for norm, pairing in product(Norm, Pairing):
        check(drawn(norm, pairing, width))


@pytest.mark.parametrize("kind", [torch.float16, torch.float32])
def test_other_element_types_agree_too(kind: torch.dtype) -> None:
    for norm, pairing, width in product(Norm, Pairing, (72, 128)):
        check(drawn(norm, pairing, width, kind))


@pytest.mark.parametrize("tokens", [1, 7, 63, 65, 129, 1000, 20000])
@pytest.mark.parametrize("heads", [(1, 1), (16, 16), (40, 8)])
def test_any_number_of_tokens_and_heads(tokens: int, heads: tuple[int, int]) -> None:
    check(drawn(Norm.LAYER, Pairing.HALVES, 88, tokens=tokens, heads=heads))
    check(drawn(Norm.L2, Pairing.NEIGHBOURS, 128, tokens=tokens, heads=heads))


def test_results_repeat_to_the_last_bit() -> None:
    for norm in (Norm.RMS, Norm.LAYER, Norm.L2):
        given = drawn(norm, Pairing.HALVES, 128, tokens=5000, heads=(40, 8))
        first = results(given)
        for _ in range(3):
            assert all(map(torch.equal, first, results(given)))


def test_it_runs_on_any_stream_and_in_a_graph() -> None:
    given = tuple(
        x.detach() if isinstance(x, Tensor) else x for x in drawn(Norm.RMS, Pairing.HALVES, 128)
    )
    wanted = torch.ops.mmtrain.qk_norm_rope(*given)[0]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        beside = torch.ops.mmtrain.qk_norm_rope(*given)[0]
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(beside, wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.ops.mmtrain.qk_norm_rope(*given)[0]
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_it_runs_on_a_device_that_is_not_the_current_one() -> None:
    check(drawn(Norm.RMS, Pairing.HALVES, 64, device="cuda:1"))


def test_it_compiles_to_one_graph() -> None:
    given = drawn(Norm.RMS, Pairing.HALVES, 128)

    def step(q: Tensor, k: Tensor) -> Tensor:
        a, b = torch.ops.mmtrain.qk_norm_rope(q, k, *given[2:])[:2]
        return a.float().square().sum() + b.float().sum()

    compiled = torch.compile(step, fullgraph=True)
    torch.testing.assert_close(compiled(*given[:2]), step(*given[:2]))
    torch.library.opcheck(torch.ops.mmtrain.qk_norm_rope.default, given)

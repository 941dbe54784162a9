"""What several test files share: the demo world and a picture too large, made once a session."""

import os
import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import settings

from mmtrain.data.shapes import write_shapes

# the same examples every time, so that one commit passes or fails; `make test-all` draws new ones
settings.register_profile("repeatable", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

ROOT = Path(__file__).resolve().parent.parent

RECIPE = """
name: test
output: {runs}
model:
  vision: {{image_size: 28, layers: 1, width: 32, heads: 4, mlp_width: 64}}
  causal: {{queries: 4, layers: 1, width: 32, heads: 4, head_width: 8, mlp_width: 64}}
  language: {{vocabulary: 256, layers: 2, width: 32, heads: 4, mlp_width: 64, context: 64}}
data:
  tokenizer: {data}/tokenizer
  sources:
    captions: {{path: {data}/captions, rule: pair, max_images: 1, max_tokens: 32}}
  pack_tokens: 128
  pack_images: 4
schedule: {{warmup_steps: 2}}
train: {{steps: 10, global_batch_packs: 8, precision: fp32}}
"""


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small demo world: 120 training documents, held-out splits and a tokenizer."""
    out = tmp_path_factory.mktemp("shapes") / "demo_data"
    write_shapes(out, 120, seed=0)
    return out


@pytest.fixture(scope="session")
def huge_png() -> bytes:
    """A sound PNG of 20,000 x 20,000 pixels in 200 KB, written without ever holding it."""
    side, packer = 20_000, zlib.compressobj(1)
    rows = b"\0" * (1 + side // 8) * 100  # of one bit a pixel
    body = b"".join(packer.compress(rows) for _ in range(side // 100)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", body), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )


@pytest.fixture
def recipe(tmp_path: Path, shapes: Path) -> Path:
    """A recipe without a fault."""
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(data=shapes, runs=tmp_path / "runs"))
    return path

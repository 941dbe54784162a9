"""A conversion holds about one tensor, however large the weights are."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mmtrain.convert.llama import language_of
from mmtrain.models.emu.config import EmuConfig
from mmtrain.models.emu.names import LLAMA
from mmtrain.models.emu.sizes import TRUNK, expected_shapes

CONFIG = {
    "model_type": "llama",
    "vocab_size": 4000,
    "hidden_size": 512,
    "intermediate_size": 3072,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "rms_norm_eps": 1e-6,
}
LARGEST = 4000 * 512 * 2  # the token table


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_weights(tmp_path: Path) -> None:
    language = language_of(CONFIG, tmp_path)
    shapes = expected_shapes(EmuConfig(language=language), TRUNK)
    with torch.device("meta"):
        ours = {n: torch.empty(s) for n, s in shapes.items() if n != "head.regress.weight"}
    state = {n: torch.zeros(t.shape).bfloat16() for n, t in LLAMA.to_foreign(ours).items()}
    total = sum(tensor.nbytes for tensor in state.values())
    assert total > 20 * LARGEST
    for name in ("safe", "bins"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(CONFIG))
    save_file(state, tmp_path / "safe/model.safetensors")
    torch.save(state, tmp_path / "bins/pytorch_model.bin")
    done = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).with_name("peak.py")),
            "import llama bins first --dry-run",  # what torch imports to read it is not counted
            "import llama safe full --shard-gb 0.05",
            "import llama bins same --dtype fp32",
            "export llama full back",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        # left alone, glibc raises the size from which it gives freed memory back at once
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 16)},
        check=True,
    )
    grew = [int(found) for found in re.findall(r"code 0 grew (\d+)", done.stdout)]
    assert len(grew) == 4, done.stdout + done.stderr
    # a tensor, its copy in another number type, and what Python itself takes
    assert max(grew[1:]) < 4 * LARGEST + (8 << 20), (grew, total)

"""The ops `mmtrain::*` of this package, and the library that implements them on a GPU.

Schemas, shapes for tracing, derivatives and a torch implementation for every device are registered
in Python by the modules of `mmtrain.ops`. `kernels/build.py` makes a library which implements the
same ops for CUDA tensors; torch prefers it once it is loaded. A library of other sources than the
present ones is never loaded: its name holds their hash.

The sources lie beside an editable install. Without them (a wheel) or without a built library the
torch implementations serve.
"""

import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

NAMESPACE = "mmtrain"
_library: Any = torch.library  # its functions are untyped
LIBRARY = _library.Library(NAMESPACE, "FRAGMENT")
TAGS = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)
BUILD_SCRIPT = Path(__file__).resolve().parents[2] / "kernels" / "build.py"


@dataclass(frozen=True)
class Loaded:
    """Whether the library of kernels is in this process.

    Attributes:
        path: of the library, or None.
        reason: why it is not, and the way out; empty when it is.
    """

    path: Path | None
    reason: str = ""


def define(schema: str) -> None:
    """Define an op of the namespace, as in `name(Tensor x) -> Tensor`."""
    LIBRARY.define(schema, tags=TAGS)


@cache
def load_kernels() -> Loaded:
    """Load the library of kernels if there is a GPU that it was built for, once a process."""
    if not torch.cuda.is_available():
        return Loaded(None, "there is no CUDA device")
    build = _build_module()
    if build is None:
        return Loaded(None, f"the kernels' sources are not there ({BUILD_SCRIPT.parent})")
    built: dict[Path, tuple[str, ...]] = build.built_libraries()
    capability = torch.cuda.get_device_capability()
    fitting = [path for path, names in built.items() if covers(names, capability)]
    if not fitting:
        have = ", ".join(sorted({name for names in built.values() for name in names})) or "none"
        wanted = "sm_{}{}".format(*capability)
        text = f"no library is built for {wanted} (built: {have}); run `python {BUILD_SCRIPT}`"
        return Loaded(None, text)
    ops: Any = torch.ops
    ops.load_library(str(fitting[0]))
    return Loaded(fitting[0])


def covers(names: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """Whether code for the architectures `names` runs on a GPU of this compute capability.

    Code runs on later minor versions of its major version; that of `sm_90a` on 9.0 alone; the
    library of sm_80 also holds PTX, which the driver compiles for anything newer.
    """
    if "sm_80" in names and capability >= (8, 0):
        return True
    if "sm_90a" in names and capability == (9, 0):
        return True
    plain = [name.removeprefix("sm_") for name in names if name[-1].isdigit()]
    return any(
        int(number[:-1]) == capability[0] and int(number[-1]) <= capability[1] for number in plain
    )


def _build_module() -> ModuleType | None:
    if not BUILD_SCRIPT.is_file():
        return None
    spec = importlib.util.spec_from_file_location("mmtrain_kernels_build", BUILD_SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

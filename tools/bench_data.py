"""Documents per second and core through the reader, against Pillow, webdataset and datasets.

    python tools/bench_data.py [--packages DIR] [--documents N] [--rounds N] [--sides 512 256]

Every side does all documents in each turn, from files that the page cache holds, in this one
process and thread; turns are interleaved, time is that of the processor, ratios are taken inside
each round. webdataset and Hugging Face `datasets` are optional; they are no dependencies, and what
they need differs from mmtrain's pins, so they go into a folder of their own, named last on the
path:

    pip install --target DIR webdataset datasets
    pip install --target DIR --no-deps --upgrade datasets==4.4.1  # with huggingface-hub 0.36

mmtrain: open the source, check its shards, plan, read, decode, resize, normalise, tokenise, pack,
masks, labels, batch; once with its own filter of pictures and once with Pillow's (`data.resize:
exact`). Pillow: open, RGB, resize, of bytes in memory. The others: read, decode, the release's
torchvision transforms, tokenise, pad and stack. Before the clock starts, the tokens of all sides
must agree, and the pixels: to the last bit where all use Pillow's filter.
"""

import argparse
import io
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import numpy as np
import torch
from bench_cpu import Pace, Side, circumstances, race, ratios, spread, table
from PIL import Image
from torchvision import transforms
from transformers import AutoTokenizer

from mmtrain.data.assemble import Assembler
from mmtrain.data.batch import Batch
from mmtrain.data.choices import Resize
from mmtrain.data.document import Document, Modality, Part
from mmtrain.data.loader import heldout_batches
from mmtrain.data.mixture import OnePass
from mmtrain.data.pack import Plan
from mmtrain.data.rules import Draw, Rule, RuleOptions
from mmtrain.data.shapes import write_shapes
from mmtrain.data.shapes_text import remark
from mmtrain.data.shapes_world import kinds
from mmtrain.data.shards import build_index, write_shards
from mmtrain.data.sources import open_source
from mmtrain.data.tokens import SequenceFormat
from mmtrain.data.vocabulary import Vocabulary, load_vocabulary

IMAGE_SIZE, VISUAL_TOKENS, PACK_TOKENS = 224, 32, 2048  # of Emu 14B
BATCH = 32  # documents that the others pad together: about as many as a pack holds


@dataclass(frozen=True)
class World:
    """The same documents in every form."""

    folder: Path
    blobs: list[bytes]
    texts: list[str]
    vocabulary: Vocabulary
    layout: SequenceFormat


def photograph(draw: np.random.Generator, side: int) -> bytes:
    """A JPEG with the spectrum of a photograph (f^-1.2), about `side` pixels, quality 90."""
    width, height = (int(side * draw.uniform(0.75, 1.25)) for _ in range(2))
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    fall = np.maximum(np.hypot(rows, columns), 1 / side) ** -1.2
    light, *colours = (
        np.fft.irfft2(np.fft.rfft2(draw.standard_normal((height, width))) * fall, (height, width))
        for _ in range(4)
    )
    pixels = 128 + 50 * (light / light.std())[..., None]
    pixels = pixels + 15 * np.stack([colour / colour.std() for colour in colours], -1)
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def make_world(folder: Path, documents: int, side: int) -> World:
    """Captioned photographs as shards, as a tar and as an Arrow folder."""
    folder.mkdir()
    tokenizer = write_shapes(folder / "demo", 60, seed=0).tokenizer
    vocabulary = load_vocabulary(tokenizer)
    draw = np.random.default_rng(0)
    blobs = [photograph(draw, side) for _ in range(documents)]
    texts = [remark(Draw("caption", number), kinds()) for number in range(documents)]
    with write_shards(folder / "shards") as writer:
        for number, (blob, text) in enumerate(zip(blobs, texts, strict=True)):
            picture = Part(modality=Modality.image, media=(blob,))
            words = Part(modality=Modality.text, text=text)
            name = f"{number:06d}"
            writer.write(Document(sample_id=name, kind="pair", parts=(picture, words)))
    build_index(folder / "shards", vocabulary)
    with tarfile.open(folder / "pairs.tar", "w") as tar:
        for number, (blob, text) in enumerate(zip(blobs, texts, strict=True)):
            for ending, content in (("jpg", blob), ("txt", text.encode())):
                info = tarfile.TarInfo(f"{number:06d}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    ids = vocabulary.require(("<s>", "</s>", "[PAD]", "[IMG]", "[/IMG]", "<image>"))
    bos, eos, pad, begin, end, slot = ids.values()
    layout = SequenceFormat(
        bos=bos,
        eos=eos,
        pad=pad,
        image_begin=begin,
        image_end=end,
        image_slot=slot,
        visual_tokens=VISUAL_TOKENS,
        image_size=IMAGE_SIZE,
    )
    return World(folder, blobs, texts, vocabulary, layout)


# --- sides ---------------------------------------------------------------------------------


def read_mmtrain(world: World, resize: Resize = Resize.fast) -> Iterator[Batch]:
    """The whole reader, from opening the source to the last micro-batch."""
    layout = replace(world.layout, resize=resize)
    options = RuleOptions(rule=Rule.pair, max_images=1, max_positions=512, image_first=1.0)
    source = open_source("pairs", world.folder / "shards", world.vocabulary, options)
    plan = Plan(
        OnePass(source),
        group_length=layout.group_length,
        pack_tokens=PACK_TOKENS,
        pack_images=64,
        window_documents=256,
        seed=0,
    )
    assembler = Assembler(
        sources=[source],
        vocabulary=world.vocabulary,
        layout=layout,
        pack_tokens=PACK_TOKENS,
    )
    return heldout_batches(plan, assembler, packs=1 << 30, micro_batch_packs=1)


def read_pillow(world: World, size: int | None) -> Iterator[Image.Image]:
    """RGB pictures, resized unless `size` is None."""
    for blob in world.blobs:
        with Image.open(io.BytesIO(blob)) as picture:
            decoded = picture.convert("RGB")
        yield decoded if size is None else decoded.resize((size, size), Image.Resampling.BICUBIC)


class Released:
    """What a training script does with a picture and its text: torchvision and transformers."""

    def __init__(self, world: World) -> None:
        """Make the transforms of the release."""
        bicubic = transforms.InterpolationMode.BICUBIC
        self.transform = transforms.Compose(
            [
                transforms.Resize((IMAGE_SIZE, IMAGE_SIZE), interpolation=bicubic),
                transforms.ToTensor(),
                transforms.Normalize(world.layout.image_mean, world.layout.image_std),
            ]
        )
        self.tokenizer = AutoTokenizer.from_pretrained(world.folder / "demo/tokenizer")
        self.tokenizer.pad_token = "[PAD]"

    def batch(self, pictures: Sequence[Image.Image], texts: Sequence[str]) -> dict[str, Any]:
        """Pixels `[B, 3, S, S]` and padded tokens `[B, L]`."""
        pixels = [self.transform(picture.convert("RGB")) for picture in pictures]
        words = self.tokenizer(
            list(texts), padding=True, return_tensors="pt", add_special_tokens=False
        )
        return {"pixels": torch.stack(pixels), **words}


def webdataset_reader(world: World) -> Callable[[], Iterator[dict[str, Any]]] | None:
    """The same pictures and texts through `webdataset`, or None where it is not installed."""
    try:
        import webdataset
    except ImportError:
        return None
    released = Released(world)
    return lambda: iter(
        webdataset.WebDataset(str(world.folder / "pairs.tar"), shardshuffle=False)
        .decode("pil")
        .to_tuple("jpg", "txt")
        .batched(BATCH, collation_fn=lambda rows: released.batch(*zip(*rows, strict=True)))
    )


def datasets_reader(world: World) -> Callable[[], Iterator[dict[str, Any]]] | None:
    """The same through an Arrow folder of `datasets`, or None where it is not installed."""
    try:
        import datasets
    except ImportError:
        return None
    datasets.disable_progress_bars()
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {"image": [{"bytes": b, "path": None} for b in world.blobs], "text": world.texts}
    path = str(world.folder / "arrow")
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(path)
    released = Released(world)

    def read() -> Iterator[dict[str, Any]]:
        stored = datasets.load_from_disk(path)
        for rows in stored.iter(BATCH):
            yield released.batch(rows["image"], rows["text"])

    return read


# --- comparison ----------------------------------------------------------------------------


def check_agreement(world: World, readers: dict[str, Callable[[], Iterator[Any]]]) -> None:
    """All sides see the same pixels and the same tokens."""
    by_text: dict[tuple[int, ...], list[torch.Tensor]] = {}
    for batch in readers["webdataset"]() if "webdataset" in readers else ():
        for pixels, ids, mask in zip(
            batch["pixels"], batch["input_ids"], batch["attention_mask"], strict=True
        ):
            by_text.setdefault(tuple(ids[mask.bool()].tolist()), []).append(pixels)
    for resize, near in ((Resize.exact, 1e-5), (Resize.fast, 0.1)):  # 0.1: 7 of 255 levels
        check_pictures(world, by_text, read_mmtrain(world, resize), near)


def check_pictures(
    world: World,
    by_text: dict[tuple[int, ...], list[torch.Tensor]],
    batches: Iterator[Batch],
    near: float,
) -> None:
    """Every picture is that of its text, no pixel further off than `near`."""
    found = 0
    for batch in batches:
        fields = batch.inputs.fields
        ends = (fields["tokens"] == world.layout.eos).nonzero().flatten().tolist()
        begins = fields["slots"][:: world.layout.visual_tokens].tolist()
        found += len(begins)
        for index, (begin, end) in enumerate(zip(begins, ends, strict=True)):
            words = tuple(fields["tokens"][begin + VISUAL_TOKENS + 1 : end].tolist())
            if by_text:
                candidates = by_text[words]
                pixels = batch.inputs.hidden[index]
                assert any(torch.allclose(pixels, other, atol=near) for other in candidates)
    assert found == len(world.blobs), (found, len(world.blobs))


def compare(world: World, pace: Pace) -> list[tuple[str, list[float]]]:
    """Documents per second of every side in each round."""
    readers: dict[str, Callable[[], Iterator[Any]]] = {
        "mmtrain": lambda: read_mmtrain(world),
        "mmtrain, exact": lambda: read_mmtrain(world, Resize.exact),
        "Pillow, resized": lambda: read_pillow(world, IMAGE_SIZE),
        "Pillow, decoded": lambda: read_pillow(world, None),
    }
    for name, reader in (
        ("webdataset", webdataset_reader(world)),
        ("datasets", datasets_reader(world)),
    ):
        if reader is not None:
            readers[name] = reader
    check_agreement(world, readers)

    def side(name: str, read: Callable[[], Iterator[Any]]) -> Side:
        return Side(name, lambda _: [None for _ in read()], [len(world.blobs)])

    sides = [side(name, read) for name, read in readers.items()]
    return list(zip(readers, race(sides, pace), strict=True))


def main() -> int:
    """Measure everything and print Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--documents", type=int, default=200, help="of each size")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side")
    parser.add_argument("--seconds", type=float, default=0.0, help="a turn lasts at least so long")
    parser.add_argument("--sides", type=int, nargs="+", default=[512, 256], help="pixels, about")
    parser.add_argument("--packages", type=Path, help="folder of webdataset and datasets")
    asked = parser.parse_args()
    if asked.packages is not None:
        sys.path.append(str(asked.packages))
    load_before = os.getloadavg()[0]
    torch.set_num_threads(1)
    print(circumstances(load_before), flush=True)
    rows = []
    for pixels in asked.sides:
        with tempfile.TemporaryDirectory() as folder:
            world = make_world(Path(folder) / "world", asked.documents, pixels)
            mean = sum(map(len, world.blobs)) / len(world.blobs)
            found = compare(world, Pace(asked.rounds, asked.seconds, time.process_time))
        ours = found[0][1]
        for name, rates in found:
            ratio = "" if name == "mmtrain" else f"**{ratios(ours, rates)}**"
            label = f"{pixels} px, {mean / 1000:.0f} KB"
            rows.append([label, name, spread(rates), ratio])
    head = ["pictures", "reader", "documents per core-second", "mmtrain over it"]
    print(table(head, rows), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

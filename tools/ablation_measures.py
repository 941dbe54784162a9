"""What a run of tools/ablate_transfusion.py is worth: losses, drawn pictures, captions.

Everything is measured on held-out captions of the world of shapes with fixed noise, so that two
runs differ by their weights alone.

- image loss: mean square of the answer over all pixel values, caption first, one time an image
  drawn evenly from 1 to T. The latents are pixels whatever the patch, so patches may be compared.
- caption loss: cross-entropy of a caption after its clean image (time 1 of T).
- drawn: share of pictures drawn from captions that the exact judge accepts; and the share with the
  right number of objects, the right colours, the right shapes.
- Frechet: distance of drawn and held-out pictures (Heusel et al. 2017, arXiv:1706.08500), not over
  Inception's features but over `FEATURES` means of three random convolutions with a fixed seed
  (Naeem et al. 2020, arXiv:2002.09797, found random networks fit for it), each divided by its
  deviation over the held-out pictures. Compare it with nothing outside one table.
- captions: share of captions of held-out pictures that are true, and CIDEr-D.

N pictures   F features
"""

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from mmtrain import feed
from mmtrain import recipe as recipes
from mmtrain.checkpoint import portable
from mmtrain.data import images
from mmtrain.data.assemble import Assembler
from mmtrain.data.loader import heldout_batches
from mmtrain.data.mixture import OnePass
from mmtrain.data.shapes_judge import find_objects
from mmtrain.data.shapes_text import judge
from mmtrain.errors import MissingError
from mmtrain.evaluate import held
from mmtrain.evaluate.cider import cider
from mmtrain.evaluate.examples import Example
from mmtrain.evaluate.opening import open_pictures
from mmtrain.evaluate.words import caption_words
from mmtrain.models.spec import Use
from mmtrain.models.transfusion.model import losses
from mmtrain.trained import Style, Trained, load_layers, load_run

FEATURES = 32
_CHANNELS = (8, 8, 16)  # of the random convolutions; their sum is FEATURES
_REFERENCE = 512  # held-out pictures that drawn ones are compared with
_PICTURES_AT_ONCE = 32
_NEW_TOKENS = 24


def measure(run: Path, *, documents: int, pictures: int) -> dict[str, Any]:
    """Every figure of a trained run.

    Args:
        run: its folder.
        documents: held-out captions whose losses and captions are measured.
        pictures: drawn.

    Raises:
        MissingError: the run, or its held-out captions, are not there.
    """
    trained = load_run(run)
    examples = _examples(trained, max(documents, _REFERENCE))
    census = feed.read_setting(trained.recipe).shapes
    return {
        "parameters": sum(math.prod(shape) for shape in census.values()),
        **_losses(run, documents),
        **_captions(trained, examples[:documents]),
        **_drawn(trained, examples, pictures),
    }


def truth(run: Path, *, pictures: int) -> dict[str, float]:
    """The figures of `_drawn` for true pictures of other captions at the model's size."""
    trained = load_run(run)
    examples = _examples(trained, _REFERENCE + pictures)
    shown = _true(trained, examples[-pictures:])
    return {
        **judged(examples[-pictures:], [_picture(trained, x) for x in shown]),
        "frechet": frechet(features(shown), features(_true(trained, examples[:_REFERENCE]))),
    }


# --- losses --------------------------------------------------------------------------------


@torch.inference_mode()
def _losses(run: Path, documents: int) -> dict[str, Any]:
    """Image loss behind captions and caption loss behind clean images."""
    image, _, seen = _heldout_loss(run, documents, image_first=0, limit=1000)
    _, text, _ = _heldout_loss(run, documents, image_first=1, limit=1)
    return {"image_loss": image, "caption_loss": text, "documents": seen}


def _heldout_loss(
    run: Path, documents: int, *, image_first: int, limit: int
) -> tuple[float, float, str]:
    """Mean image and text loss, and a digest of the documents that were seen."""
    per_pack = recipes.read(run / "recipe.yaml").data.pack_images
    recipe = recipes.read(
        run / "recipe.yaml",
        [
            "seed=0",  # of the noise, for every run
            f"data.heldout.captions.image_first={image_first}",
            f"data.window_documents={documents}",
            f"model.noise.limit={limit}",
        ],
    )
    setting = feed.read_setting(recipe)
    tensors = portable.open_tensors(run)
    layers = load_layers(setting.spec, recipe.model, tensors, torch.device("cpu"))
    sources = feed.open_sources(setting, recipe.data.heldout)
    plan = feed.make_plan(setting, OnePass(sources[0]))
    assembler = Assembler(
        sources=sources,
        vocabulary=setting.vocabulary,
        layout=setting.layout,
        pack_tokens=recipe.data.pack_tokens,
    )
    prepare = setting.spec.prepare(recipe.model, setting.layout, torch.device("cpu"), Use.heldout)
    packs = documents // per_pack
    sums, counts, seen = Counter[str](), Counter[str](), set[str]()
    for batch in heldout_batches(plan, assembler, packs=packs, micro_batch_packs=1):
        made = prepare(batch)
        found = losses(layers, made.inputs)
        seen |= set(batch.info.sample_ids)
        real = {
            "text": made.inputs.fields["labels"] >= 0,
            "image": made.targets.weights["image"] > 0,
        }
        for name, kept in real.items():
            sums[name] += float(found[name][kept].double().sum())
            counts[name] += int(kept.sum())
    digest = hashlib.blake2b("\n".join(sorted(seen)).encode(), digest_size=8).hexdigest()
    return sums["image"] / counts["image"], sums["text"] / counts["text"], digest


# --- captions and pictures -----------------------------------------------------------------


def _examples(trained: Trained, count: int) -> list[Example]:
    made = (
        held.captioned(*found) for found in held.documents("", trained.recipe.data.heldout, count)
    )
    found = [example for example in made if example is not None and held.has_facts(example)]
    if len(found) < count:
        raise MissingError(
            f"{trained.folder}: data.heldout has {len(found)} captions with facts, {count} are "
            "needed; remove the campaign's world, it is made again by the next `run`"
        )
    return found


def _captions(trained: Trained, examples: Sequence[Example]) -> dict[str, float]:
    prompts = [
        trained.prompt([open_pictures(e.pictures)[0], *([e.question] if e.question else [])])
        for e in examples
    ]
    texts = [
        f"{e.question} {written}".strip()
        for e, written in zip(examples, trained.write(prompts, _NEW_TOKENS), strict=True)
    ]
    right = [judge(text, e.facts) for text, e in zip(texts, examples, strict=True)]
    references = [[caption_words(a) for a in e.answers] for e in examples]
    scores = cider([caption_words(text) for text in texts], references)
    return {"captions_true": _mean(right), "cider": 100 * _mean(scores)}


def _drawn(trained: Trained, examples: Sequence[Example], count: int) -> dict[str, float]:
    told, drawer = examples[:count], trained.drawing(Style(seed=0))
    prompts = [trained.prompt([e.answer]) for e in told]
    drawn = torch.cat(
        [
            drawer.rollout(prompts[start : start + _PICTURES_AT_ONCE])
            for start in range(0, count, _PICTURES_AT_ONCE)
        ]
    )
    return {
        **judged(told, [_picture(trained, x) for x in drawn]),
        "frechet": frechet(features(drawn), features(_true(trained, examples[:_REFERENCE]))),
    }


def _picture(trained: Trained, pixels: Tensor) -> Image.Image:
    picture = trained.sampler.picture(pixels)
    assert picture is not None, "a Transfusion draws by itself"
    return picture


def _true(trained: Trained, examples: Sequence[Example]) -> Tensor:
    """Pixels `[N, 3, S, S]` of the examples' own pictures."""
    made = [open_pictures(e.pictures)[0] for e in examples]
    return torch.stack([images.decode(images.encode_png(x), trained.layout) for x in made])


def judged(examples: Sequence[Example], pictures: Sequence[Image.Image]) -> dict[str, float]:
    """Shares of pictures that show what their captions say, as a whole and in parts."""
    marks = Counter[str]()
    for example, picture in zip(examples, pictures, strict=True):
        found = [item.facts() for item in find_objects(picture)]
        true = example.facts["objects"]
        category = example.facts["category"]
        marks["accepted"] += judge(example.answer, {"category": category, "objects": found})
        marks["number"] += len(found) == len(true)
        for name, key in (("colours", "colour"), ("shapes", "shape")):
            marks[name] += _every(found, key) == _every(true, key)
    names = ("accepted", "number", "colours", "shapes")
    return {name: marks[name] / len(examples) for name in names}


def _every(objects: Sequence[Mapping[str, Any]], key: str) -> Counter[str]:
    return Counter(str(item[key]) for item in objects)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# --- Frechet distance ----------------------------------------------------------------------


@torch.inference_mode()
def features(pixels: Tensor) -> Tensor:
    """Means over the picture of three random convolutions: `[N, 3, S, S]` to float64 `[N, F]`."""
    generator = torch.Generator().manual_seed(0)
    hidden, out = pixels.clamp(-1, 1), []
    for width in _CHANNELS:
        weight = torch.empty(width, hidden.shape[1], 3, 3)
        nn.init.orthogonal_(weight, 2**0.5, generator=generator)
        hidden = functional.relu(functional.conv2d(hidden, weight, stride=2, padding=1))
        out.append(hidden.mean((2, 3)))
    return torch.cat(out, 1).double()


def frechet(ours_NF: Tensor, true_NF: Tensor) -> float:
    """|m - n|^2 + tr(A + B - 2 (A B)^1/2) of two Gaussians, in deviations of the true features."""
    scale_F = true_NF.std(0)
    scale_F = torch.where(scale_F > 0, scale_F, 1.0)
    ours_NF, true_NF = ours_NF / scale_F, true_NF / scale_F
    between = (ours_NF.mean(0) - true_NF.mean(0)).square().sum()
    first, second = torch.cov(ours_NF.T), torch.cov(true_NF.T)
    values, vectors = torch.linalg.eigh(second)
    root = vectors @ (values.clamp(min=0).sqrt()[:, None] * vectors.T)
    # (A B) and (B^1/2 A B^1/2) have the same eigenvalues, and the second is symmetric
    crossed = torch.linalg.eigvalsh(root @ first @ root).clamp(min=0).sqrt().sum()
    return float(between + first.trace() + second.trace() - 2 * crossed)

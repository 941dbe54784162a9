"""The arguments of each command, and the forms that words of the command line take."""

import argparse
from pathlib import Path
from typing import Any

from mmtrain.data.rules import Rule

_RULES = tuple(rule.name for rule in Rule)


def recipe(
    parser: argparse.ArgumentParser, name: str = "RECIPE", what: str = "the YAML of the run"
) -> None:
    """A recipe and its overrides."""
    parser.add_argument("recipe", type=Path, metavar=name, help=what)
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="override of a dotted key of the recipe"
    )


def check(parser: argparse.ArgumentParser) -> None:
    """Of `mmtrain check`."""
    recipe(parser, "RECIPE|RUN", "the YAML of a run, or the folder of one")
    parser.add_argument(
        "--world", type=_positive, metavar="N", help="number of ranks the layout must fit"
    )


def plan(parser: argparse.ArgumentParser) -> None:
    """Of `mmtrain plan`."""
    recipe(parser)
    parser.add_argument(
        "--world", type=_positive, metavar="N", required=True, help="number of ranks"
    )


def shapes(parser: argparse.ArgumentParser) -> None:
    """Of `mmtrain data shapes`."""
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make; must not exist")
    parser.add_argument(
        "--documents", type=_positive, default=4000, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="of everything; default: %(default)s"
    )


def index(parser: argparse.ArgumentParser) -> None:
    """Of `mmtrain data index`."""
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="a folder of MDS shards")
    parser.add_argument(
        "--tokenizer", type=Path, required=True, metavar="DIR", help="a Hugging Face folder"
    )


def ingest(parser: argparse.ArgumentParser) -> None:
    """Of `mmtrain data ingest`: a parser for each kind, with the options that the kind takes."""
    kinds = parser.add_subparsers(title="kinds", metavar="KIND", dest="kind", required=True)
    for kind, (summary, source, options) in _KINDS.items():
        made = kinds.add_parser(
            kind, help=summary, description=f"{summary[0].upper()}{summary[1:]}."
        )
        made.add_argument("source", type=Path, metavar="SRC", help=source)
        made.add_argument("out", type=Path, metavar="OUT", help="folder to make; must not exist")
        for option in (*options, *_EVERY_KIND):
            made.add_argument(f"--{option}", **_INGEST[option])


def look(parser: argparse.ArgumentParser) -> None:
    """Of `mmtrain data look`."""
    recipe(parser, "RECIPE|SHARDS", "the YAML of a run, or a folder of MDS shards")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the PNGs")
    parser.add_argument("--tensorboard", type=Path, metavar="DIR", help="show it there too")
    parser.add_argument(
        "--packs", type=_positive, default=4, metavar="N", help="of a recipe; default: %(default)s"
    )
    group = parser.add_argument_group("of a folder of shards")
    add = group.add_argument
    add("--tokenizer", type=Path, metavar="DIR", help="a Hugging Face folder")
    add("--rule", type=_rule, default=Rule.document, metavar="RULE", help=", ".join(_RULES))
    for name, default, what in (
        ("documents", 16, "that are drawn"),
        ("max-tokens", 1024, "positions a sequence may take"),
        ("max-images", 5, "images a sequence keeps"),
        ("visual-tokens", 32, "positions of an image"),
        ("image-size", 224, "pixels a side that the model sees"),
    ):
        add(f"--{name}", type=_positive, default=default, metavar="N", help=f"{what}; {default}")
    add("--image-first", type=float, default=0.5, metavar="P", help="of an image before its text")
    add("--seed", type=int, default=0, metavar="S", help="of the rule's choices")


def run(parser: argparse.ArgumentParser) -> None:
    """A run and one of its checkpoints."""
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder, as in runs/demo")
    parser.add_argument(
        "--checkpoint",
        metavar="NAME",
        help="as in step-00000100; the newest complete one if left out",
    )


def sample(parser: argparse.ArgumentParser) -> None:
    """Of `mmtrain sample`."""
    run(parser)
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="text with pictures and clips as [path.png], [path.mp4]; a prompt that ends with "
        "[IMG] asks for an image; may be repeated; held-out documents are used if left out",
    )
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="prompts, one a line")
    parser.add_argument(
        "--chat",
        action="append",
        default=[],
        metavar="TEXT",
        help="a question for an instruction-tuned run, in the template it was trained with; "
        "pictures and clips as in --prompt; may be repeated",
    )
    parser.add_argument(
        "--system",
        default="auto",
        metavar="WORD",
        help="system message of --chat: auto, image, video, none, or a file; default: %(default)s",
    )
    text = parser.add_argument_group("text")
    text.add_argument(
        "--method",
        choices=("greedy", "top-p", "beam"),
        default="greedy",
        help="default: %(default)s",
    )
    text.add_argument("--top-p", type=_share, default=0.9, metavar="P", help="default: %(default)s")
    text.add_argument(
        "--temperature", type=_above_zero, default=1.0, metavar="T", help="of top-p; default: 1"
    )
    text.add_argument(
        "--beams", type=_positive, default=5, metavar="N", help="default: %(default)s"
    )
    text.add_argument(
        "--new-tokens", type=_positive, default=64, metavar="N", help="default: %(default)s"
    )
    text.add_argument(
        "--images",
        type=_count,
        default=0,
        metavar="N",
        help="images that a text may begin by itself, where the model has learnt to begin them; "
        "default: %(default)s",
    )
    decoder(parser)
    parser.add_argument(
        "--samples",
        type=_positive,
        default=1,
        metavar="N",
        help="pictures of each image that was asked for; default: %(default)s",
    )
    parser.add_argument("--seed", type=_count, default=0, metavar="S", help="default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="DIR", help="RUN/samples if left out")


def decoder(parser: argparse.ArgumentParser) -> None:
    """How a decoder run draws."""
    pictures = parser.add_argument_group("pictures")
    pictures.add_argument(
        "--decoder",
        type=Path,
        metavar="RUN",
        help="a decoder run that draws images (or RUN itself is one); without one, the nearest "
        "training images are shown",
    )
    pictures.add_argument(
        "--scheduler",
        choices=("pndm", "ddim", "dpm", "ddpm"),
        help="of a decoder pndm (as released), ddim or dpm; of a model that draws by itself ddpm "
        "or ddim; the recipe's if left out",
    )
    pictures.add_argument(
        "--steps", type=_positive, metavar="N", help="the decoder recipe's if left out"
    )
    pictures.add_argument(
        "--guidance",
        type=_above_zero,
        metavar="G",
        help="1 = none; the decoder recipe's if left out",
    )


def evaluate(parser: argparse.ArgumentParser) -> None:
    """Of `mmtrain evaluate`."""
    run(parser)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="override of the recipe, as in 'evaluate.tasks.coco={kind: caption, ...}'",
    )
    parser.add_argument(
        "--task",
        action="append",
        default=[],
        metavar="NAME",
        help="a task of the recipe; may be repeated; all of them if left out",
    )
    parser.add_argument(
        "--documents",
        type=_positive,
        metavar="N",
        help="asked of each source, instead of what the tasks say (256 if they do not)",
    )
    parser.add_argument(
        "--decoder", type=Path, metavar="RUN", help="the decoder run that draws for this one"
    )
    parser.add_argument(
        "--watch",
        action="store_true",
        help="evaluate every checkpoint as another process commits it, until the last step",
    )


def convert(parser: argparse.ArgumentParser) -> None:
    """Of `mmtrain convert`."""
    run(parser)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="PATH", help="folder to make (emu: file)"
    )
    parser.add_argument(
        "--as",
        dest="form",
        choices=("llama", "emu", "emu-instruct", "eva", "peft", "unet", "vae"),
        help="another release's form; full tensors by canonical name if left out",
    )
    parser.add_argument(
        "--merge-lora", action="store_true", help="fold adapters into the weights (llama, emu)"
    )


def slurm(parser: argparse.ArgumentParser) -> None:
    """Of `mmtrain slurm`."""
    recipe(parser)
    parser.add_argument("--nodes", type=_positive, metavar="N", required=True, help="of the job")
    parser.add_argument(
        "--gpus-per-node",
        type=_count,
        default=8,
        metavar="G",
        help="one rank each; 0 = CPU nodes; default: %(default)s",
    )
    parser.add_argument(
        "--tasks-per-node", type=_positive, metavar="N", help="ranks of a CPU node; default: 1"
    )
    parser.add_argument(
        "--cpus-per-task", type=_positive, default=8, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--time", default="24:00:00", metavar="LIMIT", help="of one attempt; default: %(default)s"
    )
    for name in ("partition", "account", "qos"):
        parser.add_argument(f"--{name}", metavar="NAME", help="as for sbatch")
    parser.add_argument(
        "--container",
        metavar="IMAGE",
        help="ranks run in it, by Apptainer (a .sqsh file: Pyxis); this environment if left out",
    )
    parser.add_argument(
        "--array", metavar="SEEDS", help="one run for each seed, as in 0-4: NAME-seed-0, ..."
    )
    parser.add_argument(
        "--print", action="store_true", help="write the script to the terminal, submit nothing"
    )


def _rule(word: str) -> Rule:
    if word not in _RULES:
        raise argparse.ArgumentTypeError(f"{word!r} is none of {', '.join(_RULES)}")
    return Rule[word]


def _positive(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"found {word!r}; wanted: a whole number from 1")
    return int(word)


def _count(word: str) -> int:
    if not word.isdecimal():
        raise argparse.ArgumentTypeError(f"found {word!r}; wanted: a whole number from 0")
    return int(word)


def _above_zero(word: str) -> float:
    number = _number(word)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"found {word!r}; wanted: a number above 0")
    return number


def _part(word: str) -> float:
    number = _number(word)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"found {word!r}; wanted: a share from 0 to 1")
    return number


def _share(word: str) -> float:
    number = _number(word)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"found {word!r}; wanted: a number above 0, at most 1")
    return number


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"found {word!r}; wanted: a number") from None


_SHARDS_OF = "a file, a folder that is searched to its depth, or a quoted glob"
_KINDS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "webdataset": ("tars of pictures and captions, as LAION", _SHARDS_OF, ("text",)),
    "parquet": (
        "tables of captions, pages or text, as img2dataset and OBELICS",
        _SHARDS_OF,
        ("images", "image", "text"),
    ),
    "mmc4": ("pages of Multimodal C4", _SHARDS_OF, ("images", "clip-threshold")),
    "webvid": ("a CSV of clips and captions", _SHARDS_OF, ("images", "text", "frames")),
    "storyboard": (
        "thumbnails and subtitles of videos",
        "a folder with one folder a video, or tars of the released tool",
        (),
    ),
    "chat": (
        "conversations, in the JSON that people have",
        "a JSON array of records, or one object a line; a folder or a quoted glob of them",
        ("images", "format", "system", "frames"),
    ),
    "text": ("plain text as JSON lines", _SHARDS_OF, ("text",)),
    "huggingface": (
        "a Hugging Face dataset on disk",
        "a folder that save_to_disk wrote",
        ("images", "image", "text"),
    ),
}
_EVERY_KIND = ("max-side", "reencode", "shard-mb", "tokenizer", "workers", "max-failures")
_INGEST: dict[str, dict[str, Any]] = {
    "images": {
        "type": Path,
        "metavar": "DIR",
        "help": "folder that names of pictures and clips are relative to, or tars of pictures",
    },
    "image": {"metavar": "NAME", "help": "column of the picture; found out if left out"},
    "text": {"metavar": "NAME", "help": "column or key of the text; found out if left out"},
    "clip-threshold": {
        "type": _number,
        "default": 0.32,
        "metavar": "S",
        "help": "least similarity of a picture and its sentence; default: %(default)s",
    },
    "frames": {
        "type": _positive,
        "default": 8,
        "metavar": "N",
        "help": "kept of a clip, evenly spaced; default: %(default)s",
    },
    "format": {
        "choices": ("llava", "sharegpt", "alpaca", "videochat", "video-chatgpt", "messages"),
        "help": "found out from the first records if left out",
    },
    "system": {
        "default": "auto",
        "metavar": "MESSAGE",
        "help": "system message: image, video, none, a text FILE, or auto: image for one picture, "
        "video for a clip, else none; a record's own takes its place; default: %(default)s",
    },
    "max-side": {
        "type": _positive,
        "metavar": "PX",
        "help": "make larger pictures smaller, aspect kept; pictures stay as they are if left out",
    },
    "reencode": {
        "choices": ("jpeg", "png", "webp"),
        "help": "store every picture so; in its own format if left out",
    },
    "shard-mb": {
        "type": _above_zero,
        "default": 64.0,
        "metavar": "MB",
        "help": "of a shard; default: %(default)s",
    },
    "tokenizer": {
        "type": Path,
        "metavar": "DIR",
        "help": "count lengths too, as mmtrain data index",
    },
    "workers": {
        "type": _positive,
        "metavar": "N",
        "help": "processes; the number of cores if left out; shards do not depend on it",
    },
    "max-failures": {
        "type": _part,
        "default": 0.05,
        "metavar": "SHARE",
        "help": "share of broken records beyond which nothing is published; default: %(default)s",
    },
}

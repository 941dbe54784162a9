"""The command line. One table of commands; each handler is a few lines over the rooms below.

Heavy rooms (torch, DeepSpeed, transformers) are imported inside the handlers: they take seconds,
which `--help` and a misspelt command need not wait for, and a training rank must set its signal
handlers before them.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from mmtrain import __version__, log
from mmtrain.errors import ExitCode, MmtrainError, RecipeError
from mmtrain.layout.ranks import launched
from mmtrain.process import die_with_parent

Arguments = argparse.Namespace

_DESCRIPTION = """\
Train models that read and write text and images in one sequence.

One YAML is one run. The same YAML runs on a laptop, under torchrun, under the
deepspeed launcher and under sbatch; overrides follow it as key=value."""

_EPILOG = """\
examples:
  mmtrain data shapes demo_data --documents 4000     make demo data
  mmtrain data chat llava.json chat --images coco    conversations as shards
  mmtrain check configs/emu/demo.yaml                all faults of a recipe, or its facts
  mmtrain check runs/demo                            every byte of a run's checkpoints
  mmtrain plan configs/emu/14b_pretrain.yaml --world 128
  mmtrain train configs/emu/demo.yaml parallel.tensor=1 train.steps=100
  torchrun --nproc-per-node 2 -m mmtrain train configs/emu/demo.yaml
  deepspeed --num_gpus 2 --module mmtrain train configs/emu/demo.yaml
  mmtrain slurm configs/emu/14b_pretrain.yaml --nodes 16
  mmtrain sample runs/demo --prompt "a picture of [picture.png]"

exit codes: 0 done; 2 recipe or command wrong, nothing written; 65 content invalid;
66 input missing; 70 bug; 74 storage; 75 peer failed; 85 stopped on request; 86 hang;
87 non-finite numbers; 88 replicas differ; 93 no progress. Worth a retry: 74 75 85 86 88.
RUN/verdict.json keeps the code and the reason where a launcher loses them.
"""


_TRAIN_EPILOG = """\
The same command goes on from the newest sound checkpoint of the run.

SIGTERM, SIGINT or SIGUSR1 to any rank, or the time limit of the Slurm job
(watch.stop_before_limit_seconds before it): finish the step, save, exit 85.
A third SIGTERM or SIGINT: leave at once, exit 130. SIGUSR2: write the stacks of
all threads to RUN/stacks and go on.
No progress for watch.stall_seconds: stacks of every rank, exit 86. A dead rank:
the others exit 75. A second run in the folder: exit 75. Three attempts that saved
nothing: exit 93. RUN/verdict.json says why the last attempt ended.
"""


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        name: words of the command, as in `data shapes`.
        summary: one line for the list.
        declare: adds the arguments.
        handle: does it; returns the exit code.
        epilog: stands below the options in its help.
    """

    name: str
    summary: str
    declare: Callable[[argparse.ArgumentParser], None]
    handle: Callable[[Arguments], int]
    epilog: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the process's exit code."""
    place = launched(os.environ)
    log.start(place.rank, place.world_size)
    arguments = _parse(argv)
    try:
        return int(arguments.handle(arguments))
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.DONE
    except RecipeError as error:
        if place.rank == 0:  # every rank reads the same recipe and finds the same faults
            print(_faults(error), file=sys.stderr)
        return int(error.exit_code)
    except MmtrainError as error:
        where = f"rank {place.rank}: " if place.world_size > 1 else ""
        print(f"mmtrain: {where}{error}", file=sys.stderr)
        return int(error.exit_code)


def _train(arguments: Arguments) -> int:
    from mmtrain.train.signals import Listener

    place = launched(os.environ)
    if place.by_launcher:  # else by a shell, which may end while training goes on
        die_with_parent()
    listener = Listener()
    from mmtrain.recipe import load

    recipe = load(arguments.recipe, arguments.overrides, place.world_size)
    listener.stop_before_limit(os.environ, recipe.watch.stop_before_limit_seconds)
    log.quiet_imports()
    import torch

    if not torch.cuda.is_available():  # DeepSpeed guesses at its import, and warns
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from mmtrain.run import train
    from mmtrain.train.watch import Watch, budgets_of

    watch = Watch(Path(recipe.output) / recipe.name, place, budgets_of(recipe), listener)
    with contextlib.closing(watch), watch.reporting():
        return train(recipe, watch)


def _check(arguments: Arguments) -> int:
    if arguments.recipe.is_dir():
        from mmtrain.checkpoint.audit import audit

        if arguments.overrides or arguments.world is not None:
            arguments.parser.error("KEY=VALUE and --world go with a recipe, not with a run folder")
        audit(arguments.recipe)
        return ExitCode.DONE
    from mmtrain.facts import describe
    from mmtrain.recipe import examine

    seen = examine(arguments.recipe, arguments.overrides, arguments.world)
    if seen.recipe is not None and not seen.faults:
        print(f"{arguments.recipe}\n\n{describe(seen.recipe)}\n")
    if seen.faults or seen.missing:
        raise RecipeError([*seen.faults, *seen.missing])
    print("OK")
    return ExitCode.DONE


def _plan(arguments: Arguments) -> int:
    from mmtrain.facts import plan
    from mmtrain.recipe import read

    recipe = read(arguments.recipe, arguments.overrides, arguments.world)
    print(plan(recipe, arguments.world))
    return ExitCode.DONE


def _data_shapes(arguments: Arguments) -> int:
    from mmtrain.data.shapes import write_shapes

    report = write_shapes(arguments.out, arguments.documents, arguments.seed)
    for source, count in report.documents.items():
        print(f"{count:8,} documents  {report.out / source}")
    print(f"{report.images:8,} images     tokenizer in {report.tokenizer}")
    return ExitCode.DONE


def _data_index(arguments: Arguments) -> int:
    from mmtrain.data.shards import build_index

    report = build_index(arguments.shards, arguments.tokenizer)
    print(
        f"{report.documents:,} documents, {report.text_tokens:,} text tokens, "
        f"{report.images:,} images: {report.folder}"
    )
    return ExitCode.DONE


def _data_chat(arguments: Arguments) -> int:
    from mmtrain.data.chat_ingest import ChatOptions, write_chat

    options = ChatOptions(
        format=arguments.format,
        media=arguments.images,
        system=arguments.system,
        tokenizer=arguments.tokenizer,
        max_failures=arguments.max_failures,
    )
    print(write_chat(arguments.source, arguments.out, options).described(arguments.out))
    return ExitCode.DONE


def _data_look(arguments: Arguments) -> int:
    from mmtrain.recipe import load
    from mmtrain.run import look

    return look(load(arguments.recipe, arguments.overrides), arguments.packs, arguments.out)


def _sample(arguments: Arguments) -> int:
    from mmtrain.generation.artist import Style
    from mmtrain.generation.prompts import parse, parse_chat, read_prompts
    from mmtrain.generation.sample import Options, sample

    given = vars(arguments)
    style = Style(**{name: given[name] for name in ("scheduler", "steps", "guidance", "seed")})
    names = ("method", "top_p", "temperature", "beams", "new_tokens", "images", "samples")
    options = Options(style=style, **{name: given[name] for name in names})
    prompts = arguments.prompt + (read_prompts(arguments.prompts) if arguments.prompts else [])
    return sample(
        arguments.run,
        parse(prompts) + parse_chat(arguments.chat, arguments.system),
        options,
        checkpoint=arguments.checkpoint,
        decoder=arguments.decoder,
        out=arguments.out,
    )


def _evaluate(arguments: Arguments) -> int:
    from mmtrain.evaluate.session import assign, evaluate, watch

    assignment = assign(
        arguments.run,
        overrides=arguments.overrides,
        only=arguments.task,
        documents=arguments.documents,
        decoder=arguments.decoder,
    )
    return watch(assignment) if arguments.watch else evaluate(assignment, arguments.checkpoint)


def _convert(arguments: Arguments) -> int:
    from mmtrain.convert.release import Adapters
    from mmtrain.export import export_release, export_tensors

    run, checkpoint, out = arguments.run, arguments.checkpoint, arguments.out
    if arguments.form is None:
        if arguments.merge_lora:
            arguments.parser.error("--merge-lora goes with --as llama or --as emu")
        return export_tensors(run, checkpoint, out)
    adapters = Adapters.merge if arguments.merge_lora else Adapters.keep
    return export_release(run, checkpoint, out, arguments.form, adapters)


def _slurm(arguments: Arguments) -> int:
    from mmtrain.slurm.job import Job, script, submit

    given = vars(arguments)
    job = Job(**{field.name: given[field.name] for field in fields(Job)})
    text = script(job, arguments.recipe, arguments.overrides)
    print(text if arguments.print else submit(text), end="" if arguments.print else "\n")
    return ExitCode.DONE


def _takes_recipe(
    parser: argparse.ArgumentParser, name: str = "RECIPE", what: str = "the YAML of the run"
) -> None:
    parser.add_argument("recipe", type=Path, metavar=name, help=what)
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="override of a dotted key of the recipe"
    )


def _takes_check(parser: argparse.ArgumentParser) -> None:
    _takes_recipe(parser, "RECIPE|RUN", "the YAML of a run, or the folder of one")
    parser.add_argument(
        "--world", type=_positive, metavar="N", help="number of ranks the layout must fit"
    )


def _takes_plan(parser: argparse.ArgumentParser) -> None:
    _takes_recipe(parser)
    parser.add_argument(
        "--world", type=_positive, metavar="N", required=True, help="number of ranks"
    )


def _takes_shapes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make; must not exist")
    parser.add_argument(
        "--documents", type=_positive, default=4000, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="of everything; default: %(default)s"
    )


def _takes_index(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="a folder of MDS shards")
    parser.add_argument(
        "--tokenizer", type=Path, required=True, metavar="DIR", help="a Hugging Face folder"
    )


def _takes_chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", type=Path, metavar="SRC", help="a JSON array of records, or one object a line"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make; must not exist")
    parser.add_argument(
        "--format",
        choices=("llava", "sharegpt", "alpaca", "videochat", "video-chatgpt", "messages"),
        help="found out from the first records if left out",
    )
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="folder that names of pictures and clips are relative to; that of SRC if left out",
    )
    parser.add_argument(
        "--system",
        default="auto",
        metavar="MESSAGE",
        help="system message: image, video, none, a text FILE, or auto: image for one picture, "
        "video for a clip, else none; a record's own takes its place; default: %(default)s",
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="count lengths too, as mmtrain data index"
    )
    parser.add_argument(
        "--max-failures",
        type=_part,
        default=0.05,
        metavar="SHARE",
        help="share of broken records beyond which nothing is written; default: %(default)s",
    )


def _takes_look(parser: argparse.ArgumentParser) -> None:
    _takes_recipe(parser)
    parser.add_argument(
        "--packs", type=_positive, default=4, metavar="N", help="default: %(default)s"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the PNGs")


def _takes_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder, as in runs/demo")
    parser.add_argument(
        "--checkpoint",
        metavar="NAME",
        help="as in step-00000100; the newest complete one if left out",
    )


def _takes_sample(parser: argparse.ArgumentParser) -> None:
    _takes_run(parser)
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
        help="images that a text may begin by itself, where the model was trained with "
        "data.learn_image_begin; default: %(default)s",
    )
    _takes_decoder(parser)
    parser.add_argument(
        "--samples",
        type=_positive,
        default=1,
        metavar="N",
        help="pictures of each image that a decoder draws; default: %(default)s",
    )
    parser.add_argument("--seed", type=_count, default=0, metavar="S", help="default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="DIR", help="RUN/samples if left out")


def _takes_decoder(parser: argparse.ArgumentParser) -> None:
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
        choices=("pndm", "ddim", "dpm"),
        help="pndm is the released one; the decoder recipe's if left out",
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


def _takes_evaluate(parser: argparse.ArgumentParser) -> None:
    _takes_run(parser)
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


def _takes_convert(parser: argparse.ArgumentParser) -> None:
    _takes_run(parser)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="PATH", help="folder to make (emu: file)"
    )
    parser.add_argument(
        "--as",
        dest="form",
        choices=("llama", "emu", "emu-instruct", "eva", "peft", "unet"),
        help="another release's form; full tensors by canonical name if left out",
    )
    parser.add_argument(
        "--merge-lora", action="store_true", help="fold adapters into the weights (llama, emu)"
    )


def _takes_slurm(parser: argparse.ArgumentParser) -> None:
    _takes_recipe(parser)
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


COMMANDS = (
    Command("train", "train a recipe", _takes_recipe, _train, _TRAIN_EPILOG),
    Command("check", "all faults of a recipe, or its facts; or of a run", _takes_check, _check),
    Command("slurm", "submit a recipe to Slurm, or print its script", _takes_slurm, _slurm),
    Command("plan", "stages, memory and batch on N ranks", _takes_plan, _plan),
    Command("data shapes", "write demo data: coloured shapes", _takes_shapes, _data_shapes),
    Command("data index", "count tokens and images of shards", _takes_index, _data_index),
    Command("data chat", "write conversations as shards", _takes_chat, _data_chat),
    Command("data look", "draw packs of a recipe as pictures", _takes_look, _data_look),
    Command("sample", "write text and images with a run", _takes_sample, _sample),
    Command("evaluate", "ask a run the tasks of its recipe", _takes_evaluate, _evaluate),
    Command("convert", "export weights: full tensors, or another form", _takes_convert, _convert),
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmtrain",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    # the deepspeed launcher puts it before the command; the rank is read from the environment
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    groups = {"": parser.add_subparsers(title="commands", metavar="COMMAND", required=True)}
    for command in COMMANDS:
        group, _, word = command.name.rpartition(" ")
        if group not in groups:
            inner = groups[""].add_parser(group, help=_group_summary(group))
            groups[group] = inner.add_subparsers(title="commands", metavar="COMMAND", required=True)
        made = groups[group].add_parser(
            word,
            help=command.summary,
            description=command.summary.capitalize() + ".",
            epilog=command.epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.declare(made)
        made.set_defaults(handle=command.handle, parser=made)
    return parser


def _group_summary(group: str) -> str:
    words = [c.name.split()[1] for c in COMMANDS if c.name.startswith(group + " ")]
    return f"{group} sets: " + ", ".join(words)


def _parse(argv: Sequence[str] | None) -> Arguments:
    """Arguments of a command; overrides may stand before or after the options."""
    arguments, rest = _parser().parse_known_args(argv)
    overrides = getattr(arguments, "overrides", None)
    if rest and (overrides is None or any(word.startswith("-") for word in rest)):
        arguments.parser.error(f"unknown argument(s): {' '.join(rest)}")
    if overrides is not None:
        overrides.extend(rest)
    return arguments


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


def _faults(error: RecipeError) -> str:
    count = len(error.problems)
    heading = f"mmtrain: {count} fault{'s' if count > 1 else ''}; nothing was written"
    return "\n".join([heading, *(f"  {problem}" for problem in error.problems)])

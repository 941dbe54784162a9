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
from mmtrain import arguments as takes
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
  mmtrain data ingest webdataset laion captions      other people's formats as shards
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


_INGEST = """\
`mmtrain data ingest KIND --help` lists the options of a kind. Broken records are left
out and counted by reason. Killed, the same command goes on behind the last finished
shard, and the folder comes out the same; OUT/manifest.json says what is in it.
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
    os.umask(os.umask(0o077) | 0o002)  # what a run writes is never writable for everybody
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
    if seen.recipe is not None:
        from mmtrain import supply

        print(f"{supply.describe(seen.recipe)}\n")
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
    for reason, count in report.left_out.items():
        print(f"{count:,} documents left out: {reason}")
    return ExitCode.DONE


def _data_ingest(arguments: Arguments) -> int:
    from mmtrain.data.ingest.kind import IngestOptions
    from mmtrain.data.ingest.run import Work, ingest

    given = vars(arguments)
    shard_bytes = int(arguments.shard_mb * (1 << 20))
    names = [field.name for field in fields(IngestOptions) if field.name in given]
    options = IngestOptions(shard_bytes=shard_bytes, **{name: given[name] for name in names})
    work = Work(
        workers=arguments.workers or os.cpu_count() or 1,
        max_failures=arguments.max_failures,
        tokenizer=arguments.tokenizer,
    )
    try:
        print(ingest(arguments.kind, arguments.source, arguments.out, options, work))
    except KeyboardInterrupt:
        print("mmtrain: stopped; the same command goes on", file=sys.stderr)
        return ExitCode.STOPPED
    return ExitCode.DONE


def _data_look(arguments: Arguments) -> int:
    given = vars(arguments)
    out, board = arguments.out, arguments.tensorboard
    if arguments.recipe.is_dir():
        from mmtrain.data.look import View, look_at_shards

        if arguments.overrides:
            arguments.parser.error("KEY=VALUE goes with a recipe, not with a folder of shards")
        if arguments.tokenizer is None:
            arguments.parser.error("a folder of shards needs --tokenizer DIR")
        view = View(**{field.name: given[field.name] for field in fields(View)})
        return look_at_shards(arguments.recipe, view, out, board)
    from mmtrain.look import look
    from mmtrain.recipe import load

    return look(load(arguments.recipe, arguments.overrides), arguments.packs, out, board)


def _sample(arguments: Arguments) -> int:
    from mmtrain.generation.prompts import parse, parse_chat, read_prompts
    from mmtrain.generation.sample import Options, sample
    from mmtrain.trained import Style

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


COMMANDS = (
    Command("train", "train a recipe", takes.recipe, _train, _TRAIN_EPILOG),
    Command("check", "all faults of a recipe, or its facts; or of a run", takes.check, _check),
    Command("slurm", "submit a recipe to Slurm, or print its script", takes.slurm, _slurm),
    Command("plan", "stages, memory and batch on N ranks", takes.plan, _plan),
    Command("data shapes", "write demo data: coloured shapes", takes.shapes, _data_shapes),
    Command("data index", "count tokens and images of shards", takes.index, _data_index),
    Command("data ingest", "other people's formats as shards", takes.ingest, _data_ingest, _INGEST),
    Command("data look", "draw packs of a recipe, or documents", takes.look, _data_look),
    Command("sample", "write text and images with a run", takes.sample, _sample),
    Command("evaluate", "ask a run the tasks of its recipe", takes.evaluate, _evaluate),
    Command("convert", "export weights: full tensors, or another form", takes.convert, _convert),
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


def _faults(error: RecipeError) -> str:
    count = len(error.problems)
    heading = f"mmtrain: {count} fault{'s' if count > 1 else ''}; nothing was written"
    return "\n".join([heading, *(f"  {problem}" for problem in error.problems)])

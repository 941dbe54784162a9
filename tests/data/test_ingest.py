"""The frame of every ingest: the same folder for any workers and kills, and nothing half-done."""

import errno
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from foreign import (
    SMALL,
    counts,
    documents,
    files,
    ingest,
    journal,
    manifest,
    partial_of,
    stopped,
    write_tar,
)
from made import png

from mmtrain.cli import main
from mmtrain.data.ingest import journal as journal_module
from mmtrain.data.ingest import progress, workers
from mmtrain.data.ingest.journal import Partial
from mmtrain.data.ingest.report import Counts
from mmtrain.data.ingest.webdataset import WebDataset
from mmtrain.data.shards import load_lengths, open_shards
from mmtrain.data.vocabulary import load_vocabulary
from mmtrain.errors import ExitCode


def laion(folder: Path, tars: int = 2, pairs: int = 40) -> Path:
    """Tars of pictures and captions; every tenth caption is empty."""
    for tar in range(tars):
        members: dict[str, bytes] = {}
        for number in range(pairs):
            colour = (5 * number, 90 * tar, 200)
            words = "" if number % 10 == 9 else f"a wall, number {number} of tar {tar}"
            members[f"{number:05d}.jpg"] = png(colour)
            members[f"{number:05d}.txt"] = words.encode()
        write_tar(folder / f"{tar:05d}.tar", members)
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return laion(tmp_path / "laion")


# --- the same folder -----------------------------------------------------------------------


def test_the_folder_does_not_depend_on_the_number_of_workers(source: Path, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        options = (*SMALL, "--workers", number, "--max-failures", "0.2")
        assert ingest("webdataset", source, tmp_path / f"by{number}", *options) == 0
    one = files(tmp_path / "by1")
    assert one == files(tmp_path / "by2") == files(tmp_path / "by3")
    assert len([name for name in one if name.endswith(".mds")]) > 3
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_an_ingest_killed_anywhere_goes_on_to_the_same_folder(
    source: Path, tmp_path: Path, shapes: Path
) -> None:
    """SIGKILL after the first, a middle and nearly the last shard; other numbers of workers."""
    tokenizer = shapes / "tokenizer"
    options = (*SMALL, "--max-failures", "0.2", "--tokenizer", tokenizer)
    assert ingest("webdataset", source, tmp_path / "whole", *options) == 0
    whole, out = files(tmp_path / "whole"), tmp_path / "killed"
    for shards, number in ((1, 2), (3, 1)):
        killed(source, out, shards, *options, "--workers", number)
        assert not out.exists() and len(journal(out)) > shards
    before = {path: path.stat().st_mtime_ns for path in partial_of(out).glob("shards/*.mds")}
    assert ingest("webdataset", source, out, *options, "--workers", 3) == 0
    assert files(out) == whole and not partial_of(out).exists()
    kept = [out / path.name for path in before if (out / path.name).exists()]
    unchanged = [p for p in kept if p.stat().st_mtime_ns in before.values()]
    assert len(unchanged) >= 3  # what was finished is not made again


@pytest.mark.slow
def test_killed_at_random_moments_nothing_is_locked_lost_or_doubled(tmp_path: Path) -> None:
    draw, out = random.Random(0), tmp_path / "out"
    source = laion(tmp_path / "laion", 3, 120)
    options = (*SMALL, "--max-failures", "0.2")
    assert ingest("webdataset", source, tmp_path / "whole", *options) == 0
    kills = 0
    while not out.exists():
        every = (*options, "--workers", draw.randrange(1, 4))
        process = multiprocessing.get_context("fork").Process(
            target=slowly, args=(source, out, every), daemon=False
        )
        process.start()
        process.join(draw.uniform(0.05, 0.8))
        kills += process.is_alive()
        process.kill()
        process.join()
    assert kills >= 10 and files(out) == files(tmp_path / "whole")
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def killed(source: Path, out: Path, shards: int, *options: object) -> None:
    """Start the command in a process of its own; kill it when so many more shards are finished."""
    wanted = max(len(journal(out)), 1) + shards
    process = multiprocessing.get_context("fork").Process(
        target=slowly, args=(source, out, options), daemon=False
    )
    process.start()
    patience = time.monotonic() + 60
    while len(journal(out)) < wanted and process.is_alive() and time.monotonic() < patience:
        time.sleep(0.005)
    assert process.is_alive(), process.exitcode
    process.kill()
    process.join()


def slowly(source: Path, out: Path, options: tuple[object, ...]) -> None:
    """The command, with a moment's wait after each document, so that a kill finds it at work."""
    write = Partial.write

    def waiting(self: Partial, *arguments: Any) -> None:
        write(self, *arguments)
        time.sleep(0.02)

    Partial.write = waiting  # type: ignore[method-assign]
    ingest("webdataset", source, out, *options)


@pytest.fixture
def half_done(source: Path, tmp_path: Path) -> Path:
    """A half-done ingest with a few finished shards."""
    out = tmp_path / "out"
    for shards in range(2, 5):
        stopped(source, out, shards)
    assert len(journal(out)) > 3
    return out


def test_torn_lines_and_lost_shards_are_made_again(
    half_done: Path, source: Path, tmp_path: Path
) -> None:
    options = (*SMALL, "--max-failures", "0.2")
    assert ingest("webdataset", source, tmp_path / "whole", *options) == 0
    partial = partial_of(half_done)
    last = journal(half_done)[-1]["shard"]["raw_data"]["basename"]
    (partial / "shards" / last).write_bytes(b"cut")
    with (partial / "journal.jsonl").open("a") as file:
        file.write('{"shard": {"raw')
    (partial / "shards/index.json").write_text("left by a kill")
    (partial / "arriving/shard.00009.mds").write_text("left by a kill")
    assert ingest("webdataset", source, half_done, *options) == 0
    assert files(half_done) == files(tmp_path / "whole")


def sources(folder: Path) -> dict[str, tuple[Path, list[object]]]:
    """A source of a dozen records of each kind that needs no extra, and its options."""
    pictures = folder / "pictures"
    pictures.mkdir()
    for number in range(12):
        (pictures / f"{number}.png").write_bytes(png((20 * number, 0, 0)))
        video = folder / f"boards/{number:02d}"
        video.mkdir(parents=True)
        (video / "0.png").write_bytes(png((0, 20 * number, 0)))
        (video / "0.txt").write_text(f"board {number}")
    (folder / "boards/05/0.png").write_bytes(b"cut")
    names = [f"{number}.png" if number % 5 else "lost.png" for number in range(12)]
    said = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A wall."}]
    lines = {
        "text": [{"text": f"line {number}" if number % 5 else ""} for number in range(12)],
        "chat": [{"image": name, "conversations": said} for name in names],
        "mmc4": [
            {
                "text_list": ["a"],
                "image_info": [{"image_name": name}],
                "similarity_matrix": [[0.5 if number % 4 else 0.1]],
            }
            for number, name in enumerate(names)
        ],
    }
    found: dict[str, tuple[Path, list[object]]] = {"storyboard": (folder / "boards", [])}
    for kind, records in lines.items():
        (folder / kind).mkdir()
        for name, some in (("a", records[:7]), ("b", records[7:])):
            (folder / kind / f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)))
        options = [] if kind == "text" else ["--images", pictures]
        found[kind] = (folder / kind, options)
    return found


@pytest.mark.parametrize("kind", ["storyboard", "text", "chat", "mmc4"])
def test_every_kind_goes_on_at_every_record(tmp_path: Path, kind: str) -> None:
    """Stopped after every single document, each time gone on with, as if never stopped."""
    source, options = sources(tmp_path)[kind]
    every = ("--shard-mb", "0.0001", "--max-failures", "0.5", *options)
    assert ingest(kind, source, tmp_path / "whole", *every) == 0
    whole = files(tmp_path / "whole")
    kept = counts(tmp_path / "whole")["documents"]
    assert 6 < kept < 12 and len([name for name in whole if name.endswith(".mds")]) == kept
    out = tmp_path / "out"
    for shards in range(1, kept):
        stopped(source, out, shards, kind, every)
        assert len(journal(out)) == shards + 1
    assert ingest(kind, source, out, *every) == 0
    assert files(out) == whole


def test_interrupted_by_the_user_it_says_how_to_go_on(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(self: Any, *arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Partial, "finish", interrupted)
    options = (*SMALL, "--max-failures", "0.2")
    assert ingest("webdataset", source, tmp_path / "out", *options) == ExitCode.STOPPED
    assert "the same command goes on" in capsys.readouterr().err
    monkeypatch.undo()
    assert ingest("webdataset", source, tmp_path / "out", *options) == 0


def test_a_disk_that_is_full_loses_no_finished_shard(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, options = tmp_path / "out", (*SMALL, "--max-failures", "0.2")
    with monkeypatch.context() as patch:
        sync, seen = journal_module.sync, []

        def full(path: Path) -> None:
            seen.append(path)
            if len(seen) > 12:
                raise OSError(errno.ENOSPC, "No space left on device")
            sync(path)

        patch.setattr(journal_module, "sync", full)
        assert ingest("webdataset", source, out, *options) == ExitCode.STORAGE
    done = len(journal(out))
    assert done > 3 and not out.exists()
    assert ingest("webdataset", source, out, *options) == 0
    assert ingest("webdataset", source, tmp_path / "whole", *options) == 0
    assert files(out) == files(tmp_path / "whole")


# --- refusals ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, said",
    [
        (["--max-side", "16"], "--max-side: 16 now, null when"),
        (["--reencode", "png"], '--reencode: "png" now, null when'),
        (["--text", "caption"], '--text: "caption" now, null when'),
        (["--shard-mb", "1"], "--shard-bytes: 1048576 now, 2621 when"),
    ],
)
def test_a_changed_option_is_refused_by_its_name(
    half_done: Path,
    source: Path,
    options: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = files(partial_of(half_done))
    assert ingest("webdataset", source, half_done, *SMALL, *options) == ExitCode.RECIPE
    error = capsys.readouterr().err
    assert said in error and "1 fault; nothing was written" in error
    assert "remove that folder to begin anew" in error and not half_done.exists()
    assert files(partial_of(half_done)) == before


def test_a_changed_source_is_refused_by_the_names_of_its_files(
    half_done: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.utime(source / "00000.tar", (1, 1))
    (source / "00001.tar").rename(source / "00002.tar")
    assert ingest("webdataset", source, half_done, *SMALL) == ExitCode.RECIPE
    error = capsys.readouterr().err
    assert "modified 00000:" in error and "files 00001: not there now" in error
    assert "files 00002:" in error
    laion(source)
    assert ingest("text", source, half_done, *SMALL) == ExitCode.MISSING  # of another kind
    assert ingest("webdataset", source / "00001.tar", half_done, *SMALL) == ExitCode.RECIPE
    assert "source:" in capsys.readouterr().err


def test_what_does_not_change_the_shards_may_change(half_done: Path, source: Path) -> None:
    options = (*SMALL, "--max-failures", "0.5", "--workers", 2)
    assert ingest("webdataset", source, half_done, *options) == 0


def test_too_many_failures_publish_nothing_and_are_judged_anew_when_allowed(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert ingest("webdataset", source, out) == ExitCode.CONTENT  # in one shard: nothing is kept
    error = capsys.readouterr().err
    assert "8 of 80 records are broken as webdataset (8 no text)" in error
    assert "repair them, or raise --max-failures" in error
    assert not out.exists() and not partial_of(out).exists()
    assert ingest("webdataset", source, out, *SMALL) == ExitCode.CONTENT
    assert "with a higher --max-failures, it goes on" in capsys.readouterr().err
    assert len(journal(out)) > 3 and not out.exists()
    assert ingest("webdataset", source, out, *SMALL, "--max-failures", "0.1") == 0
    assert counts(out)["records"] == 80 and len(documents(out)) == 72


def test_a_second_process_is_told_and_the_folder_is_left_alone(
    half_done: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(partial_of(half_done))
    command = (
        "import fcntl, sys\n"
        "lock = open(sys.argv[1], 'a')\n"
        "fcntl.lockf(lock, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", command, partial_of(half_done) / "lock"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    assert ingest("webdataset", source, half_done, *SMALL) == ExitCode.PEER
    assert "another process ingests into it" in capsys.readouterr().err
    holder.communicate()
    assert files(partial_of(half_done)) == before


def test_an_output_that_exists_is_never_touched(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert ingest("webdataset", source, out) == ExitCode.CONTENT
    assert list(out.iterdir()) == [] and not partial_of(out).exists()


@pytest.mark.parametrize(
    "words",
    [
        ["data", "ingest"],
        ["data", "ingest", "laion", "a", "b"],
        ["data", "ingest", "text", "a", "b", "--clip-threshold", "0.3"],  # of another kind
        ["data", "ingest", "text", "a", "b", "--workers", "0"],
        ["data", "ingest", "text", "a", "b", "--reencode", "gif"],
        ["data", "ingest", "text", "a", "b", "--max-failures", "2"],
        ["data", "chat", "a", "b"],
    ],
)
def test_wrong_words_are_a_wrong_command(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == ExitCode.RECIPE


# --- workers -------------------------------------------------------------------------------


def test_results_come_in_order_and_no_more_than_a_few_groups_are_read_ahead() -> None:
    read = []

    def items() -> Any:
        for number in range(400):
            read.append(number)
            yield number

    found = []
    for result in workers.ordered_map(lambda number: (number * number, os.getpid()), items(), 2):
        found.append(result)
        assert len(read) - len(found) <= 16 * (3 * 2 + 1)
    assert [square for square, _ in found] == [number**2 for number in range(400)]
    assert os.getpid() not in {pid for _, pid in found}


def test_a_killed_worker_ends_the_ingest_and_the_command_goes_on(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],  # capsys has no file for the stacks of workers
) -> None:
    document = WebDataset.document

    def deadly(self: Any, file: Any, raw: Any) -> Any:
        if raw.number == 35 and file.name == "00001":
            os.kill(os.getpid(), signal.SIGKILL)
        return document(self, file, raw)

    options = (*SMALL, "--max-failures", "0.2", "--workers", 2)
    with monkeypatch.context() as patch:
        patch.setattr(WebDataset, "document", deadly)
        assert ingest("webdataset", source, tmp_path / "out", *options) == ExitCode.PEER
    assert "a worker process was killed" in capfd.readouterr().err
    assert ingest("webdataset", source, tmp_path / "out", *options) == 0


# --- the manifest --------------------------------------------------------------------------


def test_the_manifest_tells_what_is_in_the_folder_and_how_it_came(
    source: Path, tmp_path: Path, shapes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = shapes / "tokenizer"
    options = (*SMALL, "--max-failures", "0.2", "--tokenizer", tokenizer)
    assert ingest("webdataset", source, tmp_path / "out", *options) == 0
    told, stored = manifest(tmp_path / "out"), documents(tmp_path / "out")
    found = told["counts"]
    assert (found["records"], found["documents"], found["images"]) == (80, 72, 72)
    assert found["dropped"] == {"no_text": 8} and found["histograms"]["images"] == {"1": 72}
    texts = [part.text for document in stored for part in document.parts if part.text]
    assert found["characters"] == sum(map(len, texts))
    assert found["media_bytes"] == sum(len(document.parts[0].media[0]) for document in stored)
    lengths = load_lengths(open_shards(tmp_path / "out"), load_vocabulary(tokenizer))
    tokens = [sum(p.size for p in lengths.document(n).parts[1:]) for n in range(72)]
    assert told["text"]["tokens"] == sum(tokens)
    bins = dict.fromkeys((8, 16, 32), 0)
    for size in tokens:
        bins[max(low for low in bins if low <= size)] += 1
    assert told["text"]["histogram"] == {str(low): n for low, n in bins.items() if n}
    assert told["recipe"]["options"] == {
        "max_side": None,
        "reencode": None,
        "shard_bytes": 2621,
        "text": None,
    }
    names = [(entry["name"], entry["bytes"]) for entry in told["recipe"]["files"]]
    assert names == [(p.stem, p.stat().st_size) for p in sorted(source.iterdir())]
    report = capsys.readouterr().out
    assert "72 documents of 80 records read as webdataset" in report
    assert "8 records left out: 8 no text" in report and f"{sum(tokens):,} tokens" in report


def test_a_source_is_a_file_a_folder_or_a_glob(source: Path, tmp_path: Path) -> None:
    for number, (given, tars) in enumerate(
        [(source, 2), (source / "00001.tar", 1), (source / "*.tar", 2), (source / "*1.tar", 1)]
    ):
        out = tmp_path / f"out{number}"
        assert ingest("webdataset", given, out, "--max-failures", "0.2") == 0
        assert len(documents(out)) == 36 * tars
    deep = laion(tmp_path / "deep/a", 1, 5) and laion(tmp_path / "deep/b", 1, 5).parent
    assert ingest("webdataset", deep, tmp_path / "both") == 0
    ids = [document.sample_id for document in documents(tmp_path / "both")]
    assert ids[0] == "a/00000-00000001" and ids[-1] == "b/00000-00000005"
    assert ingest("webdataset", tmp_path / "*.none", tmp_path / "no") == ExitCode.MISSING


# --- what was ingested is what is trained on -------------------------------------------------


def test_a_recipe_draws_what_was_ingested(
    source: Path,
    tmp_path: Path,
    repository: Path,
    shapes: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(shapes.parent)
    options = ("--tokenizer", shapes / "tokenizer", "--max-failures", "0.2", "--max-side", 28)
    assert ingest("webdataset", source, tmp_path / "pairs", *options) == 0
    kinds = sources(tmp_path)
    for kind in ("mmc4", "chat", "text", "storyboard"):
        given, own = kinds[kind]
        assert ingest(kind, given, tmp_path / f"of_{kind}", *own, *options[:2], *LOOSE) == 0
    names = {"pairs": "pair", "of_mmc4": "subsequence", "of_chat": "chat", "of_text": "text"}
    names["of_storyboard"] = "storyboard"
    own = [
        f"data.sources.{name}={{path: {tmp_path / name}, rule: {rule}, max_tokens: 64}}"
        for name, rule in names.items()
    ]
    gone = [
        f"data.sources.{name}=null" for name in ("captions", "pages", "clips", "boards", "text")
    ]
    tiny = str(repository / "configs/emu/tiny.yaml")
    command = ["data", "look", tiny, *own, *gone, "--packs", "2", "--out", str(tmp_path / "look")]
    assert main(command) == 0
    assert len(list((tmp_path / "look").glob("*.png"))) == 2


LOOSE = ("--max-failures", "0.5")


# --- how far it is -------------------------------------------------------------------------


def test_a_terminal_gets_a_bar_and_a_file_gets_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Counts(records=41, documents=40)
    with progress.Progress(found, bar=True) as bar:
        bar.passed(found)
    assert "42 records" in capsys.readouterr().err
    monkeypatch.setattr(progress, "_SECONDS", 0.0)
    said: list[str] = []
    monkeypatch.setattr(progress.log, "info", lambda form, *args: said.append(form % args))
    with progress.Progress(found, bar=False) as lines:
        lines.passed(found)
    assert said[0].startswith("41 records, 40 documents, 0 left out, ")
    assert capsys.readouterr().err == ""

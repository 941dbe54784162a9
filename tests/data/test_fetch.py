"""Files from elsewhere: whole and checked, or a fault within its time; a bound on what is kept."""

import json
import os
import pickle
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from made import document, png

from mmtrain.data import download
from mmtrain.data.assemble import Assembler
from mmtrain.data.cache import ShardCache
from mmtrain.data.document import Document
from mmtrain.data.fetch import INDEX, ExpectedFile, Folder
from mmtrain.data.lengths import collect
from mmtrain.data.loader import Loader, Workers
from mmtrain.data.mixture import Mixture, Source
from mmtrain.data.pack import Plan
from mmtrain.data.rules import Rule, RuleOptions
from mmtrain.data.shards import Shards, count, write_shards
from mmtrain.data.tokens import SequenceFormat
from mmtrain.data.vocabulary import Vocabulary
from mmtrain.errors import (
    ContentError,
    MissingError,
    MmtrainError,
    RecipeError,
    ServiceError,
    StorageError,
)

Answer = Callable[[BaseHTTPRequestHandler, bytes], None]
DOCUMENTS = [document(f"d{n}", f"page {n}", png((n, 2 * n, 200), 16)) for n in range(24)]


def whole(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)


def fails(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    handler.send_error(503)


def forbids(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    handler.send_error(403)


def hangs_up(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    handler.close_connection = True
    handler.connection.close()


def says_nothing(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    time.sleep(2)


def dribbles(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    handler.send_response(200)
    handler.end_headers()
    for byte in content[:40]:
        handler.wfile.write(bytes([byte]))
        handler.wfile.flush()
        time.sleep(0.05)


def truncates(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content[: len(content) // 2])


def lies(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    whole(handler, content[:-5] + b"other")


def never_ends(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(content)


def leads_astray(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    handler.send_response(302)
    handler.send_header("Location", "file:///etc/passwd")
    handler.end_headers()


class Service:
    """A web server of one folder on this machine, which answers shards as it is told."""

    def __init__(self, folder: Path) -> None:
        self.answers: list[Answer] = []  # to the next requests for shards; then `whole`
        self.asked: list[str] = []
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                service.asked.append(self.path)
                path = folder / self.path.lstrip("/")
                if not path.is_file():
                    self.send_error(404)
                    return
                answers = service.answers if path.suffix == ".mds" else []
                answer = answers.pop(0) if answers else whole
                try:
                    answer(self, path.read_bytes())
                except OSError:  # the other side has left
                    self.close_connection = True

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("far") / "pages"
    with write_shards(path, shard_bytes=1200) as writer:
        for item in DOCUMENTS:
            writer.write(item)
    assert len(list(path.glob("*.mds"))) >= 6
    return path


@pytest.fixture
def service(dataset: Path) -> Iterator[Service]:
    service = Service(dataset)
    yield service
    service.server.shutdown()
    service.server.server_close()


def quick(cache: Path, remote: str, bound: ShardCache | None = None) -> Folder:
    return Folder(local=cache, remote=remote, cache=bound, stall_seconds=0.4, pause_seconds=0.01)


def everything(shards: Shards) -> list[Document]:
    return [shards.document(number) for number in range(len(shards))]


def test_shards_come_over_http(tmp_path: Path, service: Service) -> None:
    shards = Shards(quick(tmp_path / "cache", service.address))
    assert everything(shards) == DOCUMENTS
    count = len(service.asked)
    assert everything(Shards(quick(tmp_path / "cache", service.address))) == DOCUMENTS
    assert len(service.asked) == count == len(set(service.asked))  # each file once


@pytest.mark.parametrize(
    "answer", [fails, hangs_up, says_nothing, dribbles, truncates, lies, never_ends, leads_astray]
)
def test_one_bad_answer_is_mended_by_another_attempt(
    tmp_path: Path, service: Service, answer: Answer
) -> None:
    service.answers = [answer]
    assert Shards(quick(tmp_path, service.address)).document(0) == DOCUMENTS[0]
    assert sum(name.endswith("00000.mds") for name in service.asked) == 2
    assert not list(tmp_path.glob(".*arriving*"))


@pytest.mark.parametrize(
    ("answer", "error", "said"),
    [
        (fails, ServiceError, "failed 3 times in .*503.*look after the service"),
        (hangs_up, ServiceError, "failed 3 times"),
        (says_nothing, ServiceError, r"failed 3 times in .*(timed out|stalled)"),
        (dribbles, ServiceError, r"stalled: \d+ bytes in 0.4 s"),
        (truncates, ServiceError, r"ended after \d+ of \d+ bytes"),
        (never_ends, ServiceError, r"sends more than \d+ bytes"),
        (lies, ContentError, "is damaged: found xxh3_128"),
        (forbids, MissingError, "is not there, or may not be read.*403"),
    ],
)
def test_a_bad_service_is_a_fault_in_time(
    tmp_path: Path, service: Service, answer: Answer, error: type[MmtrainError], said: str
) -> None:
    service.answers = [answer] * 9
    shards = Shards(quick(tmp_path, service.address))
    begun = time.monotonic()
    with pytest.raises(error, match=said):
        shards.document(0)
    assert time.monotonic() - begun < 5
    assert not [path for path in tmp_path.glob("shard*") if path.suffix == ".mds"]


def test_the_defaults_end_within_a_minute() -> None:
    folder = Folder(local=Path("x"), remote="s3://x")
    pauses = sum(folder.pause_seconds * 2**n * 1.5 for n in range(folder.attempts - 1))
    assert folder.attempts * (folder.stall_seconds + 0.5) + pauses < 60


def test_what_is_missing_is_not_asked_for_again(tmp_path: Path, service: Service) -> None:
    folder = quick(tmp_path, service.address)
    with pytest.raises(MissingError, match=r"nowhere\.mds is not there"):
        folder.ensure(ExpectedFile("nowhere.mds"))
    assert service.asked == ["/nowhere.mds"]


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match="refused"):
        Shards(quick(tmp_path, "http://127.0.0.1:9"))


def test_a_full_disk_is_told_at_once(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = Shards(quick(tmp_path, str(dataset)))

    def full(source: str, target: str, timeout: float) -> None:
        raise OSError(28, "No space left on device", target)

    monkeypatch.setattr(download.CloudDownloader, "download", lambda self, *a: full(*a))
    with pytest.raises(StorageError, match=r"No space left.*data\.cache_bytes"):
        shards.document(0)


def test_a_damaged_file_in_the_cache_is_never_used(tmp_path: Path, service: Service) -> None:
    Shards(quick(tmp_path, service.address)).document(0)
    cached = tmp_path / "shard.00000.mds"
    cached.write_bytes(cached.read_bytes()[:-1] + b"?")
    service.answers = [lies, whole]
    assert Shards(quick(tmp_path, service.address)).document(0) == DOCUMENTS[0]


def _opened(cache: Path, remote: str, outcome: Any) -> None:
    try:
        Shards(replace(quick(cache, remote), stall_seconds=1.0)).document(0)
    except MmtrainError as error:
        outcome.put((type(error).__name__, str(error)))
    else:
        outcome.put(("whole", ""))


@pytest.mark.parametrize(
    ("answer", "kind", "requests"), [(whole, "whole", 1), (says_nothing, "ServiceError", 3)]
)
def test_processes_that_wait_for_a_file_share_its_fate(
    tmp_path: Path, service: Service, answer: Answer, kind: str, requests: int
) -> None:
    service.answers = [answer] * 20
    Shards(quick(tmp_path, service.address))  # the index
    context = get_context("fork")
    outcome = context.SimpleQueue()
    begun = time.monotonic()
    processes = [
        context.Process(target=_opened, args=(tmp_path, service.address, outcome)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    results = [outcome.get() for _ in processes]
    for process in processes:
        process.join()
    assert [found for found, _ in results] == [kind] * 4
    assert time.monotonic() - begun < 9  # one after the other it would be four times 3 s
    assert sum(name.endswith("00000.mds") for name in service.asked) == requests


def shards_in(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.glob("*.mds")}


def test_a_bounded_cache_drops_what_was_read_longest_ago(tmp_path: Path, dataset: Path) -> None:
    sizes = shards_in(dataset)
    bound = ShardCache((tmp_path,), 3 * max(sizes.values()))
    shards = Shards(quick(tmp_path, str(dataset), bound))
    for number in [*range(24), *reversed(range(24))]:
        assert shards.document(number) == DOCUMENTS[number]
        assert sum(shards_in(tmp_path).values()) <= bound.limit_bytes
    assert "shard.00000.mds" in shards_in(tmp_path)
    assert sorted(shards_in(tmp_path)) == sorted(sizes)[: len(shards_in(tmp_path))]
    assert (tmp_path / INDEX).exists()


def test_what_others_put_into_the_folder_is_never_removed(tmp_path: Path, dataset: Path) -> None:
    mine = tmp_path / "thesis.mds"
    mine.write_bytes(b"x" * 5000)
    bound = ShardCache((tmp_path,), max(shards_in(dataset).values()))
    assert everything(Shards(quick(tmp_path, str(dataset), bound))) == DOCUMENTS
    assert mine.exists()


def test_a_shard_in_use_stays(
    tmp_path: Path, dataset: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bound = ShardCache((tmp_path / "a", tmp_path / "b"), max(shards_in(dataset).values()))
    reading = Shards(quick(tmp_path / "a", str(dataset), bound))
    assert reading.document(0) == DOCUMENTS[0]
    other = Shards(quick(tmp_path / "b", str(dataset), bound))
    assert other.document(0) == DOCUMENTS[0]
    assert list(shards_in(tmp_path / "a")) == ["shard.00000.mds"]  # held by `reading`
    assert "shards in use leave no room" in caplog.text
    del reading
    assert other.document(23) == DOCUMENTS[23]
    assert not shards_in(tmp_path / "a")


def test_a_bound_below_one_shard_is_a_fault_of_the_recipe(tmp_path: Path, dataset: Path) -> None:
    with pytest.raises(RecipeError, match=r"data\.cache_bytes: found 100, and .* a shard of \d+"):
        Shards(quick(tmp_path, str(dataset), ShardCache((tmp_path,), 100)))


def _read_at_random(cache: Path, remote: str, bound: ShardCache, seed: int, outcome: Any) -> None:
    shards, draw = Shards(quick(cache, remote, bound)), random.Random(seed)
    wrong = 0
    for _ in range(60):
        number = draw.randrange(24)
        wrong += shards.document(number) != DOCUMENTS[number]
    outcome.put(wrong)


def test_many_processes_share_a_bounded_cache(tmp_path: Path, dataset: Path) -> None:
    largest = max(shards_in(dataset).values())
    bound = ShardCache((tmp_path,), 3 * largest)
    context = get_context("fork")
    outcome = context.SimpleQueue()
    work = partial(_read_at_random, tmp_path, str(dataset), bound)
    processes = [context.Process(target=work, args=(seed, outcome)) for seed in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert [outcome.get() for _ in processes] == [0] * 4
    assert len(shards_in(tmp_path)) <= 3 + 2 * 4  # two open in each process at most
    assert not list(tmp_path.glob(".*arriving*"))


def test_open_shards_do_not_travel_to_other_processes(tmp_path: Path, dataset: Path) -> None:
    shards = Shards(quick(tmp_path, str(dataset)))
    shards.document(0)
    again = pickle.loads(pickle.dumps(shards))
    assert everything(again) == DOCUMENTS


def test_few_shards_are_open_at_a_time(tmp_path: Path) -> None:
    with write_shards(tmp_path / "many", shard_bytes=300) as writer:
        for item in DOCUMENTS:
            writer.write(item)
    shards = Shards(Folder(local=tmp_path / "many"))
    before = len(os.listdir("/proc/self/fd"))
    everything(shards)
    assert len(os.listdir("/proc/self/fd")) - before <= 16 < len(shards.shard_sizes)


def test_a_table_of_rows_that_lies_is_found(tmp_path: Path, dataset: Path) -> None:
    """Shards of others may have no hashes; what their tables say is held against the file."""
    for number, change in enumerate([b"\xff\xff\xff\xff", b"\0\0\0\0"]):
        path = tmp_path / str(number)
        path.mkdir()
        for file in dataset.iterdir():
            if file.is_file():
                (path / file.name).write_bytes(file.read_bytes())
        index = json.loads((path / INDEX).read_text())
        index["shards"][0]["raw_data"]["hashes"] = {}
        (path / INDEX).write_text(json.dumps(index))
        shard = path / "shard.00000.mds"
        content = shard.read_bytes()
        shard.write_bytes(content[:8] + change + content[12:])
        with pytest.raises(ContentError, match="its table of rows is none of"):
            Shards(Folder(local=path)).document(0)


@pytest.mark.slow
def test_a_service_that_hangs_ends_every_rank_within_a_minute(
    tmp_path: Path, shapes: Path, repository: Path
) -> None:
    """Two ranks with a worker each; the index comes, the shards never do."""
    service = Service(shapes / "captions")
    service.answers = [lambda handler, content: time.sleep(100)] * 99
    others = [f"data.sources.{n}.path={shapes / n}" for n in ("pages", "clips", "boards", "text")]
    captions = f"data.sources.captions.path={tmp_path}/cache"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [
            *launcher,
            *("-m", "mmtrain", "train", str(repository / "configs/emu/tiny.yaml")),
            *(f"data.tokenizer={shapes}/tokenizer", *others, captions, "data.workers=1"),
            *(f"data.sources.captions.remote={service.address}", "name=run"),
            *(f"output={tmp_path}", "train.steps=6"),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    service.server.shutdown()
    assert done.returncode
    verdict = json.loads((tmp_path / "run/verdict.json").read_text())
    assert verdict["exit_code"] == 75 and "failed 3 times in" in verdict["reason"]
    assert "Traceback (most recent call last):\n  File" not in verdict["reason"]
    ends = [line for line in done.stderr.splitlines() if line.startswith("mmtrain: rank")]
    assert len(ends) == 2, done.stderr[-3000:]
    log = (tmp_path / "run/log.txt").read_text().splitlines()
    begun = next(line[:8] for line in log if "step 1 begins" in line)
    started = sum(60**n * int(x) for n, x in enumerate(reversed(begun.split(":"))))
    ended = verdict["time"].partition("T")[2][:8]
    finished = sum(60**n * int(x) for n, x in enumerate(reversed(ended.split(":"))))
    assert (finished - started) % 86400 < 60


def test_a_fault_reaches_the_rank_from_its_worker_in_one_line(
    tmp_path: Path, service: Service, vocabulary: Vocabulary, layout: SequenceFormat
) -> None:
    service.answers = [fails] * 9
    lengths = [count(item, vocabulary) for item in DOCUMENTS]
    shards = Shards(quick(tmp_path, service.address))
    source = Source(
        name="pages",
        lengths=collect(lengths, fingerprint="f", dataset="d", shard_sizes=shards.shard_sizes),
        documents=shards,
        options=RuleOptions(rule=Rule.document, max_positions=64),
    )
    plan = Plan(
        Mixture([source], seed=0),
        group_length=layout.group_length,
        pack_tokens=64,
        pack_images=8,
        window_documents=24,
        seed=0,
    )
    loader = Loader(
        plan,
        Assembler(sources=[source], vocabulary=vocabulary, layout=layout, pack_tokens=64),
        global_batch_packs=1,
        micro_batch_packs=1,
        workers=Workers(count=1),
    )
    with pytest.raises(ServiceError, match=r"^http://[^\n]* failed 3 times in [^\n]*$"):
        loader.step(0)
    loader.close()

"""A dataset is written whole or not at all; no byte is used before it was checked."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streaming.base.format.mds.writer import MDSWriter

from mmtrain.data.document import COLUMNS, Document, Modality, Part, from_row, to_row
from mmtrain.data.fetch import ExpectedFile, Folder
from mmtrain.data.shards import build_index, load_lengths, open_shards, write_shards
from mmtrain.data.vocabulary import Vocabulary
from mmtrain.errors import ContentError, MissingError, StorageError


def page(number: int) -> Document:
    parts = (
        Part(modality=Modality.text, text=f"a red circle {'and a ring ' * (number % 3)}", time=0.5),
        Part(modality=Modality.image, media=(bytes([number % 256]) * 100,), match=0),
        Part(modality=Modality.video, media=(b"one", b"second", b"3"), time=1.0),
    )
    return Document(sample_id=f"page-{number}", kind="page", parts=parts, meta={"number": number})


def written(path: Path, count: int = 30) -> list[Document]:
    documents = [page(number) for number in range(count)]
    with write_shards(path, shard_bytes=4096) as writer:
        for document in documents:
            writer.write(document)
    return documents


def flip(path: Path, offset: int = -9) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1)
PARTS = st.one_of(
    st.builds(Part, modality=st.just(Modality.text), text=TEXT, time=st.floats(0, 9) | st.none()),
    st.builds(
        Part,
        modality=st.just(Modality.image),
        media=st.tuples(st.binary(min_size=1)),
    ),
    st.builds(
        Part,
        modality=st.just(Modality.video),
        media=st.lists(st.binary(min_size=1), min_size=1, max_size=3).map(tuple),
    ),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(PARTS, max_size=5), NAMES, st.dictionaries(st.text(), st.integers()))
def test_a_document_survives_its_row(parts: list[Part], name: str, meta: dict[str, int]) -> None:
    document = Document(sample_id=name, kind="page", parts=tuple(parts), meta=meta)
    assert from_row(to_row(document)) == document


def test_a_malformed_document_is_not_stored() -> None:
    bad = Document(
        sample_id="x",
        kind="page",
        parts=(
            Part(modality=Modality.image, media=(b"a", b"b")),
            Part(modality=Modality.text, text="t", match=0),
        ),
    )
    with pytest.raises(ContentError, match=r"'x': part 0 \(image\) holds 2 images.*matches part 0"):
        to_row(bad)


def test_documents_are_read_in_any_order_from_many_shards(tmp_path: Path) -> None:
    documents = written(tmp_path / "pages")
    shards = open_shards(tmp_path / "pages")
    assert len(shards.shard_sizes) > 2 and len(shards) == 30
    for number in (29, 0, 13, 13, 7):
        assert shards.document(number) == documents[number]
    with pytest.raises(ContentError, match="document 30 asked, 30 there"):
        shards.document(30)


def test_nothing_is_published_after_an_exception(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), write_shards(tmp_path / "pages") as writer:
        writer.write(page(0))
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_published_after_a_kill(tmp_path: Path) -> None:
    ready, done = os.pipe()
    child = os.fork()  # not a new interpreter: its imports would take most of the test
    if child == 0:
        with write_shards(tmp_path / "pages", shard_bytes=4096) as writer:
            for number in range(100):
                writer.write(page(number))
            os.write(done, b"x")
            time.sleep(60)
    os.read(ready, 1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not (tmp_path / "pages").exists()
    written(tmp_path / "pages")  # and a second attempt is not in its way
    assert len(open_shards(tmp_path / "pages")) == 30


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    written(tmp_path / "pages")
    before = (tmp_path / "pages" / "index.json").read_bytes()
    with pytest.raises(ContentError, match="exists and is never overwritten"):
        written(tmp_path / "pages")
    assert (tmp_path / "pages" / "index.json").read_bytes() == before


def test_an_empty_dataset_and_a_repeated_id_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ContentError, match="no document was written"):
        written(tmp_path / "pages", 0)
    with (
        pytest.raises(ContentError, match="'page-3' is written twice"),
        write_shards(tmp_path / "pages") as writer,
    ):
        writer.write(page(3))
        writer.write(page(3))


def test_a_folder_that_cannot_be_written_is_a_storage_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        written(tmp_path / "file" / "pages")


def test_a_flipped_bit_is_found_before_a_document_is_read(tmp_path: Path) -> None:
    written(tmp_path / "pages")
    flip(tmp_path / "pages" / "shard.00001.mds")
    shards = open_shards(tmp_path / "pages")
    shards.document(0)
    with pytest.raises(
        ContentError, match=r"shard\.00001\.mds is damaged: found xxh3_128 .* expect"
    ):
        shards.document(shards.shard_sizes[0])


def test_a_truncated_and_a_missing_shard_are_named(tmp_path: Path) -> None:
    written(tmp_path / "pages")
    shard = tmp_path / "pages" / "shard.00000.mds"
    size = shard.stat().st_size
    os.truncate(shard, size - 5)
    with pytest.raises(ContentError, match=f"found {size - 5} bytes, expected {size}"):
        open_shards(tmp_path / "pages").document(0)
    shard.unlink()
    with pytest.raises(MissingError, match=r"shard\.00000\.mds is not there"):
        open_shards(tmp_path / "pages").document(0)


def test_what_is_no_dataset_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"holds no index\.json"):
        open_shards(tmp_path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(ContentError, match="is no MDS index"):
        open_shards(tmp_path)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o755), (0o077, 0o700), (0, 0o775)])
def test_a_dataset_is_as_open_as_the_user_wants_and_never_to_all(
    tmp_path: Path, umask: int, mode: int
) -> None:
    before = os.umask(umask)
    try:
        written(tmp_path / "pages")
    finally:
        os.umask(before)
    assert (tmp_path / "pages").stat().st_mode & 0o777 == mode


def test_another_project_s_columns_are_refused(tmp_path: Path) -> None:
    with MDSWriter(columns={"text": "str"}, out=str(tmp_path / "other")) as writer:
        writer.write({"text": "a"})
    with pytest.raises(ContentError, match=r"holds columns \{'text': 'str'\}, wanted are"):
        open_shards(tmp_path / "other")


@pytest.mark.parametrize("name", ["../../x.mds", "/etc/passwd", "a/../../b", "", "..\\x"])
def test_a_forged_index_cannot_leave_its_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ContentError, match="forged"):
        Folder(local=tmp_path).path(name)
    written(tmp_path / "pages")
    index = tmp_path / "pages" / "index.json"
    content = json.loads(index.read_text())
    content["shards"][0]["raw_data"]["basename"] = name
    index.write_text(json.dumps(content))
    with pytest.raises(ContentError, match="forged"):
        open_shards(tmp_path / "pages")


def test_a_remote_dataset_is_fetched_shard_by_shard(tmp_path: Path) -> None:
    documents = written(tmp_path / "remote")
    shards = open_shards(tmp_path / "cache", str(tmp_path / "remote"))
    assert shards.document(3) == documents[3]
    fetched = sorted(p.name for p in (tmp_path / "cache").iterdir() if p.name[0] != ".")
    assert fetched == ["index.json", "shard.00000.mds"]
    assert [shards.document(number) for number in range(30)] == documents


def test_a_damaged_cache_is_fetched_again(tmp_path: Path) -> None:
    documents = written(tmp_path / "remote")
    open_shards(tmp_path / "cache", str(tmp_path / "remote")).document(0)
    flip(tmp_path / "cache" / "shard.00000.mds")
    again = open_shards(tmp_path / "cache", str(tmp_path / "remote"))
    assert again.document(0) == documents[0]


def test_a_damaged_or_missing_remote_shard_is_an_error_after_bounded_attempts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written(tmp_path / "remote")
    flip(tmp_path / "remote" / "shard.00000.mds")
    shards = open_shards(tmp_path / "cache", str(tmp_path / "remote"))
    with pytest.raises(ContentError, match=r"remote/shard\.00000\.mds is damaged"):
        shards.document(0)
    assert len(caplog.records) == 3 and not (tmp_path / "cache" / "shard.00000.mds").exists()
    (tmp_path / "remote" / "shard.00000.mds").unlink()
    with pytest.raises(MissingError, match="is not there"):
        shards.document(0)
    assert not list((tmp_path / "cache").glob("*.arriving*"))


def test_an_unknown_kind_of_remote_says_what_is_known(tmp_path: Path) -> None:
    folder = Folder(local=tmp_path, remote="gopher://x")
    with pytest.raises(MissingError, match="nothing here fetches gopher://; use s3://"):
        folder.ensure(ExpectedFile("index.json"))


@pytest.mark.parametrize("compression", ["zstd", "gz"])
def test_compressed_shards_are_unpacked_and_checked(tmp_path: Path, compression: str) -> None:
    columns, path = COLUMNS, tmp_path / "pages"
    with MDSWriter(
        columns=columns, out=str(path), compression=compression, hashes=["sha1"]
    ) as writer:
        for number in range(5):
            writer.write(to_row(page(number)))
    assert open_shards(path).document(4) == page(4)
    cache = open_shards(tmp_path / "cache", str(path))
    assert cache.document(4) == page(4)
    flip(next(path.glob("*.mds.*")), 40)
    for unpacked in path.glob("*.mds"):
        unpacked.unlink()
    with pytest.raises(ContentError, match="sha1"):
        open_shards(path).document(0)


def test_the_length_index_counts_what_the_documents_hold(
    tmp_path: Path, vocabulary: Vocabulary
) -> None:
    written(tmp_path / "pages")
    report = build_index(tmp_path / "pages", vocabulary)
    shards = open_shards(tmp_path / "pages")
    lengths = load_lengths(shards, vocabulary)
    tokens = 0
    for number in range(30):
        document, found = page(number), lengths.document(number)
        text, image, video = found.parts
        assert (found.sample_id, found.kind) == (document.sample_id, "page")
        assert text.size == len(vocabulary.encode(document.parts[0].text))
        assert (image.size, image.match, video.size) == (1, 0, 3)
        assert (text.time, image.time, video.time) == (0.5, None, 1.0)
        tokens += text.size
    assert (report.documents, report.text_tokens, report.images) == (30, tokens, 120)
    assert lengths.shard_sizes == shards.shard_sizes
    assert build_index(tmp_path / "pages", vocabulary) == report


def test_a_length_index_travels_with_remote_shards(tmp_path: Path, vocabulary: Vocabulary) -> None:
    written(tmp_path / "remote")
    build_index(tmp_path / "remote", vocabulary)
    shards = open_shards(tmp_path / "cache", str(tmp_path / "remote"))
    lengths = load_lengths(shards, vocabulary)
    assert lengths.document(7).sample_id == "page-7"
    flip(next((tmp_path / "cache").glob("lengths-*/sizes.npy")))
    assert load_lengths(shards, vocabulary).document(7) == lengths.document(7)


def test_a_missing_stale_or_damaged_length_index_says_what_to_run(
    tmp_path: Path, vocabulary: Vocabulary
) -> None:
    written(tmp_path / "pages")
    shards = open_shards(tmp_path / "pages")
    with pytest.raises(MissingError, match=r"run `mmtrain data index .*/pages --tokenizer"):
        load_lengths(shards, vocabulary)
    folder = build_index(tmp_path / "pages", vocabulary).folder
    sizes = folder / "sizes.npy"
    flip(sizes)
    with pytest.raises(ContentError, match=r"sizes\.npy is damaged.*mmtrain data index"):
        load_lengths(shards, vocabulary)
    build_index(tmp_path / "pages", vocabulary)  # repairs
    load_lengths(shards, vocabulary)
    written(tmp_path / "other", 31)
    shutil.copytree(folder, tmp_path / "other" / folder.name)
    with pytest.raises(ContentError, match=r"is stale: hash of index\.json"):
        load_lengths(open_shards(tmp_path / "other"), vocabulary)


def test_a_large_length_index_is_mapped_not_read(tmp_path: Path, vocabulary: Vocabulary) -> None:
    from made import lengths_source

    from mmtrain.data import lengths as index
    from mmtrain.data.fetch import Folder

    lengths = lengths_source("p", [(1, 1)] * 150_000).lengths
    index.save(lengths, tmp_path)
    loaded = index.load(Folder(local=tmp_path), fingerprint="f", dataset="d", advice="")
    assert isinstance(loaded.arrays["offsets"], np.memmap)
    assert loaded.document(149_999) == lengths.document(149_999)

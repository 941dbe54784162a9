"""Sources whose bytes were changed at random: what is lost is counted, what is kept can be read."""

import json
import random
from pathlib import Path

import pytest
from foreign import counts, documents, ingest, write_tar
from made import png
from test_fuzz import SHARES, mutated

from mmtrain.data import images

MUTATIONS = 200  # of each kind


def original(folder: Path, kind: str) -> Path:
    """Six records of a kind in one file."""
    if kind == "webdataset":
        members: dict[str, bytes] = {}
        for number in range(6):
            members[f"{number}.png"] = png(number)
            members[f"{number}.txt"] = f"caption {number}".encode()
            members[f"{number}.json"] = json.dumps({"url": f"http://host/{number}"}).encode()
        return write_tar(folder / "original.tar", members)
    path = folder / "original.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {n}: \u00e9"}) + "\n" for n in range(6)))
    return path


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("kind", ["webdataset", "text"])
def test_a_mutated_source_is_read_or_counted_as_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, share: int
) -> None:
    whole = original(tmp_path, kind)
    content, published = whole.read_bytes(), 0
    for number in range(0, MUTATIONS, share):
        source = tmp_path / f"{number}{whole.suffix}"
        source.write_bytes(mutated(content, random.Random(number)))
        out = tmp_path / f"out-{number}"
        code = ingest(kind, source, out, "--max-failures", "1.0")
        said = capsys.readouterr().err
        assert "Traceback" not in said and code in (0, 65), (number, code, said)
        if code:
            assert str(source) in said and not out.exists()
            continue
        published += 1
        found, kept = counts(out), documents(out)
        assert found["documents"] == len(kept)
        assert found["records"] == len(kept) + sum(found["dropped"].values()), (number, found)
        for document in kept:
            for part in document.parts:
                for blob in part.media:
                    images.check(blob)
    assert published > MUTATIONS / share / 2

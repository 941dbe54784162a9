"""Conversations through the front door: from a JSON to shards, to pretraining, to adapters."""

import json
from pathlib import Path

from world import REPOSITORY, World

from mmtrain.data.shards import open_shards
from mmtrain.feed import read_setting
from mmtrain.recipe import load

# a JSON of conversations beside the sources of the tiny recipe
_SOURCE = "{path: %s, weight: 4, rule: chat, max_images: 1, max_tokens: 48}"


def llava(world: World) -> Path:
    """The world's own conversations about pictures, written as LLaVA has them."""
    shards = open_shards(world.folder / "demo_data/chat")
    folder = world.folder / "llava"
    folder.mkdir()
    records = []
    for document in map(shards.document, range(len(shards))):
        pictures = [blob for part in document.parts for blob in part.media]
        said = [
            {"from": who, "value": words}
            for pair in zip(document.meta["questions"], document.meta["answers"], strict=True)
            for who, words in zip(("human", "gpt"), pair, strict=True)
        ]
        record: dict[str, object] = {"id": document.sample_id, "conversations": said}
        if pictures:
            (folder / f"{document.sample_id}.png").write_bytes(pictures[0])
            said[0]["value"] = "<image>\n" + said[0]["value"]
            record["image"] = f"{document.sample_id}.png"
        records.append(record)
    path = folder / "llava.json"
    path.write_text(json.dumps([*records, {"id": "broken", "conversations": []}]))
    return path


def test_a_json_is_read_trained_on_and_tuned_on(world: World) -> None:
    source, tokenizer = str(llava(world)), "demo_data/tokenizer"
    command = ["data", "ingest", "chat", source, "chat_of_llava", "--tokenizer", tokenizer]
    assert world.run(1, *command, "--system", "none") == [0], world.last_log
    assert (
        "100 documents of 101 records" in world.last_log and "1 records left out" in world.last_log
    )
    own, made = (open_shards(world.folder / f) for f in ("demo_data/chat", "chat_of_llava"))
    for number in range(100):  # the same conversations came back
        assert made.document(number).parts == own.document(number).parts

    chat = "data.sources.chat=" + _SOURCE % "chat_of_llava"
    lines = world.train("chat-base", 1, chat, "train.steps=6", "data.learn_image_begin=true")
    assert {"loss_text/chat", "loss_text/captions"} <= {key for line in lines for key in line}
    assert all(line["loss_image"] > 0 for line in lines)

    recipe = str(REPOSITORY / "configs/emu/tiny_instruct.yaml")
    tuned = ["name=chat-tuned", "train.initialize_from=runs/chat-base", "train.steps=12"]
    rate = ["optimizer.learning_rate=1e-2", "train.global_batch_packs=2"]
    assert world.run(1, "train", recipe, *tuned, *rate) == [0], world.last_log
    lines = world.metrics("chat-tuned")
    assert lines[-1]["loss"] < lines[0]["loss"]
    # images are shown, and none is regressed; a conversation has few tokens to learn
    assert all(line["loss_image"] == 0 < line["images"] for line in lines)


def test_a_recipe_says_whether_images_begin_by_themselves(world: World) -> None:
    path = REPOSITORY / "configs/emu/tiny.yaml"
    data = f"data.tokenizer={world.folder}/demo_data/tokenizer"
    moved = [
        f"data.sources.{name}.path={world.folder}/demo_data/{name}"
        for name in ("captions", "pages", "clips", "boards", "text")
    ]
    for key, learns in (("false", False), ("true", True)):
        recipe = load(path, [data, *moved, f"data.learn_image_begin={key}"])
        assert read_setting(recipe).layout.learns_image_begin is learns

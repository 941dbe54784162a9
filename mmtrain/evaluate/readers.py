"""Readers of the JSON that benchmarks are published in.

Captions: COCO (`images` and `annotations`) and Karpathy's split file (`sentences` in every
image). Questions: VQAv2 and OK-VQA (a questions file and an annotations file, joined by
`question_id`) and VizWiz (one list). A record that cannot be used is named and left out, the
others are evaluated; a file that is none of these is an error.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmtrain.errors import ContentError, MissingError
from mmtrain.evaluate.examples import Example, ExampleSet
from mmtrain.paths import below

CAPTION_FORMS = 'COCO {"images": [...], "annotations": [...]} or Karpathy\'s dataset_coco.json'
QUESTION_FORMS = 'VQAv2 and OK-VQA {"annotations": [...]} with `questions:`, or VizWiz [...]'


class BrokenRecord(Exception):
    """A record that cannot be used; the text says why."""


@dataclass
class Collected:
    """What a reader has found so far."""

    examples: list[Example] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def read(self, place: str, entries: Iterable[Any], make: Callable[[Any], Example]) -> None:
        """Keep the example of every entry, or a line that says why there is none."""
        for number, entry in enumerate(entries):
            try:
                self.examples.append(make(entry))
            except BrokenRecord as error:
                self.broken.append(f"{place}[{number}]: {error}")
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                self.broken.append(f"{place}[{number}]: not a record of this form ({error!r})")

    def done(self, path: Path) -> ExampleSet:
        """Everything found.

        Raises:
            ContentError: no record could be used.
        """
        if not self.examples:
            first = f"; the first: {self.broken[0]}" if self.broken else ""
            raise ContentError(f"{path}: none of {len(self.broken)} records can be used{first}")
        return ExampleSet(tuple(self.examples), tuple(self.broken))


def read_captions(path: Path, images: Path, split: str) -> ExampleSet:
    """Pictures with their true captions.

    Args:
        path: a COCO caption file or Karpathy's split file.
        images: folder of the pictures that the file names.
        split: of Karpathy's file, as in `test`.

    Raises:
        MissingError: a file or folder is not there.
        ContentError: the file is of another form, or no record of it can be used.
    """
    content = read_json(path)
    _folder(images)
    if not isinstance(content, Mapping) or not isinstance(content.get("images"), list):
        raise ContentError(f"{path}: not a caption file; expected {CAPTION_FORMS}")
    entries = content["images"]
    if any(isinstance(entry, Mapping) and "sentences" in entry for entry in entries):
        return _karpathy(path, entries, images, split)
    if not isinstance(content.get("annotations"), list):
        raise ContentError(f"{path}: holds no annotations; expected {CAPTION_FORMS}")
    captions: dict[Any, list[str]] = defaultdict(list)
    found = Collected()
    for number, annotation in enumerate(content["annotations"]):
        try:
            text = _text(annotation["caption"])
            captions[annotation["image_id"]].append(text)
        except (BrokenRecord, KeyError, TypeError) as error:
            found.broken.append(f"{path.name} annotations[{number}]: no caption ({error!r})")

    def example(entry: Any) -> Example:
        name, key = str(entry["file_name"]), entry["id"]
        if key not in captions:
            raise BrokenRecord(f"no annotation names its id {key}")
        picture = _picture(images, [name])
        return Example(key=str(key), image=name, pictures=(picture,), answers=tuple(captions[key]))

    found.read(f"{path.name} images", entries, example)
    return found.done(path)


def _karpathy(path: Path, entries: Sequence[Any], images: Path, split: str) -> ExampleSet:
    splits = {str(e.get("split")) for e in entries if isinstance(e, Mapping)}
    if split not in splits:
        raise ContentError(f"{path}: no split {split!r}; it has {', '.join(sorted(splits))}")

    def example(entry: Any) -> Example:
        name = str(entry["filename"])
        nested = str(Path(entry.get("filepath", "")) / name)
        answers = tuple(_text(sentence["raw"]) for sentence in entry["sentences"])
        if not answers:
            raise BrokenRecord("no sentences")
        key = str(entry.get("cocoid", entry.get("imgid", name)))
        picture = _picture(images, [nested, name])
        return Example(key=key, image=name, pictures=(picture,), answers=answers)

    found = Collected()
    chosen = [e for e in entries if not isinstance(e, Mapping) or e.get("split") == split]
    found.read(f"{path.name} {split} images", chosen, example)
    return found.done(path)


def read_questions(path: Path | None, questions: Path | None, images: Path) -> ExampleSet:
    """Questions about pictures, with what people answered.

    Args:
        path: annotations (VQAv2, OK-VQA) or a VizWiz list; None for a test set without answers.
        questions: the questions file of VQAv2 and OK-VQA.
        images: folder of the pictures.

    Raises:
        MissingError: a file or folder is not there.
        ContentError: a file is of another form, or no record of it can be used.
    """
    _folder(images)
    content = read_json(path) if path is not None else None
    if isinstance(content, list) and path is not None:
        return _vizwiz(path, content, images)
    if path is not None and not isinstance((content or {}).get("annotations"), list):
        raise ContentError(f"{path}: not an annotations file; expected {QUESTION_FORMS}")
    if questions is None:
        raise ContentError(f"{path}: holds no questions; name their file as `questions:`")
    asked = read_json(questions)
    if not isinstance(asked, Mapping) or not isinstance(asked.get("questions"), list):
        raise ContentError(f"{questions}: not a questions file; expected {QUESTION_FORMS}")
    return _vqa(questions, asked, content, images)


def _vqa(path: Path, asked: Mapping[str, Any], content: Any, images: Path) -> ExampleSet:
    found = Collected()
    told: dict[Any, Mapping[str, Any]] = {}
    for number, annotation in enumerate(content["annotations"] if content else []):
        if isinstance(annotation, Mapping) and "question_id" in annotation:
            told[annotation["question_id"]] = annotation
        else:
            found.broken.append(f"annotations[{number}]: no question_id")
    subtype = str(asked.get("data_subtype", ""))

    def example(entry: Any) -> Example:
        key = entry["question_id"]
        annotation = told.get(key)
        if content is not None and annotation is None:
            raise BrokenRecord(f"no annotation names its question_id {key}")
        names = list(_coco_names(entry, subtype))
        return Example(
            key=str(key),
            image=names[0],
            pictures=(_picture(images, names),),
            question=_text(entry["question"]),
            answers=_people(annotation["answers"]) if annotation is not None else (),
            group=str((annotation or {}).get("answer_type", "")),
        )

    found.read(f"{path.name} questions", asked["questions"], example)
    return found.done(path)


def _vizwiz(path: Path, entries: Sequence[Any], images: Path) -> ExampleSet:
    def example(entry: Any) -> Example:
        name = str(entry["image"])
        return Example(
            key=name,
            image=name,
            pictures=(_picture(images, [name]),),
            question=_text(entry["question"]),
            answers=_people(entry["answers"]) if "answers" in entry else (),
            group=str(entry.get("answer_type", "")),
        )

    found = Collected()
    found.read(path.name, entries, example)
    return found.done(path)


def _coco_names(entry: Mapping[str, Any], subtype: str) -> Iterator[str]:
    """Names the picture of a question may have: COCO's 2014 form, its 2017 form, its own."""
    if "image" in entry:
        yield str(entry["image"])
        return
    number = int(entry["image_id"])
    if subtype:
        yield f"COCO_{subtype}_{number:012d}.jpg"
    yield f"{number:012d}.jpg"


def _people(answers: Iterable[Any]) -> tuple[str, ...]:
    said = tuple(str(a["answer"] if isinstance(a, Mapping) else a) for a in answers)
    if not said:
        raise BrokenRecord("no answers")
    return said


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise BrokenRecord(f"found {value!r} where a text belongs")
    return value.strip()


def _picture(folder: Path, names: Sequence[str]) -> Path:
    for name in names:
        path = below(folder, name)
        if path is None:
            raise BrokenRecord(f"picture {name!r} is not below {folder}; name a folder above both")
        if path.is_file():
            return path
    raise BrokenRecord(f"no picture {' or '.join(names)} in {folder}")


def _folder(images: Path) -> None:
    if not images.is_dir():
        raise MissingError(f"the folder of pictures {images} is not there; set `images:`")


def read_json(path: Path) -> Any:
    """Parse a file.

    Raises:
        MissingError: it is not there.
        ContentError: it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MissingError(f"{path} is not there") from error
    except (ValueError, OSError, RecursionError) as error:
        raise ContentError(f"{path} cannot be read as JSON: {error}") from error

"""What comes from someone else is data: hostile files are refused by name, through the commands.

Each test runs the command line in this process, and then looks at what was written.
"""

import ast
import base64
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from saying import refused

from mmtrain.cli import main

ROOT = Path(__file__).resolve().parent.parent
Main = Callable[[list[str]], int]

TALK = [{"from": "human", "value": "Red?"}, {"from": "gpt", "value": "Red."}]


# recipes


@pytest.mark.parametrize(
    "value",
    [
        "${oc.env:MMTRAIN_SECRET}",
        "runs/${oc.env:MMTRAIN_SECRET,none}",
        "${oc.${name}:MMTRAIN_SECRET}",
        "${data.${oc.env:MMTRAIN_SECRET}}",
        "${oc.decode:'${oc.env:MMTRAIN_SECRET}'}",
        "${oc.create:{a: 1}}",
        "${planted:}",
    ],
)
@pytest.mark.parametrize("by", ["file", "override"])
def test_resolvers_are_refused(
    recipe: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    value: str,
    by: str,
) -> None:
    monkeypatch.setenv("MMTRAIN_SECRET", "s3cr3t")
    canary = tmp_path / "canary"
    OmegaConf.register_resolver("planted", canary.touch, replace=True)
    try:
        if by == "file":
            recipe.write_text(recipe.read_text() + f'\nseed: "{value}"\n')
            said = refused(capsys, 2, "check", recipe)
            assert said.strip().startswith(f"{recipe} seed: ")
        else:
            said = refused(capsys, 2, "check", recipe, f'seed="{value}"')
            assert said.strip().startswith("override seed: ")
        assert value in said and "refused" in said and "s3cr3t" not in said
        assert not canary.exists()
        assert OmegaConf.has_resolver("oc.env")  # other users of OmegaConf keep theirs
    finally:
        OmegaConf.clear_resolver("planted")


def test_a_resolver_in_a_base_names_the_base(
    recipe: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    top = tmp_path / "top.yaml"
    top.write_text(f"base: {recipe.name}\n")
    recipe.write_text(recipe.read_text() + "\nlog: {every_steps: '${oc.env:HOME}'}\n")
    said = refused(capsys, 2, "check", top)
    assert said.strip().startswith(f"{recipe} log.every_steps: ")


def test_keys_can_still_be_copied(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = recipe.read_text().replace("name: test\n", "name: run-${train.steps}\n")
    recipe.write_text(text + "\nseed: ${data.pack_tokens}\n")
    assert main(["check", str(recipe)]) == 0, capsys.readouterr().err


def _doubling(first: str, rest: str) -> str:
    return first + "".join(
        "\n" + rest.replace("NEXT", f"a{i + 1}").replace("LAST", f"a{i}") for i in range(40)
    )


BOMBS = {
    "aliases": (_doubling("a0: &a0 [1, 1]", "NEXT: &NEXT [*LAST, *LAST]"), "expansion"),
    "copied lists": (_doubling("a0: [1, 1]", "NEXT: ['${LAST}', '${LAST}']"), "copy"),
    "copied texts": (_doubling("a0: xx", "NEXT: '${LAST}${LAST}'"), "a2: found '${a1}${a1}'"),
    "relative copies": (_doubling("a0: xx", "NEXT: '${.LAST}${.LAST}'"), "a1: found"),
    "nesting": ("a: " + "[" * 900 + "]" * 900, "nested"),
    "itself": ("a: &a [*a]", "recursive"),
    "a long text": ("a: " + "x" * 5000, "5,000 characters"),
    "a long file": ("# " + "x" * 300_000, "bytes"),
    "a long number": ("seed: " + "9" * 5000, "5000 digits"),
    "a key twice": ("seed: 1\nseed: 2", "duplicate key"),
    "no date": ("seed: !!timestamp 2020-99-99", "month"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_yaml_bombs_are_one_line(
    recipe: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    text, says = BOMBS[name]
    recipe.write_text(recipe.read_text() + "\n" + text + "\n")
    start = time.perf_counter()
    said = refused(capsys, 2, "check", recipe)
    assert says in said and len(said) < 600
    assert time.perf_counter() - start < 8  # about 1 s; without limits it never ends


@pytest.mark.parametrize(
    "tag", ["object/apply:os.system", "object/new:os.system", "name:os.system"]
)
def test_tags_of_python_make_nothing(
    recipe: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, tag: str
) -> None:
    canary = tmp_path / "canary"
    recipe.write_text(recipe.read_text() + f"\nseed: !!python/{tag} ['touch {canary}']\n")
    said = refused(capsys, 2, "check", recipe)
    assert str(recipe) in said and "os.system" in said and not canary.exists()


# pictures


@pytest.mark.parametrize("place", ["a file", "inline"])
def test_a_huge_picture_is_left_out_and_counted(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    huge_png: bytes,
    place: str,
) -> None:
    (tmp_path / "huge.png").write_bytes(huge_png)
    inline = "data:image/png;base64," + base64.b64encode(huge_png).decode()
    said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A wall."}]
    image = "huge.png" if place == "a file" else inline
    records = [{"id": "bad", "image": image, "conversations": said}]
    records += [{"id": str(i), "conversations": talk} for i, talk in enumerate([TALK] * 3)]
    (tmp_path / "chat.json").write_text(json.dumps(records))
    out = tmp_path / "out"
    start = time.perf_counter()
    assert main(["data", "ingest", "chat", str(tmp_path / "chat.json"), str(out)]) == 65
    left_out, verdict = capsys.readouterr().err.strip().splitlines()
    assert time.perf_counter() - start < 3
    assert "record 1 (id bad)" in left_out and "more than 67,108,864 pixels" in left_out
    assert "1 of 4" in verdict and not out.exists()
    command = [
        "data",
        "ingest",
        "chat",
        str(tmp_path / "chat.json"),
        str(out),
        "--max-failures",
        "0.5",
    ]
    assert main(command) == 0
    assert "3 documents of 4 records read as llava" in capsys.readouterr().out


# the code itself


def test_loaders_of_pickles_are_told_not_to_run_them() -> None:
    """What ruff's S rules do not look at: torch.load and numpy.load."""
    wanted = {"torch": ("weights_only", True), "np": ("allow_pickle", False)}
    faults, seen = [], 0
    for path in [
        *ROOT.glob("mmtrain/**/*.py"),
        *ROOT.glob("tools/*.py"),
        *ROOT.glob("kernels/**/*.py"),
    ]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            module, function = node.func.value, node.func.attr
            if not (isinstance(module, ast.Name) and module.id in wanted and function == "load"):
                continue
            name, value = wanted[module.id]
            given = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            seen += 1
            if given.get(name) is not value:
                faults.append(f"{path}:{node.lineno}: {module.id}.load without {name}={value}")
    assert not faults and seen >= 4

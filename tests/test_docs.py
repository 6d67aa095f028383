"""README.md and docs/ are run: every doctest, every command, every link, every name of an option.

A block of commands is ```bash, or ```console where the output is shown too. Commands that call the program are run in
a directory of their own, in which `demo` is the demo model set, `/data` and `/shared` are replaced, and the files that
the same page shows are there. What shows no output is only planned. Where a command reads what the one before it has
made, the whole block is carried out, command after command, in a directory that all such blocks share. Shown output
must appear, line by line and in order; `...` stands for anything. What the first page shows alone is typed into a
shell; all else is told to the same program, called within the process of the tests.
"""

from __future__ import annotations

import contextlib
import dataclasses
import doctest
import enum
import hashlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch
from safetensors.torch import save_file

import mergeflow
from mergeflow.config import schema
from tests.program import call

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
SEMANTICS = [ROOT / "docs" / "semantics.md", ROOT / "docs" / "trees.md"]
PICTURES = sorted((ROOT / "docs" / "pictures").iterdir())
PATIENCE_SECONDS = 120
FIRST_PAGE = ROOT / "README.md"
"""Whose commands are processes, unless their block is carried out."""
PROGRAM = (("python", "launch.py"), ("mergeflow",), ("make", "demo"))
"""What is run; `make demo` is what its recipe is."""
CHECKS = ("cmp",)
"""What else is run, where a block is carried out."""
OTHERS = (
    "git",
    "cd",
    "make",
    "pip",
    "export",
    "ls",
    "docker",
    "ray",
    "sbatch",
    "kubectl",
    "eval",
    "sha256sum",
    "PIP_EXTRA_INDEX_URL=...",
)
"""What else the pages may tell people to type."""
ONLY_TALK = ("--help", "--cfg", "--info", "-sc", "job=compare", "job=verify")
"""With these the program merges nothing."""
MADE_BEFORE = re.compile(r"(?:^|\s)(?:a|b|base|file|recipe\.file)=(?!/)\w")
"""A file that lies below the working directory: the commands before have made it."""
LARGEST_PICTURE = 250_000
"""Bytes."""

FENCE = re.compile(r"^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\((?!\w+:)(?P<file>[^)#\s]*)(?:#(?P<part>[^)\s]+))?\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
CODE = re.compile(r"`([^`\n]+)`")
ASSIGNMENT = re.compile(r"(?<![\w.=/{-])\+{0,2}(?P<name>[a-z_]+(?:\.[\w-]+)*)=(?P<value>\[[^]]*\]|[^\s`]*)")


class Block(NamedTuple):
    """One fenced block of a page."""

    page: Path
    line: int
    kind: str
    text: str

    @property
    def place(self) -> str:
        """Where it is, for the name of a test."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


class Example(NamedTuple):
    """One command of a block, and what it is said to print."""

    place: str
    page: Path
    command: str
    shown: tuple[str, ...]
    code: int
    carried_out: bool
    """Whether it is done whatever it shows, after those before it in the same block."""

    @property
    def is_process(self) -> bool:
        """Whether it is a process of its own."""
        return self.command.split()[0] in CHECKS or (self.page == FIRST_PAGE and not self.carried_out)


class Ended(NamedTuple):
    """What a command printed, and its exit code."""

    output: str
    code: int


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text("utf-8")
    for match in FENCE.finditer(text):
        yield Block(page, text.count("\n", 0, match.start()) + 1, match["kind"], match["text"])


def commands(block: Block) -> Iterator[Example]:
    """The commands of a block, each with its output; `$ echo $?` prints the exit code of the one above."""
    text = block.text.replace("\\\n", " ")
    prompt = "$ " if block.kind == "console" else ""
    found: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        if line.startswith(prompt) and line.strip() and not line.startswith("#"):
            found.append((line.removeprefix(prompt).partition("  #")[0].strip(), []))
        elif prompt and line.strip():
            found[-1][1].append(line)
    for index, (command, shown) in enumerate(found):
        if command != "echo $?":
            following = found[index + 1] if index + 1 < len(found) else ("", [])
            code = int(following[1][0]) if following[0] == "echo $?" else 0
            yield Example(block.place, block.page, command, tuple(shown), code, bool(MADE_BEFORE.search(text)))


BLOCKS = [block for page in PAGES for block in blocks(page)]
COMMANDS = [example for block in BLOCKS if block.kind in ("bash", "console") for example in commands(block)]
RUN = [
    example
    for example in COMMANDS
    if any(example.command.split()[: len(head)] == [*head] for head in PROGRAM)
    or (example.carried_out and example.command.split()[0] in CHECKS)
]


def files_of(page: Path) -> dict[str, str]:
    """The files that a page shows: blocks of YAML whose first line is a comment with their path."""
    shown = {}
    for block in blocks(page):
        first, _, _ = block.text.partition("\n")
        if block.kind == "yaml" and re.fullmatch(r"# [\w/-]+\.yaml", first):
            shown[first.removeprefix("# ")] = block.text.replace(f"{first}\n", "", 1)
    return shown


def arguments_of(example: Example, data: Path) -> list[str]:
    """What is run: the command as it is shown, planned where it shows no result, without Ray where it names none."""
    words = shlex.split(re.sub(r"/(data|shared)/", f"{data}/", example.command))
    if words == ["make", "demo"]:
        return ["overwrite=true"]
    arguments = words[2:] if words[0] == "python" else words[1:]
    if any(word in ONLY_TALK for word in arguments):
        return arguments
    if not example.shown and not example.carried_out:
        return [*arguments, *(["job=plan"] if "job=plan" not in arguments else [])]
    return arguments if any("executor=" in word for word in arguments) else [*arguments, "executor=local"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, demo_dir: Path) -> Path:
    """What the pages call `/data` and `/shared`: an SDXL collection, other models, and what a web UI has merged."""
    place = tmp_path_factory.mktemp("data")
    (place / "sdxl").symlink_to(demo_dir)
    (place / "llm").mkdir()
    for number, name in enumerate("abc"):
        layers = {f"model.layers.{layer}.weight": torch.full((64, 64), 2.0**number) for layer in range(4)}
        embedding = {"model.embed_tokens.weight": torch.full((512, 64), float(number))}
        tensors = {key: value.to(torch.bfloat16) for key, value in {**layers, **embedding}.items()}
        save_file(tensors, place / "llm" / f"{name}.safetensors", metadata={"format": "pt"})
    (place / "old").mkdir()
    save_file({"w": torch.ones(1)}, place / "old" / "x21a.safetensors", metadata=merged_by_a_web_ui(demo_dir))
    return place


def merged_by_a_web_ui(demo_dir: Path) -> dict[str, str]:
    """The metadata of x21a = 0.8 (01 + 02) / 2 + 0.2 (03 + 41) / 2; when 41 was merged, it had not been hashed."""
    paths = {path.name[2:4]: path for path in demo_dir.glob("_x*.safetensors")}
    hashes = {id: hashlib.sha256(paths[id].read_bytes()).hexdigest() for id in ("01", "02", "03", "41")}
    made = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("x01a-_x01_x02", "x02a-_x03_x41")}

    def merge(a: str, b: str | None, multiplier: float, vae: str) -> dict[str, object]:
        names = ("primary_model_hash", "secondary_model_hash", "interp_method", "multiplier")
        values = (a, b, "Weighted sum", multiplier)
        return {"type": "webui", **dict(zip(names, values, strict=True)), "save_as_half": True, "bake_in_vae": vae}

    vae = "sd_xl_base_1.0.vae.safetensors"
    first = merge(hashes["01"], hashes["02"], 0.5, vae)
    second = merge(hashes["03"], None, 0.5, vae)
    leaves = {id: {"name": f"sdxl\\{paths[id].name}", "sd_merge_recipe": None} for id in hashes}
    one, other = made
    listed = {
        made[one]: {"name": f"{one}.safetensors", "sd_merge_recipe": first},
        hashes["01"]: leaves["01"],
        hashes["02"]: leaves["02"],
        made[other]: {"name": f"{other}.safetensors", "sd_merge_recipe": second},
        hashes["03"]: leaves["03"],
        hashes["41"]: leaves["41"],
    }
    top = merge(made[one], made[other], 0.2, "None")
    return {"format": "pt", "sd_merge_recipe": json.dumps(top), "sd_merge_models": json.dumps(listed)}


class Shell:
    """Where commands are typed, each once."""

    def __init__(self, place: Path, demo_dir: Path, data: Path) -> None:
        self._place = place
        self._demo_dir = demo_dir
        self._data = data
        self._done: dict[tuple[Path, str], Ended] = {}

    def ended(self, example: Example) -> Ended:
        """What comes of a command; those before it in a block that is carried out are typed before it."""
        if example.carried_out:
            block = [one for one in RUN if one.place == example.place]
            for before in block[: block.index(example)]:
                self._typed(before)
        return self._typed(example)

    def _typed(self, example: Example) -> Ended:
        """What came of it when it was typed; in a directory that is shared, what it makes may be there already."""
        here = self._directory(example)
        if (here, example.command) not in self._done:
            output, code = self._process(example, here) if example.is_process else self._call(example, here)
            told = output.replace(f"{here}/", "/data/").replace(f"{self._data}/", "/data/")
            self._done[here, example.command] = Ended(told, code)
        return self._done[here, example.command]

    def _call(self, example: Example, here: Path) -> Ended:
        with contextlib.chdir(here):
            done = call(*self._arguments(example, here))
        return Ended(done.both, done.code)

    def _process(self, example: Example, here: Path) -> Ended:
        check = example.command.split()[0] in CHECKS
        program = [sys.executable, str(ROOT / "launch.py")]
        done = subprocess.run(
            shlex.split(example.command) if check else [*program, *self._arguments(example, here)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=here,
            timeout=PATIENCE_SECONDS,
        )
        return Ended(done.stdout, done.returncode)

    def _directory(self, example: Example) -> Path:
        """Where a command is typed: there is `demo`, and the files that the page shows."""
        here = self._place / ("together" if example.carried_out else f"command{RUN.index(example)}")
        if not here.exists():
            here.mkdir()
            (here / "demo").symlink_to(self._demo_dir)
        for file, text in files_of(example.page).items():
            (here / file).parent.mkdir(parents=True, exist_ok=True)
            (here / file).write_text(text.replace("/data/", f"{self._data}/"), "utf-8")
        return here

    def _arguments(self, example: Example, here: Path) -> list[str]:
        # Outputs stay with their command: several commands of a page write to the same directory.
        return [word.replace(f"out={self._data}/", f"out={here}/") for word in arguments_of(example, self._data)]


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory, demo_dir: Path, data: Path) -> Shell:
    return Shell(tmp_path_factory.mktemp("shell"), demo_dir, data)


@pytest.mark.parametrize("example", RUN, ids=lambda example: f"{example.place} {example.command[:60]}")
def test_a_command_does_what_the_page_shows(example: Example, shell: Shell) -> None:
    output, code = shell.ended(example)
    assert code == example.code, output
    lines = iter(plain(line) for line in output.splitlines())
    for shown in map(plain, example.shown):
        wanted = re.compile(".*".join(map(re.escape, shown.split("..."))))
        assert any(wanted.search(line) for line in lines), f"'{shown}' does not appear, or not there, in:\n{output}"


def plain(line: str) -> str:
    """A line without its columns."""
    return " ".join(line.split())


@pytest.mark.parametrize("example", COMMANDS, ids=lambda example: f"{example.place} {example.command[:60]}")
def test_a_page_tells_people_to_type_nothing_unknown(example: Example) -> None:
    assert example in RUN or example.command.split()[0] in OTHERS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_examples_print_what_they_show(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # Fences are no output: everything but the examples is made empty, and lines keep their numbers.
    kept = [""] * (page.read_text("utf-8").count("\n") + 1)
    for block in blocks(page):
        if block.kind == "pycon":
            lines = block.text.splitlines()
            kept[block.line : block.line + len(lines)] = lines
    test = doctest.DocTestParser().get_doctest("\n".join(kept), {}, page.name, str(page), 0)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.REPORT_NDIFF
    told: list[str] = []
    result = doctest.DocTestRunner(optionflags=flags).run(test, out=told.append)
    assert result.failed == 0, "".join(told)
    if page in SEMANTICS:
        assert result.attempted > 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text("utf-8"))
    for match in LINK.finditer(text):
        target = (page.parent / match["file"]).resolve() if match["file"] else page
        assert target.exists(), match[0]
        assert ROOT in (target, *target.parents), match[0]
        if match["part"] and target.suffix == ".md":
            assert match["part"] in {anchor(title) for title in HEADING.findall(target.read_text("utf-8"))}, match[0]


@pytest.mark.parametrize("picture", PICTURES, ids=lambda picture: picture.name)
def test_a_picture_is_shown_by_a_page_and_small(picture: Path) -> None:
    shown = {(page.parent / match["file"]).resolve() for page in PAGES for match in LINK.finditer(page.read_text())}
    assert picture in shown
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size < LARGEST_PICTURE


def anchor(title: str) -> str:
    """What a heading is called in a link."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


GROUPS = {
    place.name: {file.stem for file in place.glob("*.yaml")} for place in (ROOT / "conf").iterdir() if place.is_dir()
}
TOP = {field.name: field for field in dataclasses.fields(schema.Config)}
OPEN = {"selection", "target", "models.files", "models.composites", "method.multipliers"}
OPEN |= {"recipe.nodes", "recipe.vaes", "recipe.given"}
"""Where users have names of their own."""
TYPOS = {"executor.wokers"}
"""What is mistyped on purpose."""


def assignments(page: Path) -> Iterator[re.Match[str]]:
    """Everything of the form name=value in the code of a page whose name begins as an option does."""
    text = page.read_text("utf-8")
    code = [*CODE.findall(FENCE.sub("", text)), *(block.text for block in blocks(page) if block.kind != "pycon")]
    for part in code:
        for match in ASSIGNMENT.finditer(part):
            if match["name"].partition(".")[0] in TOP and match["value"]:
                yield match


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_option_that_a_page_names_exists(page: Path) -> None:
    own = {name.partition("/")[2].removesuffix(".yaml") for name in files_of(page)}
    for match in assignments(page):
        name, value = match["name"], match["value"]
        if name in GROUPS:
            for option in re.split(r"[\[\],]+", value.strip("[]'\",;:")):
                assert option in GROUPS[name] or f"{name}/{option}" in own or option.isupper(), match[0]
        elif not any(name.startswith(f"{place}.") for place in OPEN):
            assert is_option(name) or name in TYPOS, match[0]


def is_option(name: str) -> bool:
    node: object = schema.Config()
    for part in name.split("."):
        if not hasattr(node, part):
            return False
        node = getattr(node, part)
    return True


POLICIES = {
    "keys.missing": schema.Missing,
    "keys.surplus": schema.Surplus,
    "keys.integers": schema.Integers,
    "nonfinite": schema.Nonfinite,
    "dtype": schema.OutputDtype,
    "keys": schema.KeyRule,
    "position_ids": schema.PositionIds,
    "method.arithmetic": schema.Arithmetic,
    "method.scalars": schema.Scalars,
    "method.bake": schema.Bake,
}


@pytest.mark.parametrize(
    ("option", "value"), [(option, value.value) for option, kind in POLICIES.items() for value in kind]
)
def test_every_policy_is_explained(option: str, value: str) -> None:
    assert any(f"`{option}={value}`" in page.read_text("utf-8") for page in SEMANTICS)


def test_every_enum_of_the_schema_is_explained_or_chosen_by_a_group() -> None:
    enums = {value for value in vars(schema).values() if isinstance(value, enum.EnumMeta) and value is not enum.Enum}
    by_group = {schema.MethodName, schema.ExecutorKind, schema.RecipeKind, schema.ObjectiveKind, schema.SeriesKind}
    assert enums == {*POLICIES.values(), schema.Job, schema.SeriesWrite, schema.IoKind, schema.Placement, *by_group}


def test_every_group_and_option_of_the_configs_is_in_the_guide() -> None:
    guide = (ROOT / "docs" / "guide.md").read_text("utf-8")
    missing = [
        f"{group}={option}"
        for group, options in GROUPS.items()
        if group in TOP
        for option in options
        if not re.search(rf"`{option}`|{group}=\[?([\w,]+,)?{option}\b", guide)
    ]
    assert missing == []


def test_every_decision_is_in_the_index_and_has_its_four_parts() -> None:
    decisions = ROOT / "docs" / "decisions"
    index = (decisions / "README.md").read_text("utf-8")
    files = sorted(decisions.glob("[0-9]*.md"))
    assert [file.name[:4] for file in files] == [f"{number:04}" for number in range(1, len(files) + 1)]
    for file in files:
        text = file.read_text("utf-8")
        title = HEADING.findall(text)[0]
        assert f"[{title}]({file.name})" in index
        assert HEADING.findall(text)[1:] == ["Problem", "Choice", "Why not the others", "Consequences"], file.name
        assert len(text.splitlines()) <= 45, file.name


def test_the_changelog_begins_with_this_version() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert mergeflow.__version__ in headings[:2]


def test_the_image_is_built_from_the_constraints_in_the_order_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    dockerfile = (ROOT / "Dockerfile").read_text("utf-8")
    made = re.findall(r"@\$\(PIP\) (.+)", makefile)
    built = re.findall(r"pip install .*--constraint constraints\.txt (.+)", dockerfile)
    assert made[:2] == ["torch", "--editable ."]
    assert built == made[:2]

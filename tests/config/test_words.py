from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from hydra.conf import ConfigSourceInfo
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf.errors import OmegaConfBaseException

from mergeflow.config.convert import to_config
from mergeflow.config.words import in_plain_words, misread_numbers, quote_texts
from tests.program import call

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.config.conftest import Compose

ROOT = Path(__file__).parent.parent.parent


def read_by_hydra(argument: str) -> Any:
    (override,) = OverridesParser.create().parse_overrides([argument])
    return override.value()


def written(directory: Path, files: Mapping[str, str]) -> Path:
    """A directory of configs as users have them."""
    for name, text in files.items():
        file = directory / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, "utf-8")
    return directory


# what is typed


@pytest.mark.parametrize(
    ("typed", "handed_on"),
    [
        ("selection.te0=05,11=2", 'selection.te0="05,11=2"'),
        ("selection.te0=05", 'selection.te0="05"'),
        ("selection.te0=1_0", 'selection.te0="1_0"'),
        ("selection.te0=all but 03,10", 'selection.te0="all but 03,10"'),
        ("+selection.mine=--,05", '+selection.mine="--,05"'),
        ("++selection.mine=--,05", '++selection.mine="--,05"'),
        ("models.dir=~/ü (2)", 'models.dir="~/ü (2)"'),
        ("models.pattern=_x{id}-*.safetensors", 'models.pattern="_x{id}-*.safetensors"'),
        ("models.pattern={id}.safetensors", 'models.pattern="{id}.safetensors"'),
        ("models.files.a=/x,y", 'models.files.a="/x,y"'),
        ("out=/a=b", 'out="/a=b"'),
        ("out=${oc.env:HOME}/x", "out=${oc.env:HOME}/x"),
        ("target.x17.file=a (1).safetensors", 'target.x17.file="a (1).safetensors"'),
        ('selection.te0=a"b', 'selection.te0="a\\"b"'),
        ("a=/x (1).safetensors", 'a="/x (1).safetensors"'),
        ("b=merged/a,b.safetensors", 'b="merged/a,b.safetensors"'),
        ("recipe.file=~/made by {me}.json", 'recipe.file="~/made by {me}.json"'),
        ("recipe.name=x39a (2).safetensors", 'recipe.name="x39a (2).safetensors"'),
        ("target.recorded.file=a=b.safetensors", 'target.recorded.file="a=b.safetensors"'),
    ],
    ids=lambda value: value,
)
def test_paths_and_lists_are_quoted_for_hydra(typed: str, handed_on: str) -> None:
    assert quote_texts([typed]) == [handed_on]


@pytest.mark.parametrize(
    "typed",
    [
        "selection=round1",
        "selection.te0=[05,11]",
        "selection.te0='05,11'",
        'selection.te0="05,11"',
        "selection.te0=${selection.te1}",
        "selection.te0=",
        "~selection.te0",
        "models.dir=null",
        "out=???",
        "executor.workers=2",
        "target=[x17,x11c]",
        "target.x17.components.vae.model=null",
        "models.files={a: /x}",
        "recipe.file=???",
        "recipe=x39a",
        "recipe.vaes={a.safetensors: '25'}",
        "recipe.nodes.x39a=[x38a,x35a,0.2]",
        "method.multipliers={te0-13: 0.3}",
        "method.multipliers.te0-13=0.3",
        "method.shape=[[05,11],17]",
        "--cfg",
        "job",
    ],
)
def test_everything_else_is_left_as_it_is(typed: str) -> None:
    assert quote_texts([typed]) == [typed]


@pytest.mark.parametrize(
    ("typed", "handed_on"),
    [
        (
            "target.x17.components.vae.model=05",
            '++target.x17.components={vae: {model: "05", selection: null}}',
        ),
        (
            "target.single.components.unet.selection=mine",
            '++target.single.components={unet: {selection: "mine", model: null}}',
        ),
        ("models.files.05=/data/a b", '++models.files={005: "/data/a b"}'),
        ("models.files.12a=/data/a", '++models.files={12a: "/data/a"}'),
        ("+selection.2nd=05,06", '++selection={2nd: "05,06"}'),
        ("method.multipliers.11a=0.3", '++method.multipliers={11a: "0.3"}'),
        ("recipe.given.x39a.b=35", '++recipe.given={x39a.b: "35"}'),
        ("recipe.vaes.*=25", '++recipe.vaes={*: "25"}'),
        ("recipe.vaes.sdxl vae (1).safetensors=025", '++recipe.vaes={sdxl vae \\(1\\).safetensors: "025"}'),
    ],
)
def test_what_hydra_takes_only_in_braces_is_put_into_them(typed: str, handed_on: str) -> None:
    assert quote_texts([typed]) == [handed_on]


@pytest.mark.parametrize("flag", ["-m", "--multirun"])
def test_commas_separate_alternatives_where_several_runs_are_asked_for(flag: str) -> None:
    typed = ["selection.te0=05,11", flag, "out=a,b"]
    assert quote_texts(typed) == typed


def test_a_command_is_one_text_even_there() -> None:
    typed = ["-m", "objective.command=./score --by a,b {file}", "selection.te0=05,11"]
    assert quote_texts(typed) == ["-m", 'objective.command="./score --by a,b {file}"', "selection.te0=05,11"]
    quoted = ["-m", "objective.command='./score {file}'"]
    assert quote_texts(quoted) == quoted


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
@example("\\")
@example('\\"')
@example('a\\\\"b\\')
@example("a\\b")
@example("a\n")
@example("05,11=2\n")
@example("1_0")
@example("{id}")
@example("true")
def test_whatever_text_is_quoted_reaches_the_config_unchanged(text: str) -> None:
    (argument,) = quote_texts([f"models.pattern={text}"])
    if argument != f"models.pattern={text}":
        assert read_by_hydra(argument) == text
    else:
        assert text[0] in "'\"$[" or text in ("null", "???")


# what Hydra says


MISTAKES = {
    # names
    "merhod=uniform": "there is no option 'merhod' (--cfg job shows all); did you mean 'method'?",
    "exectuor.workers=2": "there is no option 'exectuor' (--cfg job shows all); did you mean 'executor'?",
    "executor.wrokers=2": "there is no option 'executor.wrokers' (--cfg job shows all); "
    "did you mean 'executor.workers'?",
    "keys.missin=skip": "there is no option 'keys.missin' (--cfg job shows all); did you mean 'keys.missing'?",
    "foo=1": "there is no option 'foo' (--cfg job shows all)",
    "target.x17.fil=a": "there is no option 'target.x17.fil' (--cfg job shows all); did you mean 'target.x17.file'?",
    "target.x71.file=a": "there is no option 'target.x71' (--cfg job shows all; '+target={x71: ...}' adds it); "
    "did you mean 'target.x17'?",
    "target.x17.components.unett.model=3": "there is no option 'target.x17.components.unett' (--cfg job shows all; "
    "'+target.x17.components={unett: ...}' adds it); did you mean 'target.x17.components.unet'?",
    "selection.te9=05": "there is no option 'selection.te9' (--cfg job shows all; +selection.te9=... adds it); "
    "did you mean 'selection.te1'?",
    "no/such=group": "there is no option 'no/such' (--cfg job shows all)",
    # options of groups
    "method=unifrom": "method has no option 'unifrom'; did you mean 'uniform'? "
    "(there is pairwise, pairwise_torch20, uniform)",
    "recipe=x39": "recipe has no option 'x39'; did you mean 'x39a'? (there is file, webui, x39a)",
    "keys=web": "keys has no option 'web'; did you mean 'webui'? (there is strict, webui)",
    "executor=lcoal": "executor has no option 'lcoal'; did you mean 'local'? (there is cluster, local, ray)",
    "experiment=x": "experiment has no option 'x' (there is round1, select_by_score)",
    "target=[x17,x11]": "target has no option 'x11'; did you mean 'x11c'? (there is recorded, single, x11c, x17)",
    # values
    "method.bake=all": "method.bake: Invalid value 'all', expected one of [none, every, top]",
    "method.arithmetic=fp32": "method.arithmetic: Invalid value 'fp32', expected one of "
    "[webui, float32, float64, comfyui, supermerger]",
    "method.multipliers={te0-13: half}": "method.multipliers.te0-13: Value 'half' of type 'str' could not be "
    "converted to Float",
    "position_ids=keep": "position_ids: Invalid value 'keep', expected one of [webui, fix]",
    "recipe.chekc=false": "there is no option 'recipe.chekc' (--cfg job shows all); did you mean 'recipe.check'?",
    "executor.workers=two": "executor.workers: Value 'two' of type 'str' could not be converted to Integer",
    "keys.missing=skp": "keys.missing: Invalid value 'skp', expected one of [error, skip, base]",
    "dtype=fp8": "dtype: Invalid value 'fp8', expected one of [keep, fp16, bf16, fp32]",
    "overwrite=maybe": "overwrite: Value 'maybe' is not a valid bool (type str)",
    "executor.memory=null": "executor.memory cannot be null",
    "models.files={5: /x}": "models.files.5: 5 is a number to YAML; write it in quotes",
    "models.composites={a: [1, 2]}": "models.composites.a: 1 is a number to YAML; write it in quotes",
    "+target.y.file=a": "y: what is new is added as a whole, in braces, as in "
    "'+target={NAME: {file: ..., selection: ...}}'",
    "selection.te0=${nope}": "selection.te0: Interpolation key 'nope' not found",
    # the grammar
    "overwrite": "'overwrite' is not NAME=VALUE; see --help",
    "target=[x17": "'target=[x17' cannot be read; check its brackets, quotes and commas",
    "method=~uniform": "'method=~uniform' cannot be read; if its value is a text, put quotes around it: "
    "'method=\"~uniform\"'",
    "executor.workers=1,2": "'executor.workers=1,2' has several values; write [a,b] for a list, quotes around a text, "
    "or -m to run once for each",
    "method=null": "null is no option of method=; leave it out, or choose one that --help shows",
}


@pytest.mark.parametrize("typed", MISTAKES)
def test_a_mistake_is_told_in_plain_words(typed: str, compose: Compose) -> None:
    with pytest.raises((HydraException, OmegaConfBaseException, ValueError)) as caught:
        to_config(compose(typed))
    assert str(in_plain_words(caught.value, [typed])) == MISTAKES[typed]


@pytest.mark.parametrize(
    ("field", "told"),
    [
        ("multiplier", "there is no 'multiplier' in a list; write the list as a whole, as in NAME=[A,B,0.3]"),
        ("2", "recipe.nodes.x02a[2]: the list ends before; write it as a whole, as in NAME=[A,B,0.3]"),
    ],
)
def test_a_merge_that_is_a_list_is_written_anew(field: str, told: str, compose: Compose) -> None:
    with pytest.raises((HydraException, OmegaConfBaseException, ValueError)) as caught:
        to_config(compose("recipe=x39a", f"recipe.nodes.x02a.{field}=0.3"))
    assert str(in_plain_words(caught.value)) == told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("te0: [\n", "{file}, line 2: expected the node content, but found '<stream end>'"),
        ("te0: a\nte0: b\n", "{file}, line 2: found duplicate key te0"),
        ("- a\n- b\n", "Cannot merge DictConfig with ListConfig"),
    ],
    ids=["not YAML", "a key twice", "a list"],
)
def test_a_file_that_cannot_be_read_is_told_in_plain_words(
    text: str, told: str, compose: Compose, tmp_path: Path
) -> None:
    own = written(tmp_path, {"selection/own": text})
    with pytest.raises((HydraException, yaml.YAMLError)) as caught:
        compose("selection=own", own=own)
    assert str(in_plain_words(caught.value)) == told.format(file=own / "selection" / "own.yaml")


def test_an_option_of_ones_own_directory_is_listed_with_the_others(compose: Compose, tmp_path: Path) -> None:
    own = written(tmp_path, {"selection/mine": "te0: all\n"})
    with pytest.raises(HydraException) as caught:
        compose("selection=mien", own=own)
    assert str(in_plain_words(caught.value)) == (
        "selection has no option 'mien'; did you mean 'mine'? (there is all, mine, round1, round1_first, round2, "
        "round4)"
    )


@pytest.mark.parametrize(
    "typed",
    [
        "+target={y: {file: y.safetensors, selection: te0}}",
        "+target.x17.components={more: {model: a}}",
        "+selection.te9=05",
    ],
)
def test_what_is_said_to_add_something_adds_it(typed: str, compose: Compose) -> None:
    config = to_config(compose(typed))
    assert "y" in config.target or "more" in config.target["x17"].components or "te9" in config.selection


# numbers that YAML reads otherwise than people do


def misread(directory: Path, choices: Mapping[str, object], primary: str = "config") -> list[str]:
    sources = [
        ConfigSourceInfo(path="hydra.conf", schema="pkg", provider="hydra"),
        ConfigSourceInfo(path=str(ROOT / "conf"), schema="file", provider="main"),
        ConfigSourceInfo(path=str(directory), schema="file", provider="command-line"),
        ConfigSourceInfo(path="", schema="structured", provider="schema"),
    ]
    return [str(error) for error in misread_numbers(sources, choices, primary)]


@pytest.mark.parametrize(
    ("number", "read"),
    [
        ("010", "8"),
        ("0010", "8"),
        ("0x10", "16"),
        ("0b11", "3"),
        ("1_0", "10"),
        ("12:30", "750"),
        ("+5", "5"),
        ("1.10", "1.1"),
        ("1_0.5", "10.5"),
    ],
)
@pytest.mark.parametrize(
    "text", ["te0: {}", "te0: [05, {}]", "te0:\n  - 7\n  - {}", "te0: all\nnested: {{a: [[{}]]}}", "{}: a"]
)
def test_a_number_that_yaml_does_not_read_as_it_is_written_is_refused(
    number: str, read: str, text: str, tmp_path: Path
) -> None:
    content = text.format(number)
    own = written(tmp_path, {"selection/own": f"{content}\n"})
    line = next(at for at, one in enumerate(content.splitlines(), start=1) if number in one)
    assert misread(own, {"selection": "own"}) == [
        f"own.yaml, line {line}: YAML does not read {number} as the id that it looks like, but as {read}; "
        f'write "{number}" in quotes'
    ]


@pytest.mark.parametrize(
    "number", ["5", "05", "005", "0", "08", "09", "-3", "1.5", '"010"', "'1_0'", "010a", "0o17", "a"]
)
def test_what_is_read_as_it_is_written_is_accepted(number: str, tmp_path: Path) -> None:
    own = written(tmp_path, {"selection/own": f"te0: [{number}]\n"})
    assert misread(own, {"selection": "own"}) == []


@pytest.mark.parametrize("number", ["0.50", "0.20", "1e-3", "1.0e-3", "+0.5", ".5", "1.", "-0.250", "1_0.5", "1", "00"])
@pytest.mark.parametrize(
    "text",
    [
        "recipe: {{nodes: {{x: [01, 02, {}]}}}}",
        "nodes:\n  x: {{a: 01, b: 02, multiplier: {}}}",
        "method: {{multipliers: {{te0-13: {}}}}}",
        "multipliers:\n  level1: {}",
    ],
    ids=["a pair and M", "a mapping", "multipliers", "multipliers of a method"],
)
def test_a_number_to_multiply_by_is_no_id(number: str, text: str, tmp_path: Path) -> None:
    own = written(tmp_path, {"recipe/own": f"{text.format(number)}\n"})
    assert misread(own, {"recipe": "own"}) == []


@pytest.mark.parametrize(("number", "read"), [("010", "8"), ("0x10", "16"), ("1:30", "90"), ("1:30.5", "90.5")])
@pytest.mark.parametrize("text", ["nodes: {{x: [01, 02, {}]}}", "multipliers: {{x: {}}}"])
def test_a_number_to_multiply_by_is_what_it_looks_like(number: str, read: str, text: str, tmp_path: Path) -> None:
    own = written(tmp_path, {"recipe/own": f"{text.format(number)}\n"})
    assert misread(own, {"recipe": "own"}) == [
        f"own.yaml, line 1: YAML does not read {number} as the number that it looks like, but as {read}; "
        "write it in decimal digits"
    ]


@pytest.mark.parametrize(
    "text",
    [
        "recipe: {nodes: {x: [010, 02, 0.5]}}",
        "recipe: {nodes: {x: [01, 010]}}",
        "recipe: {nodes: {x: {a: 010, b: 02, multiplier: 0.5}}}",
        "recipe: {nodes: {x: {a: 01, b: 02, bake: 010}}}",
        "recipe: {nodes: {010: [01, 02]}}",
        "recipe: {vae: 010}",
        "method: {multipliers: {010: 0.5}}",
        "method: {shape: [[01, 010], 05]}",
        "method: {vae: 010}",
        "selection: {nodes: [01, 02, 010]}",
        "selection: {multipliers: [010]}",
        "selection: {multiplier: 010}",
    ],
)
def test_ids_beside_numbers_to_multiply_by_are_still_looked_at(text: str, tmp_path: Path) -> None:
    own = written(tmp_path, {"recipe/own": f"{text}\n"})
    (problem,) = misread(own, {"recipe": "own"})
    assert problem.startswith("own.yaml, line 1: YAML does not read 010 as the id that it looks like, but as 8")


def test_only_files_that_were_chosen_are_looked_at(tmp_path: Path) -> None:
    own = written(tmp_path, {"selection/own": "te0: 010\n", "target/own": "a: 010\n", "target/other": "a: 1_0\n"})
    assert misread(own, {"selection": "round1", "experiment": None}) == []
    assert len(misread(own, {"target": ["own", "other"], "selection": "own"})) == 3


def test_a_file_that_another_includes_is_looked_at_too(tmp_path: Path) -> None:
    own = written(
        tmp_path,
        {
            "selection/own": "defaults:\n  - base\n  - _self_\n  - /lists/far@_here_\n  - /target: x17\nte0: 05\n",
            "selection/base": "defaults: [own]\nte1: 010\n",
            "lists/far": "te2: 0x10\n",
        },
    )
    assert [problem.partition(",")[0] for problem in misread(own, {"selection": "own"})] == ["base.yaml", "far.yaml"]


def test_a_primary_config_of_ones_own_is_looked_at(tmp_path: Path) -> None:
    own = written(tmp_path, {"mine": "defaults: [config]\nselection: {te0: 010}\n"})
    assert misread(own, {}) == []
    assert [problem.partition(",")[0] for problem in misread(own, {}, "mine")] == ["mine.yaml"]


def test_of_two_files_of_one_name_the_first_counts_as_it_does_for_hydra(tmp_path: Path) -> None:
    own = written(tmp_path, {"selection/round1": "te0: 010\n"})
    assert misread(own, {"selection": "round1"}) == []


@pytest.mark.parametrize(
    "option", [file.relative_to(ROOT / "conf").with_suffix("") for file in (ROOT / "conf").rglob("*.yaml")], ids=str
)
def test_the_configs_that_come_with_mergeflow_are_read_as_they_are_written(option: Path, tmp_path: Path) -> None:
    assert misread(tmp_path, {str(option.parent): option.name}) == []


# as a whole


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("method=null", "mergeflow: null is no option of method=; leave it out, or choose one that --help shows"),
        ("selection=broken", "broken.yaml, line 2: expected the node content, but found '<stream end>'"),
        ("selection=latin", "mergeflow: 'utf-8' codec can't decode byte 0xff in position 5: invalid start byte"),
        (
            "selection=octal",
            "mergeflow: octal.yaml, line 1: YAML does not read 010 as the id that it looks like, but as 8",
        ),
        ("--config-name=mine", "mergeflow: mine.yaml, line 2: YAML does not read 0x10 as the id that it looks like"),
        ("models.files={5: /x}", "mergeflow: models.files.5: 5 is a number to YAML; write it in quotes"),
    ],
)
def test_a_mistake_ends_the_program_with_one_line_before_anything_is_made(
    typed: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        "selection/broken": "te0: [\n",
        "selection/octal": "te0: 010\n",
        "mine": "defaults: [config, _self_]\nselection: {te0: 0x10}\n",
    }
    own = written(tmp_path / "own", files)
    (own / "selection" / "latin.yaml").write_bytes(b"te0: \xff\n")
    monkeypatch.chdir(tmp_path)
    done = call("-cd", str(own), typed)
    assert (done.code, done.out) == (2, "")
    (line,) = done.err.splitlines()
    assert told in line
    assert list(tmp_path.iterdir()) == [own]

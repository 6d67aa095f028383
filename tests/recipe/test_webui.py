from __future__ import annotations

import hashlib
import json
import re
import time
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given as for_all
from hypothesis import settings
from hypothesis import strategies as st

from mergeflow.errors import ConfigError, FormatError, MergeflowError, Problems
from mergeflow.recipe.modelset import ModelSet
from mergeflow.recipe.naming import own_id, stem
from mergeflow.recipe.tree import Node, Tree
from mergeflow.recipe.webui import Identity, matched, recorded
from tests.recipe.webui_simulator import Checkpoint, File, WebUI

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

VAE = "sd_xl_base_1.0.vae.safetensors"


def leaf(ui: WebUI, id: str, *, hashed: bool = True, folder: str = "sdxl\\") -> Checkpoint:
    return ui.add(f"{folder}_x{id}-name{id}.safetensors", hashed=hashed)


def collection(checkpoints: Iterable[Checkpoint]) -> tuple[ModelSet, dict[str, Identity]]:
    """A model set of these files under the names that they have now, and what they are known by."""
    paths: dict[str, str] = {}
    identities: dict[str, Identity] = {}
    for checkpoint in checkpoints:
        id = (own_id(checkpoint.stem) or checkpoint.stem).removeprefix("_x")
        paths[id] = f"/m/{checkpoint.stem}.safetensors"
        identities[id] = Identity(checkpoint.file.sha256, checkpoint.file.legacy)
    return ModelSet(paths, place="/m"), identities


def rebuilt(
    file: Checkpoint,
    leaves: Iterable[Checkpoint],
    *,
    name: str = "merged",
    given: Mapping[str, str] | None = None,
    vaes: Mapping[str, str] | None = None,
    hashed: bool = True,
) -> tuple[Tree, list[str]]:
    """The tree of a merged file over these leaves, which are known by content if `hashed`, else by name."""
    models, identities = collection(leaves)
    return matched(recorded(file.file.metadata, name, given), models, identities if hashed else {}, vaes or {})


def refused(act: Callable[[], object]) -> str:
    with pytest.raises(MergeflowError) as caught:
        act()
    assert isinstance(caught.value, (ConfigError, FormatError, Problems)) or "lacks" in str(caught.value)
    return str(caught.value)


def changed(checkpoint: Checkpoint, key: str = "sd_merge_recipe", /, **fields: Any) -> dict[str, str]:
    """The metadata of a file with some fields of its recipe, or some entries, replaced."""
    metadata = dict(checkpoint.file.metadata)
    metadata[key] = json.dumps(json.loads(metadata[key]) | fields)
    return metadata


@pytest.fixture
def ui() -> WebUI:
    return WebUI()


# --- one merge -----------------------------------------------------------------------------------------------------


def test_a_merge_of_two_is_a_tree_of_one_node(ui: WebUI) -> None:
    a, b = leaf(ui, "01"), leaf(ui, "02")
    tree, notes = rebuilt(ui.merge(a, b, multiplier=0.3, half=False), [a, b], name="x01a")
    assert tree == Tree(("01", "02"), (Node("x01a", (0, 1), 0.3, "weighted_sum", False, None),))
    assert notes == []


@pytest.mark.parametrize(
    ("count", "formula"), [(1, "no_interpolation"), (2, "weighted_sum"), (3, "add_difference")], ids=str
)
def test_every_method_of_the_web_ui_is_a_formula(ui: WebUI, count: int, formula: str) -> None:
    leaves = [leaf(ui, f"0{number}") for number in range(1, count + 1)]
    tree, _ = rebuilt(ui.merge(*leaves), leaves)
    assert tree.leaves == ("01", "02", "03")[:count]
    assert [(node.formula, node.inputs) for node in tree.nodes] == [(formula, tuple(range(count)))]


def test_a_model_that_is_merged_with_itself_is_one_leaf(ui: WebUI) -> None:
    a = leaf(ui, "01", hashed=False)
    tree, _ = rebuilt(ui.merge(a, a), [a])
    assert tree == Tree(("01",), (Node("merged", (0, 0)),))


def test_two_copies_of_a_file_are_one_leaf(ui: WebUI) -> None:
    a = leaf(ui, "21")
    copy = ui.add("_x23-other.safetensors", a.file)
    b = leaf(ui, "22")
    tree, _ = rebuilt(ui.merge(ui.merge(a, b, custom_name="x11a"), copy), [a, b, copy])
    assert tree.leaves == ("23", "22")  # the entry has the last name
    assert tree.weights() == {"23": Fraction(3, 4), "22": Fraction(1, 4)}


def test_multipliers_may_be_integers_and_lie_outside_of_0_and_1(ui: WebUI) -> None:
    a, b = leaf(ui, "01"), leaf(ui, "02")
    inner = ui.merge(a, b, multiplier=1, custom_name="x01a")
    tree, _ = rebuilt(ui.merge(inner, b, multiplier=-0.5), [a, b])
    assert [node.multiplier for node in tree.nodes] == [1.0, -0.5]


def test_merges_are_named_as_their_files_and_every_name_is_there_once(ui: WebUI) -> None:
    a, b = leaf(ui, "01"), leaf(ui, "02")
    first = ui.merge(a, b, custom_name="x01a", folder="deep\\\\er\\")
    second = ui.merge(b, a, custom_name="x01a", folder="other/")
    third = ui.merge(first, second, custom_name="top")
    tree, _ = rebuilt(ui.merge(third, a), [a, b], name="top")
    assert [node.name for node in tree.nodes] == ["x01a", "x01a-2", "top-2", "top"]


def test_a_merge_that_is_used_twice_stays_one_node_and_levels_rise(ui: WebUI) -> None:
    a, b, c = leaf(ui, "01"), leaf(ui, "02"), leaf(ui, "03")
    low = ui.merge(b, c, custom_name="low")
    high = ui.merge(a, low, custom_name="high")
    other = ui.merge(c, a, custom_name="other")
    tree, _ = rebuilt(ui.merge(high, ui.merge(low, other, custom_name="mid")), [a, b, c])
    assert tree.leaves == ("01", "02", "03")
    assert [(node.name, node.inputs) for node in tree.nodes] == [
        ("low", (1, 2)),
        ("other", (2, 0)),
        ("high", (0, 3)),
        ("mid", (3, 4)),
        ("merged", (5, 6)),
    ]
    assert list(tree.levels) == sorted(tree.levels)


# --- what cannot be replayed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, r"^'m' has no sd_merge_recipe in its metadata, so nothing tells what it was merged of; it takes a file"),
        ({"sd_merge_recipe": "{"}, r"^the sd_merge_recipe of 'm' is not JSON: "),
        ({"sd_merge_recipe": "[" * 100_000}, r"^the sd_merge_recipe of 'm' is nested too deeply to be one$"),
        ({"sd_merge_recipe": "1" * 5000}, r"^the sd_merge_recipe of 'm' is not JSON: "),
        ({"sd_merge_recipe": "[]"}, r"^the sd_merge_recipe of 'm' is not a table but \[\]$"),
        ({"sd_merge_recipe": "null"}, r"^the sd_merge_recipe of 'm' is not a table but None$"),
        ({"sd_merge_recipe": "{}"}, r"^'m' was merged by an unknown tool, and only what the web UI merged \(type 'webui'\)"),
        ({"sd_merge_recipe": '{"type": ["webui"]}'}, r"^'m' was merged by an unknown tool"),
        ({"sd_merge_recipe": '{"type": "sd-webui-supermerger"}'}, r"^'m' was merged by 'sd-webui-supermerger', and"),
        ({"sd_merge_recipe": '{"type": "mergeflow"}'}, r"^'m' was merged by 'mergeflow', and"),
        ({"sd_merge_recipe": '{"type": "webui"}', "sd_merge_models": "3"}, r"^the sd_merge_models of 'm' is not a table"),
    ],
)  # fmt: skip
def test_a_file_that_the_web_ui_did_not_merge_is_refused_by_name(metadata: dict[str, str], message: str) -> None:
    with pytest.raises((ConfigError, FormatError), match=message):
        recorded(metadata, "m")


NAN = float("nan")


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("interp_method", "Sigmoid", "has the method 'Sigmoid', which is none of 'Weighted sum', 'Add difference', "),
        ("interp_method", ["Weighted sum"], "has the method ['Weighted sum'], which is none of"),
        ("multiplier", NAN, "has the multiplier nan, which is no finite number"),
        ("multiplier", float("inf"), "has the multiplier inf, which is no finite number"),
        ("multiplier", True, "has the multiplier True, which is no finite number"),
        ("multiplier", "0.5", "has the multiplier '0.5', which is no finite number"),
        ("multiplier", None, "has the multiplier None, which is no finite number"),
        pytest.param("multiplier", 10**400, "has the multiplier 1000000", id="huge"),
        ("save_as_half", 1, "has save_as_half 1, which is neither true nor false"),
        ("save_as_half", None, "has save_as_half None, which is neither true nor false"),
        ("bake_in_vae", 5, "bakes in 5, which is no name of a VAE"),
        ("discard_weights", "^first", "leaves out the weights whose names match '^first'"),
        ("discard_weights", "{0}{x!r}", "leaves out the weights whose names match '{0}{x!r}'"),
        ("is_inpainting", True, "merges an inpainting model with another kind"),
        ("is_instruct_pix2pix", True, "merges an instruct-pix2pix model with another kind"),
        ("bake_in_te", "clip", "has the unknown field 'bake_in_te': 'clip'"),
        ("secondary_model_hash", 7, "has the hash 7"),
        ("primary_model_hash", {"a": 1}, "has the hash {'a': 1}"),
    ],
)
@pytest.mark.parametrize("inner", [False, True], ids=["the file itself", "a merge below"])
def test_what_the_replay_would_not_honour_is_named(
    ui: WebUI, field: str, value: object, complaint: str, inner: bool
) -> None:
    a, b = leaf(ui, "01"), leaf(ui, "02")
    made = ui.merge(a, b, custom_name="x01a")
    made.file.metadata = changed(made, **{field: value})
    message = refused(lambda: rebuilt(ui.merge(made, b) if inner else made, [a, b], name="top" if inner else "x01a"))
    assert f"'x01a' {complaint}" in message
    assert "mergeflow cannot replay that" in message
    assert ("the file of 'x01a'" in message) == inner


@pytest.mark.parametrize("value", ["", None, False, [], 0])
def test_an_unknown_field_without_a_value_is_a_note(ui: WebUI, value: object) -> None:
    a, b = leaf(ui, "01"), leaf(ui, "02")
    inner = ui.merge(a, b, custom_name="x01a", bake_in_te=value)
    _, notes = rebuilt(ui.merge(inner, b, bake_in_te=value), [a, b])
    assert notes == ["the field 'bake_in_te' is unknown, and empty: 'merged', 'x01a'"]


def test_a_hash_more_than_the_method_uses_is_a_note(ui: WebUI) -> None:
    a, b = leaf(ui, "01"), leaf(ui, "02")
    made = ui.merge(a, b)
    made.file.metadata = changed(made, tertiary_model_hash=b.sha256)
    tree, notes = rebuilt(made, [a, b])
    assert tree.nodes[0].inputs == (0, 1)
    assert notes == ["'merged' records more models than its method uses"]


def test_all_problems_come_together(ui: WebUI) -> None:
    a, b, c = leaf(ui, "01"), leaf(ui, "02"), leaf(ui, "03")
    x = ui.merge(a, b, custom_name="x01a", vae="one.safetensors")
    y = ui.merge(a, c, custom_name="x02a", discard_weights="vae")
    made = ui.merge(x, y, vae="two.safetensors")
    made.file.metadata = changed(made, multiplier="half")
    with pytest.raises(Problems) as caught:
        rebuilt(made, [a], given={"nothing.a": "01"})
    told = str(caught.value)
    assert len(caught.value.errors) == 6
    for text in (
        "'nothing'",
        "'half'",
        "'vae'",
        "'one.safetensors'",
        "'two.safetensors'",
        "'_x02-name02'",
        "'_x03-name03'",
    ):
        assert text in told


# --- models without a hash -----------------------------------------------------------------------------------------


def test_what_was_not_hashed_is_found_by_its_place_among_the_entries(ui: WebUI) -> None:
    a, b, c, d = (leaf(ui, id, hashed=False) for id in ("01", "02", "03", "04"))
    x, y = ui.merge(a, b, custom_name="one"), ui.merge(c, d, custom_name="two")
    made = ui.merge(ui.rename(x, "uno.safetensors"), ui.rename(y, "due.safetensors"))
    tree, notes = rebuilt(made, [a, b, c, d])
    assert tree.leaves == ("01", "02", "03", "04")
    assert [(node.name, node.inputs) for node in tree.nodes] == [("uno", (0, 1)), ("due", (2, 3)), ("merged", (4, 5))]
    assert len(notes) == 6
    assert (
        f"uno.b was recorded without a hash; by the order of the entries it is '_x02-name02' ({b.file.sha256[:10]})"
        in notes
    )


@pytest.mark.parametrize(
    "custom_name", ["x02a-_x01_x03", "x02a-x01x03", "x99a-_x01_x03", "x02a _X01+_x03", "_x03_x01", ""], ids=repr
)
def test_what_was_merged_before_is_found_by_the_name_of_the_merge(ui: WebUI, custom_name: str) -> None:
    a, b, c = leaf(ui, "01"), leaf(ui, "02"), leaf(ui, "03", hashed=False)
    x = ui.merge(a, c, custom_name="x01a-_x01_x03")
    again = ui.rename(c, c.name)  # as an installation knows it that has not hashed it
    y = ui.merge(a, again, custom_name=custom_name)
    tree, notes = rebuilt(ui.merge(ui.merge(x, b, custom_name="x03a"), y), [a, b, c])
    assert tree.leaves == ("01", "03", "02")
    assert [node.inputs for node in tree.nodes[:2]] == [(0, 1), (0, 1)]
    assert any(f"it is '_x03-name03' ({c.file.sha256[:10]})" in note for note in notes)


def test_names_without_any_id_are_understood_too(ui: WebUI) -> None:
    a, b, c = (ui.add(f"{name}.safetensors", hashed=False) for name in ("dream shaper", "juggernaut_v9", "dream"))
    x = ui.merge(a, b, custom_name="first")
    again = [ui.rename(checkpoint, checkpoint.name) for checkpoint in (a, b)]
    y = ui.merge(*again, custom_name="Dream Shaper + Juggernaut_v9")
    tree, _ = rebuilt(ui.merge(ui.merge(x, c, custom_name="second"), y), [a, b, c])
    assert [node.inputs for node in tree.nodes[:2]] == [(0, 1), (0, 1)]


def test_what_neither_the_order_nor_a_name_tells_is_reported_with_the_way_to_say_it(ui: WebUI) -> None:
    a, b, c = leaf(ui, "01"), leaf(ui, "02"), leaf(ui, "03")
    x = ui.merge(a, b, custom_name="x01a")
    again = ui.rename(b, b.name)
    y = ui.merge(a, again, custom_name="mine")
    made = ui.merge(ui.merge(x, c, custom_name="x02a"), y)
    message = refused(lambda: rebuilt(made, [a, b, c]))
    assert message.startswith("mine.b was recorded without a hash, and it may be 'x02a' (")
    assert "and 2 more; say what it is in given, as in {'mine.b': NAME}; the file of 'mine'" in message
    for said in (
        "_x02-name02",
        "sdxl/_x02-name02.safetensors",
        "_x02",
        b.file.sha256,
        b.file.sha256[:10].upper(),
        "02",
    ):
        tree, notes = rebuilt(made, [a, b, c], given={"mine.b": said})
        assert tree.nodes[1] == Node("mine", (0, 1))
        assert [note for note in notes if note.startswith("mine.b is '")]


def test_names_that_contradict_the_order_are_reported(ui: WebUI) -> None:
    a, b, c = leaf(ui, "01"), leaf(ui, "02", hashed=False), leaf(ui, "03")
    made = ui.merge(ui.merge(a, b, custom_name="x01a-_x01_x03"), c)
    message = refused(lambda: rebuilt(made, [a, b, c]))
    assert message.startswith(
        f"x01a-_x01_x03.b was recorded without a hash, and by the order of the entries it is '_x02-name02' "
        f"({b.file.sha256[:10]}), but by the names it is '_x03-name03' ({c.file.sha256[:10]}); say what it is in given"
    )
    tree, _ = rebuilt(made, [a, b, c], given={"x01a-_x01_x03.b": "02"})
    assert tree.nodes[0].inputs == (0, 1)


def test_entries_that_were_sorted_leave_only_the_names(ui: WebUI) -> None:
    a, b, c = leaf(ui, "01"), leaf(ui, "02", hashed=False), leaf(ui, "03")
    made = ui.merge(c, ui.merge(a, b, custom_name="x01a-_x01_x02"))
    entries = json.loads(made.file.metadata["sd_merge_models"])
    for keys in (sorted(entries), sorted(entries, reverse=True)):
        made.file.metadata["sd_merge_models"] = json.dumps({key: entries[key] for key in keys})
        tree, notes = rebuilt(made, [a, b, c])
        assert tree.leaves == ("03", "01", "02")
        assert "_x01_x02.b was recorded without a hash; by " in notes[0]


def test_a_web_ui_that_does_not_hash_leaves_only_what_is_given() -> None:
    ui = WebUI(hashing=False)
    a, b = (ui.rename(leaf(ui, id), f"_x{id}-name{id}.safetensors") for id in ("01", "02"))
    made = ui.merge(a, b, custom_name="x01a-_x01_x02")
    message = refused(lambda: rebuilt(made, [a, b]))
    assert message.count("neither the order of the entries nor the names tell which it was") == 2
    tree, _ = rebuilt(made, [a, b], given={"merged.a": "1", "merged.B": "02"})
    assert tree == Tree(("01", "02"), (Node("merged", (0, 1)),))


def test_lineage_that_another_tool_carries_does_not_hide_what_follows(ui: WebUI) -> None:
    """What such a tool lists has any length, so that the name has to tell where it ends."""
    a, b, x = leaf(ui, "01"), leaf(ui, "02", hashed=False), leaf(ui, "03")
    inner = {hashlib.sha256(text.encode()).hexdigest(): {"name": f"{text}.safetensors"} for text in ("p", "q")}
    x.file.metadata = {"sd_merge_recipe": '{"type": "sd-webui-supermerger"}', "sd_merge_models": json.dumps(inner)}
    named = ui.merge(x, b, custom_name="x01a-_x03_x02")
    tree, _ = rebuilt(ui.merge(named, a), [a, b, x])
    assert tree.leaves == ("03", "02", "01")
    unnamed = ui.merge(x, ui.rename(b, b.name), custom_name="mine")
    assert "mine.b was recorded without a hash, and it may be 'p'" in refused(
        lambda: rebuilt(ui.merge(unnamed, a), [a, b, x])
    )


def test_a_recipe_that_another_tool_dropped_does_not_hide_the_rest(ui: WebUI) -> None:
    """Supermerger lists a merge without its recipe, but what the merge was made of is among the entries still."""
    a, b, c, d = leaf(ui, "01"), leaf(ui, "02"), leaf(ui, "03"), leaf(ui, "04", hashed=False)
    x = ui.merge(a, b, custom_name="x01a")
    made = ui.merge(x, ui.merge(c, d, custom_name="x02a-_x03_x04"))
    entries = json.loads(made.file.metadata["sd_merge_models"])
    del entries[x.file.sha256]["sd_merge_recipe"]
    made.file.metadata["sd_merge_models"] = json.dumps(entries)
    tree, _ = rebuilt(made, [x, c, d])
    assert tree.leaves == ("x01a", "03", "04")


# --- what is given -------------------------------------------------------------------------------------------------


def test_what_is_given_replaces_what_is_recorded(ui: WebUI) -> None:
    a, b, c = leaf(ui, "01"), leaf(ui, "02"), leaf(ui, "03")
    made = ui.merge(a, b)
    tree, notes = rebuilt(made, [a, c], given={"merged.b": "3"})
    assert tree.leaves == ("01", "03")
    assert notes == ["merged.b is '3', as given"]
    tree, _ = rebuilt(made, [a, c], given={"merged.b": c.file.sha256.upper()})
    assert tree.leaves == ("01", "03")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("x01.a", "01", "given: there is no merge 'x01' for 'x01.a'; did you mean 'x01a'?"),
        ("x01a", "01", "given: there is no merge '' for 'x01a'"),
        ("x01a.d", "01", "given: 'x01a' has no input 'd' for 'x01a.d', only a, b"),
        ("x01a.c", "01", "given: 'x01a' has no input 'c' for 'x01a.c', only a, b"),
        ("x01a.", "01", "given: 'x01a' has no input '' for 'x01a.', only a, b"),
        ("x01a.ab", "01", "given: 'x01a' has no input 'ab' for 'x01a.ab', only a, b"),
        ("x01a.a", "_x02", "given: 'x01a.a' is '_x02', which may be '_x02-name02' ("),
        ("x01a.a", "9", "'9' is not in /m"),
        ("x09a.a", "01", "given: 'x09a.a' has no effect, because 'x09a' is no part of 'merged'; leave it out"),
    ],
)
def test_what_is_given_in_vain_is_an_error(ui: WebUI, key: str, value: str, message: str) -> None:
    a, b, c = leaf(ui, "01"), leaf(ui, "02"), ui.add("_x02-other.safetensors")
    idle = ui.merge(a, b, custom_name="x09a")
    made = ui.merge(ui.merge(a, b, custom_name="x01a"), c)
    entries = json.loads(made.file.metadata["sd_merge_models"])
    recipe = json.loads(idle.file.metadata["sd_merge_recipe"])
    entries["f" * 64] = {"name": idle.name, "legacy_hash": "0" * 8, "sd_merge_recipe": recipe}
    made.file.metadata["sd_merge_models"] = json.dumps(entries)
    models = ModelSet({"01": "/m/_x01-name01", "02": "/m/_x02-name02", "02b": "/m/_x02-other"}, place="/m")
    assert message in refused(lambda: matched(recorded(made.file.metadata, given={key: value}), models, {}, {}))


def test_a_composite_is_no_leaf(ui: WebUI) -> None:
    made = ui.merge(leaf(ui, "01"), leaf(ui, "02"))
    models = ModelSet({"01": "/m/_x01-name01.safetensors"}, {"09a": ("01",)}, "/m")
    message = refused(lambda: matched(recorded(made.file.metadata, given={"merged.b": "9a"}), models, {}, {}))
    assert message == "'9a' is a composite, and only a checkpoint can stand in a recorded tree"

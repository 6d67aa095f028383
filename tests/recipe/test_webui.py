from __future__ import annotations

import hashlib
import json
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import pytest

from mergeflow.errors import ConfigError, FormatError, MergeflowError, Problems
from mergeflow.recipe.modelset import ModelSet
from mergeflow.recipe.naming import own_id
from mergeflow.recipe.tree import Node, Tree
from mergeflow.recipe.webui import Identity, matched, recorded
from tests.recipe.webui_simulator import Checkpoint, File, WebUI

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

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
    assert "and 1 more; say what it is in given, as in {'mine.b': NAME}; the file of 'mine'" in message
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
    assert "mine.b was recorded without a hash, and it may be '_x02-name02' (" in refused(
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
        ("x01a.a", "9", "given: '9' is not in /m"),
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
    assert message == "given: '9a' is a composite, and only a checkpoint can stand in a recorded tree"


# --- which files the leaves are ------------------------------------------------------------------------------------


def two(ui: WebUI, *, hashed: bool = True) -> tuple[Checkpoint, Checkpoint, Checkpoint]:
    a, b = leaf(ui, "01", hashed=hashed), leaf(ui, "02", hashed=hashed)
    return a, b, ui.merge(a, b, custom_name="x01a")


def over(
    file: Checkpoint, paths: Mapping[str, str], identities: Mapping[str, tuple[str | None, str | None]] | None = None
) -> tuple[Tree, list[str]]:
    return matched(recorded(file.file.metadata), ModelSet(paths, place="/m"), identities or {}, {})


def test_content_counts_before_names(ui: WebUI) -> None:
    a, b, made = two(ui)
    identities = {"01": Identity(b.file.sha256), "02": Identity(a.file.sha256)}
    tree, notes = over(made, {"01": "/m/_x01-name01.safetensors", "02": "/m/_x02-name02.safetensors"}, identities)
    assert tree == Tree(("02", "01"), (Node("merged", (0, 1)),))
    assert notes == []


def test_of_equal_files_the_one_with_the_name_is_taken(ui: WebUI) -> None:
    a, b, made = two(ui)
    paths = {"3": "/m/copy", "01": "/n/_X01-NAME01.ckpt", "02": "/m/_x02-name02.safetensors"}
    tree, _ = over(made, paths, {id: (a.file.sha256, None) for id in ("3", "01")} | {"02": (b.file.sha256, None)})
    assert tree.leaves == ("01", "02")
    tree, _ = over(made, {"9": "/m/one", "3": "/m/two"}, {"9": (a.file.sha256, None), "3": (b.file.sha256, None)})
    assert tree.leaves == ("9", "3")


def test_what_only_a_name_tells_is_noted(ui: WebUI) -> None:
    a, b, made = two(ui)
    tree, notes = over(
        made, {"01": "/n/_X01-Name01.ckpt", "2": "/m/_x02-name02.safetensors"}, {"2": (b.file.sha256[::-1], None)}
    )
    assert tree.leaves == ("01", "2")
    assert notes == [
        f"'_x01-name01' ({a.file.sha256[:10]}) is taken to be '01' by its name; its content could not be confirmed",
        f"'_x02-name02' ({b.file.sha256[:10]}) is taken to be '2' by its name, which is another file: "
        f"its hash is {b.file.sha256[::-1][:10]}, not {b.file.sha256[:10]}",
    ]


def test_an_id_is_enough_of_a_name_where_the_collection_is_numbered(ui: WebUI) -> None:
    a, b, made = two(ui)
    paths = {"1": "/m/_x1-renamed.safetensors", "02": "/m/_x02-renamed too.safetensors"}
    tree, notes = over(made, paths)
    assert tree.leaves == ("1", "02")
    assert notes[0].endswith("is taken to be '1' by the id in its name; its content could not be confirmed")
    message = refused(lambda: over(made, {"1": "/m/x1-renamed.safetensors", "2": "/m/x2-renamed.safetensors"}))
    assert "/m lacks what 'merged' was made of" in message


def test_a_legacy_hash_with_the_name_or_without_any_doubt_is_enough(ui: WebUI) -> None:
    a, b, made = two(ui)
    paths = {"1": "/m/_x01-name01.safetensors", "7": "/m/renamed.safetensors"}
    tree, notes = over(made, paths, {"1": (None, a.file.legacy), "7": (None, b.file.legacy)})
    assert tree.leaves == ("1", "7")
    assert [note.partition(" is taken ")[2] for note in notes] == [
        "to be '1' by its legacy hash; its content could not be confirmed",
        "to be '7' by its legacy hash; its content could not be confirmed",
    ]


@pytest.mark.parametrize("why", ["two files have it", "its content is known", "two models claim it"])
def test_a_legacy_hash_that_leaves_a_doubt_is_not_enough(ui: WebUI, why: str) -> None:
    a, b, made = two(ui)
    paths = {"1": "/m/one", "7": "/m/seven", "8": "/m/eight"}
    identities: dict[str, tuple[str | None, str | None]] = {"1": (a.file.sha256, None), "7": (None, b.file.legacy)}
    if why == "two files have it":
        identities["8"] = (None, b.file.legacy)
    elif why == "its content is known":
        identities["7"] = ("0" * 64, b.file.legacy)
    else:
        entries = json.loads(made.file.metadata["sd_merge_models"])
        entries[a.file.sha256]["legacy_hash"] = b.file.legacy
        made.file.metadata["sd_merge_models"] = json.dumps(entries)
    message = refused(lambda: over(made, paths, identities))
    assert message == (
        f"/m lacks what 'merged' was made of: '_x02-name02' ({b.file.sha256[:10]}); add the files, or say in given "
        "which model stands for one, as in {'merged.b': ID}"
    )


def test_a_name_that_several_files_have_is_not_enough(ui: WebUI) -> None:
    _, _, made = two(ui)
    paths = {"1": "/m/_x01-name01.safetensors", "2": "/m/_x02-name02.safetensors", "3": "/n/_x02-name02.ckpt"}
    message = refused(lambda: over(made, paths))
    assert "may be 2 (/m/_x02-name02.safetensors), 3 (/n/_x02-name02.ckpt): all have its name" in message
    tree, _ = matched(recorded(made.file.metadata, given={"merged.b": "3"}), ModelSet(paths), {}, {})
    assert tree.leaves == ("1", "3")


def test_all_that_is_missing_is_listed_at_once(ui: WebUI) -> None:
    leaves = [leaf(ui, f"0{number}") for number in range(1, 8)]
    a, b, c, d, e, f, g = leaves
    x = ui.merge(ui.merge(a, b, custom_name="x01a"), ui.merge(c, d, custom_name="x02a"), custom_name="x03a")
    y = ui.merge(ui.merge(e, f, custom_name="x04a"), g, custom_name="x05a")
    made = ui.merge(x, y)
    x04a = made.file.made.inputs[1].made.inputs[0] if made.file.made and made.file.made.inputs[1].made else made.file

    def said(checkpoint: Checkpoint) -> str:
        return f"'{checkpoint.stem}' ({checkpoint.file.sha256[:10]})"

    message = refused(lambda: rebuilt(made, [a, g]))
    entries = json.loads(made.file.metadata["sd_merge_models"])
    x02a = next(key for key, entry in entries.items() if entry["name"] == "x02a.safetensors")
    assert message == (
        f"/m lacks what 'merged' was made of: {said(b)}, 'x02a' ({x02a[:10]}) or else all of {said(c)}, {said(d)}, "
        f"'x04a' ({x04a.sha256[:10]}) or else all of {said(e)}, {said(f)}; "
        "add the files, or say in given which model stands for one, as in {'x01a.b': ID}"
    )


def test_a_leaf_that_is_nowhere_in_the_entries_is_found_by_its_hash(ui: WebUI) -> None:
    a, b, made = two(ui)
    made.file.metadata["sd_merge_models"] = "{}"
    tree, _ = rebuilt(made, [a, b])
    assert tree.leaves == ("01", "02")
    assert f"lacks what 'merged' was made of: '{b.file.sha256[:10]}';" in refused(lambda: rebuilt(made, [a]))


# --- models that are merges themselves -----------------------------------------------------------------------------


def test_a_merge_whose_file_is_there_is_replayed_all_the_same(ui: WebUI) -> None:
    a, b, made = two(ui)
    tree, notes = rebuilt(ui.merge(made, a), [a, b, made])
    assert tree.leaves == ("01", "02")
    assert notes == []


def test_a_merge_of_what_is_missing_is_its_own_file(ui: WebUI) -> None:
    a, b, made = two(ui)
    tree, notes = rebuilt(ui.merge(made, a), [a, made])
    assert tree.leaves == ("x01a", "01")
    assert notes == [
        f"'x01a' ({made.file.sha256[:10]}) is a merge, and '_x02-name02' ({b.file.sha256[:10]}), of which it was made, "
        "is missing: its own file, 'x01a', is taken as it is"
    ]


@pytest.mark.parametrize("fields", [{"discard_weights": "vae"}, {"interp_method": "Sum twice"}, {"multiplier": NAN}])
def test_a_merge_that_cannot_be_replayed_is_its_own_file(ui: WebUI, fields: dict[str, Any]) -> None:
    a, b, made = two(ui)
    made.file.metadata = changed(made, **fields)
    tree, notes = rebuilt(ui.merge(made, a), [a, b, made])
    assert tree.leaves == ("x01a", "01")
    assert "is taken as it is" in notes[0]


def test_a_merge_with_doubts_is_its_own_file(ui: WebUI) -> None:
    """What somebody else merged comes with gaps that nobody can fill, and nobody needs to."""
    elsewhere = WebUI("elsewhere")
    p, q = elsewhere.add("p.safetensors"), elsewhere.add("q.safetensors")
    m = elsewhere.merge(elsewhere.merge(p, q, custom_name="m"), elsewhere.rename(q, "q.safetensors"), custom_name="n")
    ours = ui.add("_x05-theirs.safetensors", m.file)
    a = leaf(ui, "01")
    tree, notes = rebuilt(ui.merge(ours, a), [ours, a])
    assert tree.leaves == ("05", "01")
    assert len(notes) == 1


def test_another_file_with_the_name_of_a_merge_does_not_stand_for_it(ui: WebUI) -> None:
    a, b, made = two(ui)
    other = ui.add("x01a.safetensors")
    message = refused(lambda: rebuilt(ui.merge(made, a), [a, other]))
    assert f"'_x02-name02' ({b.file.sha256[:10]})" in message
    tree, notes = rebuilt(ui.merge(made, a), [a, other], hashed=False)
    assert tree.leaves == ("x01a", "01")
    assert len(notes) == 3  # that it is not replayed, and that two contents could not be confirmed


def test_what_another_tool_merged_is_a_leaf(ui: WebUI) -> None:
    a, x = leaf(ui, "01"), leaf(ui, "03")
    x.file.metadata = {"sd_merge_recipe": '{"type": "sd-webui-model-mixer", "model_a": "%s"}' % a.file.sha256}
    made = ui.merge(x, a)
    tree, notes = rebuilt(made, [a, x])
    assert tree.leaves == ("03", "01")
    assert notes == [
        f"'_x03-name03' ({x.file.sha256[:10]}) was merged by 'sd-webui-model-mixer', which is not replayed: "
        "its file, '03', is taken as it is"
    ]
    message = refused(lambda: rebuilt(made, [a]))
    assert f"'_x03-name03' ({x.file.sha256[:10]}), merged by 'sd-webui-model-mixer'; add the files" in message


# --- VAEs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vae", ["None", "", None], ids=repr)
def test_no_vae_is_baked_in_where_none_is_named(ui: WebUI, vae: Any) -> None:
    a, b = leaf(ui, "01"), leaf(ui, "02")
    tree, _ = rebuilt(ui.merge(a, b, vae=vae), [a, b], vaes={"*": "01"})
    assert tree.baked == ()


@pytest.mark.parametrize("name", [VAE, "SD_XL_base_1.0.VAE", "*"])
def test_a_vae_is_found_by_what_is_given(ui: WebUI, name: str) -> None:
    a, b = leaf(ui, "01"), leaf(ui, "02")
    tree, notes = rebuilt(ui.merge(a, b, vae=VAE), [a, b], vaes={name: "2"})
    assert tree.nodes[0].bake == "02"
    assert notes == []


def test_a_vae_that_has_a_model_of_its_own_is_not_any(ui: WebUI) -> None:
    a, b = leaf(ui, "01"), leaf(ui, "02")
    made = ui.merge(ui.merge(a, b, vae=VAE, custom_name="x01a"), b, vae="other.pt")
    tree, notes = rebuilt(made, [a, b], vaes={"*": "01", VAE: "02", "third": "01"})
    assert [node.bake for node in tree.nodes] == ["02", "01"]
    assert notes == ["vaes: no merge bakes in 'third'"]


def test_a_vae_is_found_by_the_name_of_its_file(ui: WebUI) -> None:
    a, b, vae = leaf(ui, "01"), leaf(ui, "02"), ui.add(VAE)
    tree, _ = rebuilt(ui.merge(a, b, vae=VAE), [a, b, vae])
    assert tree.nodes[0].bake == "sd_xl_base_1.0.vae"


def test_a_vae_that_nobody_knows_is_reported_once(ui: WebUI) -> None:
    a, b = leaf(ui, "01"), leaf(ui, "02")
    made = ui.merge(ui.merge(a, b, vae=VAE, custom_name="x01a"), b, vae=VAE)
    message = refused(lambda: rebuilt(made, [a, b]))
    assert message == (
        f"the VAE '{VAE}' is baked in, and no file of /m has that name; say in vaes which model has it, as in "
        f"{{'{VAE}': ID}} ('merged', 'x01a' baked it in)"
    )
    message = refused(lambda: rebuilt(made, [a, b], vaes={"*": "5"}))
    assert message.startswith(f"the VAE '{VAE}': '5' is not in /m")


# --- the whole of x39a ---------------------------------------------------------------------------------------------

LEAVES = "01 02 03 41 05 06 07 08 09 10b 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 36 42"
PAIRS = [
    *zip(*[iter([f"_x{id}" for id in f"{LEAVES} 37 38 39 40".split()])] * 2, strict=True),
    *[(f"x{n:02}a", f"x{n + 1:02}a") for n in range(1, 20, 2)],
    *[(f"x{n:02}a", f"x{n + 1:02}a") for n in range(21, 28, 2)],
    ("x29a", "x30a"),
    ("x31a", "x32a"),
    ("x33a", "x34a"),
    ("x36a", "x37a"),
    ("x38a", "x35a"),
]
"""What x01a to x39a were made of, in this order."""
UNHASHED = {"_x01", "_x41", "_x10b"}
RENAMED = {"x16a": "x15a-_x31_x32", "x34a": "x33a-x27ax28a"}
"""Merges whose name was mistyped, and put right afterwards."""


def strangers(owner: WebUI, count: int, *copies: File) -> Checkpoint:
    """A model that somebody merged of `count` originals of theirs and of copies of ours under other names."""
    models = [owner.add(f"{index}-theirs.safetensors", hashed=index % 3 > 0) for index in range(count)]
    models += [owner.add(f"upstream/model{file.sha256[:6]}.safetensors", file) for file in copies]
    made = models[0]
    for index, model in enumerate(models[1:]):
        made = owner.merge(made, model, multiplier=0.3, custom_name=f"mix {index}", vae="theirs.vae.pt")
    return made


def x39a() -> tuple[Checkpoint, dict[str, Checkpoint]]:
    """The file and its leaves by their names, with everything that was odd about them."""
    ui, files = WebUI(), dict[str, File]()
    known: dict[str, Checkpoint] = {}

    def original(name: str) -> Checkpoint:
        if name == "_x23":
            return ui.add("sdxl\\\\_x23-sameAs21.safetensors", known["_x21"].file)
        if name in ("_x16", "_x22", "_x33"):
            return ui.add(f"sdxl\\{name}-merged.safetensors", strangers(WebUI(name), 6).file)
        if name == "_x31":
            copies = [known[other].file for other in ("_x07", "_x08", "_x21", "_x25")]
            return ui.add(f"sdxl\\{name}-merged.safetensors", strangers(WebUI(name), 4, *copies).file)
        return ui.add(f"sdxl\\{name}-model.safetensors", hashed=name not in UNHASHED)

    for name in f"{LEAVES} 37 38 39 40".split():
        known[f"_x{name}"] = original(f"_x{name}")
        files[f"_x{name}"] = known[f"_x{name}"].file
    leaves = dict(known)
    for number, (a, b) in enumerate(PAIRS, start=1):
        label, inputs = f"x{number:02}a", f"{a}{b}".replace("10b", "10")
        top = label == "x39a"
        if top:  # both had been moved, and not been used since
            a, b = (
                known.setdefault(f"moved {name}", ui.rename(known[name], known[name].name)) and f"moved {name}"
                for name in (a, b)
            )
        made = ui.merge(
            known[a],
            known[b],
            multiplier=0.2 if top else 0.5,
            custom_name=RENAMED.get(label, f"{label}-{inputs}"),
            vae="None" if top else VAE,
        )
        if label in RENAMED:
            made.name = f"{label}-{inputs}.safetensors"
        made.sha256 = made.file.sha256
        known[label] = made
    return known["x39a"], leaves


def test_x39a_is_recorded_as_it_was() -> None:
    made, leaves = x39a()
    entries = json.loads(made.file.metadata["sd_merge_models"])
    assert len(entries) == 117
    recipes = [json.loads(made.file.metadata["sd_merge_recipe"])]
    recipes += [entry["sd_merge_recipe"] for entry in entries.values() if entry["name"].startswith("x")]
    assert len(recipes) == 39
    assert sum(recipe[key] is None for recipe in recipes for key in ("primary_model_hash", "secondary_model_hash")) == 5
    names = {entry["name"] for entry in entries.values()}
    unnamed = {name for name, checkpoint in leaves.items() if checkpoint.name not in names}
    assert unnamed == {"_x07", "_x08", "_x21", "_x23", "_x25"}


def test_x39a_is_rebuilt_with_its_five_gaps_and_its_double() -> None:
    made, leaves = x39a()
    tree, notes = rebuilt(made, leaves.values(), name="x39a", vaes={VAE: "25"})
    ids = [name.removeprefix("_x") for name in leaves]
    assert tree.leaves == tuple(id for id in ids if id != "23")
    places = {name: place for place, name in enumerate(name for name in leaves if name != "_x23")}
    places["_x23"] = places["_x21"]
    assert len(tree.nodes) == 39
    for number, (node, (a, b)) in enumerate(zip(tree.nodes, PAIRS, strict=True), start=1):
        label, top = f"x{number:02}a", number == 39
        assert own_id(node.name) == label
        assert node == Node(node.name, (places[a], places[b]), 0.2 if top else 0.5, bake=None if top else "25")
        places[label] = len(tree.leaves) + number - 1
    assert list(tree.levels[39:]) == [1] * 20 + [2] * 10 + [3] * 5 + [4] * 2 + [5, 6]
    shares = tree.weights()
    assert shares.pop("21") == Fraction(1, 20)
    assert set(shares.values()) == {Fraction(1, 40)}
    gaps = [note for note in notes if "was recorded without a hash; by the order of the entries it is" in note]
    assert [note.partition(" was ")[0] for note in gaps] == [
        "x39a.a", "x39a.b", "x01a-_x01_x02.a", "x02a-_x03_x41.b", "x05a-_x09_x10.b"
    ]  # fmt: skip
    assert sorted(note[1:5] for note in notes if "is taken as it is" in note) == ["_x16", "_x22", "_x33", "mode"]
    assert len(notes) == 9


def test_x39a_without_its_leaves_is_reported_whole() -> None:
    made, leaves = x39a()
    with pytest.raises(Problems) as caught:
        rebuilt(made, [checkpoint for name, checkpoint in leaves.items() if name not in ("_x05", "_x31", "_x42")])
    vae, missing = (str(error) for error in caught.value.errors)
    assert f"'{VAE}' is baked in" in vae
    for name in ("_x05", "_x31", "_x42"):
        assert leaves[name].file.sha256[:10] in missing
    assert "4-theirs" not in missing  # not what somebody else's model was made of, unless a part of it is there


def test_x39a_says_what_to_do_where_its_order_is_lost() -> None:
    made, leaves = x39a()
    made.file.metadata["sd_merge_models"] = json.dumps(
        json.loads(made.file.metadata["sd_merge_models"]), sort_keys=True
    )
    found = recorded(made.file.metadata, "x39a-x38ax35a")
    problems = [error for model in found.models if model.merge for error in model.merge.problems]
    ours = [str(error) for error in problems if str(error).startswith("x")]
    assert [problem.partition(" was ")[0] for problem in ours] == ["x05a-_x09_x10.b"]
    models, identities = collection(leaves.values())
    found = recorded(made.file.metadata, "x39a-x38ax35a", {"x05a-_x09_x10.b": "_x10b"})
    tree, _ = matched(found, models, identities, {"*": "25"})
    assert tree.leaves == rebuilt(*x39a()[:1], x39a()[1].values(), vaes={"*": "25"})[0].leaves

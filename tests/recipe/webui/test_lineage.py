from __future__ import annotations

import hashlib
import json
from itertools import count
from typing import TYPE_CHECKING

import pytest
from hypothesis import given as for_all
from hypothesis import settings
from hypothesis import strategies as st

from mergeflow.errors import MergeflowError
from mergeflow.recipe.modelset import ModelSet
from mergeflow.recipe.tree import Node, Tree
from mergeflow.recipe.webui import matched, recorded
from tests.recipe.webui.cases import collection, leaf, rebuilt, refused
from tests.recipe.webui.simulator import Checkpoint, File, WebUI

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mergeflow.tensors import Identity


@pytest.fixture
def ui() -> WebUI:
    return WebUI()


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
    "custom_name", ["x02a-_x01_x03", "x02a-x01x03", "x99a-_x01_x03", "x02a _X01+_x03", ""], ids=repr
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
    assert "and 1 more; say which with recipe.given.mine.b=NAME; the file of 'mine'" in message
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
        "x01a-_x01_x03.b was recorded without a hash, and by the order of the entries it is '_x02-name02' "
        f"({b.file.sha256[:10]}), but by the names it is '_x03-name03' ({c.file.sha256[:10]}); "
        "say which with recipe.given.x01a-_x01_x03.b=NAME"
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
    assert "mine.b was recorded without a hash, and it may be 'p' (" in refused(
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
        ("x01.a", "01", "recipe.given: there is no merge 'x01' for 'x01.a'; did you mean 'x01a'?"),
        ("x01a", "01", "recipe.given: there is no merge '' for 'x01a'"),
        ("x01a.d", "01", "recipe.given: 'x01a' has no input 'd' for 'x01a.d', only a, b"),
        ("x01a.c", "01", "recipe.given: 'x01a' has no input 'c' for 'x01a.c', only a, b"),
        ("x01a.", "01", "recipe.given: 'x01a' has no input '' for 'x01a.', only a, b"),
        ("x01a.ab", "01", "recipe.given: 'x01a' has no input 'ab' for 'x01a.ab', only a, b"),
        ("x01a.a", "_x02", "recipe.given: 'x01a.a' is '_x02', which may be '_x02-name02' ("),
        ("x01a.a", "9", "recipe.given: '9' is not in /m"),
        ("x09a.a", "01", "recipe.given: 'x09a.a' has no effect, because 'x09a' is no part of 'merged'; leave it out"),
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
    assert message == "recipe.given: '9a' is a composite, and only a checkpoint can stand in a recorded tree"


# --- any history ---------------------------------------------------------------------------------------------------


@st.composite
def histories(draw: st.DrawFn) -> tuple[Checkpoint, list[Checkpoint]]:
    """A file merged of merges as people do it, renaming, copying, some not yet hashed; and its leaves.

    No two files ever have the same name: what a name says would be wrong then, and nothing would tell.
    """
    ui, serial = WebUI(), count(1)
    hashed = draw(st.lists(st.booleans(), min_size=1, max_size=5))
    leaves = [ui.add(f"{next(serial)}-leaf.safetensors", hashed=known) for known in hashed]
    known = list(leaves)
    names = set[str]()
    for _ in range(draw(st.integers(1, 9))):
        inputs = draw(st.lists(st.sampled_from(known), min_size=1, max_size=3))
        way = draw(st.sampled_from(["ids", "default", "silent"]))
        name = f"m{next(serial)}"
        if way == "ids":
            name = f"x{name[1:]}-" + "_".join(checkpoint.stem for checkpoint in inputs)
        if way == "default" and len(inputs) > 1:
            name = ""
        folder = draw(st.sampled_from(["", "sdxl\\", "a/b/"]))
        made = ui.merge(*inputs, custom_name=name, multiplier=draw(st.sampled_from([0.5, 0.2, 1.0])), folder=folder)
        if made.stem in names:
            made = ui.rename(made, f"m{next(serial)}.safetensors")
        names.add(made.stem)
        known.append(made)
        index = draw(st.integers(0, len(known) - 1))
        match draw(st.sampled_from(["rename", "copy", "restart", "nothing"])):
            case "rename":
                known[index] = ui.rename(known[index], f"y{next(serial)}-renamed.safetensors")
            case "copy":
                known.append(ui.add(f"z{next(serial)}-copy.safetensors", known[index].file))
            case "restart":
                known[index] = ui.rename(known[index], known[index].name)
    return made, leaves


def truth(file: File) -> str:
    """How a file was made, whatever it is called."""
    if file.made is None:
        return file.sha256
    text = f"{[truth(below) for below in file.made.inputs]} {file.made.method} {file.made.multiplier}"
    return hashlib.sha256(text.encode()).hexdigest()


METHODS = {
    "weighted_sum": "Weighted sum",
    "add_difference": "Add difference",
    "no_interpolation": "No interpolation",
}


def claim(tree: Tree, identities: Mapping[str, Identity]) -> str:
    """The same of a tree."""
    made = [str(identities[id].sha256) for id in tree.leaves]
    for node in tree.nodes:
        text = f"{[made[place] for place in node.inputs]} {METHODS[node.formula]} {node.multiplier}"
        made.append(hashlib.sha256(text.encode()).hexdigest())
    return made[-1]


@for_all(histories())
@settings(max_examples=300, deadline=None)
def test_any_history_is_rebuilt_as_it_was_or_reported(history: tuple[Checkpoint, list[Checkpoint]]) -> None:
    file, leaves = history
    models, identities = collection(leaves)
    try:
        tree, _ = matched(recorded(file.file.metadata), models, identities, {})
    except MergeflowError as error:
        if "was recorded without a hash" not in str(error):
            raise
        return
    assert claim(tree, identities) == truth(file.file)
    assert len(set(tree.leaves)) == len(tree.leaves)
    assert len({node.name for node in tree.nodes}) == len(tree.nodes)
    assert list(tree.levels) == sorted(tree.levels)

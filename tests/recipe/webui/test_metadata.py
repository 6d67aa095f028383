from __future__ import annotations

import json
import time
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given as for_all
from hypothesis import settings
from hypothesis import strategies as st

from mergeflow.errors import ConfigError, FormatError, MergeflowError, Problems
from mergeflow.recipe.modelset import ModelSet
from mergeflow.recipe.tree import Node, Tree
from mergeflow.recipe.webui import matched, recorded
from mergeflow.recipe.webui.naming import own_id
from tests.recipe.webui.cases import VAE, changed, collection, leaf, rebuilt, refused
from tests.recipe.webui.simulator import Checkpoint, File, WebUI


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
        ({"sd_merge_recipe": "{}"}, r"^'m' was merged by an unknown tool, and only what the web UI merged "),
        ({"sd_merge_recipe": '{"type": ["webui"]}'}, r"^'m' was merged by an unknown tool"),
        ({"sd_merge_recipe": '{"type": "sd-webui-supermerger"}'}, r"^'m' was merged by 'sd-webui-supermerger', and"),
        ({"sd_merge_recipe": '{"type": "mergeflow"}'}, r"^'m' was merged by 'mergeflow', and"),
        ({"sd_merge_recipe": '{"type": "webui"}', "sd_merge_models": "3"}, r"^the sd_merge_models of 'm' is no"),
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
    ui = WebUI()
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
    leaves = dict(known)
    for number, (a, b) in enumerate(PAIRS, start=1):
        label, inputs = f"x{number:02}a", f"{a}{b}".replace("10b", "10")
        top = label == "x39a"
        first, second = known[a], known[b]
        if top:  # both had been moved, and not been used since
            first, second = ui.rename(first, first.name), ui.rename(second, second.name)
        made = ui.merge(
            first,
            second,
            multiplier=0.2 if top else 0.5,
            custom_name=RENAMED.get(label, f"{label}-{inputs}"),
            vae="None" if top else VAE,
        )
        if label in RENAMED:
            made.name = f"{label}-{inputs}.safetensors"
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
    assert sorted(note[1:5] for note in notes if "is taken as it is" in note) == ["_x16", "_x22", "_x31", "_x33"]
    assert len(notes) == 9


def test_x39a_without_its_leaves_is_reported_whole() -> None:
    made, leaves = x39a()
    with pytest.raises(Problems) as caught:
        rebuilt(made, [checkpoint for name, checkpoint in leaves.items() if name not in ("_x05", "_x31", "_x42")])
    vae, missing = (str(error) for error in caught.value.errors)
    assert f"'{VAE}' is baked in" in vae
    for name in ("_x05", "_x31", "_x42"):
        assert f"({leaves[name].file.sha256[:10]})" in missing
    assert "'_x31-merged' (" in missing.partition(" or else all of '0-theirs' (")[0]


def test_x39a_says_what_to_do_where_its_order_is_lost() -> None:
    made, leaves = x39a()
    made.file.metadata["sd_merge_models"] = json.dumps(
        json.loads(made.file.metadata["sd_merge_models"]), sort_keys=True
    )
    found = recorded(made.file.metadata, "x39a-x38ax35a")
    models, identities = collection(leaves.values())
    message = refused(lambda: matched(found, models, identities, {"*": "25"}))
    assert message.startswith("x05a-_x09_x10.b was recorded without a hash, and neither the order of the entries nor")
    found = recorded(made.file.metadata, "x39a-x38ax35a", {"x05a-_x09_x10.b": "_x10b"})
    tree, _ = matched(found, models, identities, {"*": "25"})
    assert tree == rebuilt(x39a()[0], leaves.values(), name="x39a-x38ax35a", vaes={"*": "25"})[0]


# --- any text ------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=20), inner, max_size=4),
    max_leaves=12,
)
KEYS = st.sampled_from(["a" * 64, "B" * 64, "c" * 64, "01", "", "null", "\ud800"])
RECIPES = st.fixed_dictionaries(
    {"type": st.just("webui")},
    optional={
        "primary_model_hash": KEYS | st.none() | JSON,
        "secondary_model_hash": KEYS | st.none() | JSON,
        "tertiary_model_hash": KEYS | st.none() | JSON,
        "interp_method": st.sampled_from(["Weighted sum", "Add difference", "No interpolation"]) | JSON,
        "multiplier": st.floats() | JSON,
        "save_as_half": st.booleans() | JSON,
        "bake_in_vae": st.sampled_from(["None", VAE]) | JSON,
        "custom_name": st.sampled_from(["x01a-_x01_x02", "\ud800", "x" * 300, "(" * 200]) | JSON,
        "discard_weights": st.just("") | JSON,
        "what": JSON,
    },
)
ENTRIES = st.dictionaries(
    KEYS | st.text(max_size=5),
    st.fixed_dictionaries(
        {}, optional={"name": st.text(max_size=20) | JSON, "legacy_hash": JSON, "sd_merge_recipe": RECIPES | JSON}
    )
    | JSON,
    max_size=6,
)


@for_all(
    RECIPES | JSON,
    ENTRIES | JSON,
    st.dictionaries(st.sampled_from(["merged.a", "merged.b", "m.c"]), st.sampled_from(["01", "a" * 64, "B" * 8])),
)
@settings(max_examples=400, deadline=None)
def test_whatever_metadata_holds_is_a_tree_or_an_error(recipe: object, entries: object, given: dict[str, str]) -> None:
    metadata = {"sd_merge_recipe": json.dumps(recipe), "sd_merge_models": json.dumps(entries)}
    models = ModelSet({"01": "/m/_x01-a.safetensors", "02": "/m/_x02-b.safetensors"}, place="/m")
    try:
        tree, notes = matched(
            recorded(metadata, given=given), models, {"01": ("a" * 64, None), "02": ("b" * 64, None)}, {"*": "01"}
        )
    except MergeflowError as error:
        str(error).encode()
        return
    assert tree.weights()
    "".join(notes).encode()


@for_all(st.text(max_size=50))
def test_whatever_is_no_json_is_an_error(text: str) -> None:
    for metadata in ({"sd_merge_recipe": text}, {"sd_merge_recipe": '{"type": "webui"}', "sd_merge_models": text}):
        try:
            recorded(metadata)
        except (ConfigError, FormatError) as error:
            str(error).encode()


# --- large and malicious -------------------------------------------------------------------------------------------

MANY = 20_000
MODELS = ModelSet({"01": "/m/leaf.safetensors"}, place="/m")


def key(number: int) -> str:
    return f"{number:064x}"


def recipe(*inputs: int | None, **fields: Any) -> dict[str, Any]:
    fields = {"multiplier": 0.5, "save_as_half": True, "interp_method": "Weighted sum", "custom_name": ""} | fields
    hashes = [None if number is None else key(number) for number in inputs]
    return fields | {"type": "webui", "primary_model_hash": hashes[0], "secondary_model_hash": hashes[1]}


def outcome(top: dict[str, Any], entries: list[dict[str, Any] | None]) -> Tree | str:
    """What comes of entries 0, 1 and so on, of which None is the one leaf that is there; in reasonable time."""
    metadata = {
        "sd_merge_recipe": json.dumps(top),
        "sd_merge_models": json.dumps(
            {
                key(number): {
                    "name": "leaf.safetensors" if made is None else f"m{number}.safetensors",
                    "sd_merge_recipe": made,
                }
                for number, made in enumerate(entries)
            }
        ),
    }
    began = time.monotonic()
    try:
        return matched(recorded(metadata), MODELS, {}, {})[0]
    except MergeflowError as error:
        return str(error)
    finally:
        assert time.monotonic() - began < 100


@pytest.mark.long
def test_a_chain_of_100_000_merges_is_a_tree() -> None:
    tree = outcome(recipe(0, 100_000), [*(recipe(number + 1, 100_000) for number in range(100_000)), None])
    assert isinstance(tree, Tree)
    assert len(tree.nodes) == 100_001
    assert tree.leaves == ("01",)


def test_a_graph_with_endless_ways_through_it_is_a_tree() -> None:
    tree = outcome(recipe(0, 0), [*(recipe(number + 1, number + 1) for number in range(500)), None])
    assert isinstance(tree, Tree)
    assert len(tree.nodes) == 501


def test_a_circle_is_reported() -> None:
    message = outcome(recipe(0, 3), [recipe(1, 3), recipe(2, 3), recipe(0, 3), None])
    assert message == (
        f"'m2' is made of itself: its input m2.a is 'm0' ({key(0)[:10]}), which is made of 'm2'; "
        f"the file of 'm2' ({key(2)[:10]}) itself would do"
    )


def test_many_circles_are_reported() -> None:
    message = outcome(recipe(0, 0), [*(recipe(number + 1, number) for number in range(MANY)), None])
    assert isinstance(message, str)
    assert message.startswith("20000 problem(s)")


@pytest.mark.parametrize("number", [300, MANY])
def test_many_gaps_are_reported(number: int) -> None:
    message = outcome(recipe(None, None), [*(recipe(None, None, custom_name="(" * 250) for _ in range(number)), None])
    assert isinstance(message, str)
    assert "was recorded without a hash" in message


def test_many_gaps_with_names_are_reported() -> None:
    names = " ".join(f"x{number}" for number in range(60))
    message = outcome(recipe(None, None), [*(recipe(None, None, custom_name=names) for _ in range(MANY)), None])
    assert isinstance(message, str)
    assert "was recorded without a hash" in message


def test_many_models_that_are_missing_are_counted() -> None:
    hashes = range(MANY, 2 * MANY)
    message = outcome(recipe(0, 0), [recipe(number + 1, hash) for number, hash in enumerate(hashes)])
    assert isinstance(message, str)
    assert len(message) < 100_000


def test_names_that_would_write_to_a_terminal_are_shown_harmlessly() -> None:
    metadata = {
        "sd_merge_recipe": json.dumps(recipe(0, 1, bake_in_vae="\x1b[2J\ud800.pt")),
        "sd_merge_models": json.dumps({key(0): {"name": "\x1b]0;\x07\ud800" + "x" * 500}, "\r\n": {}}),
    }
    message = refused(lambda: matched(recorded(metadata, "\x1b[31m\ud800"), MODELS, {}, {}))
    assert message.replace("\n", " ").isprintable()
    assert len(message) < 1000

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from mergeflow.recipe.modelset import ModelSet
from mergeflow.recipe.tree import Node, Tree
from mergeflow.recipe.webui import matched, recorded
from mergeflow.tensors import Identity
from tests.recipe.webui.cases import VAE, changed, leaf, rebuilt, refused
from tests.recipe.webui.simulator import Checkpoint, WebUI

if TYPE_CHECKING:
    from collections.abc import Mapping


@pytest.fixture
def ui() -> WebUI:
    return WebUI()


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
    _, _, made = two(ui)
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
        f"/m lacks what 'merged' was made of: '_x02-name02' ({b.file.sha256[:10]}); add the files, or say "
        "what stands for one with recipe.given.merged.b=ID"
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
        "add the files, or say what stands for one with recipe.given.x01a.b=ID"
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


@pytest.mark.parametrize(
    "fields", [{"discard_weights": "vae"}, {"interp_method": "Sum twice"}, {"multiplier": float("nan")}]
)
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
    x.file.metadata = {"sd_merge_recipe": json.dumps({"type": "sd-webui-model-mixer", "model_a": a.file.sha256})}
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
    assert notes == ["recipe.vaes: no merge bakes in 'third'"]


def test_a_vae_is_found_by_the_name_of_its_file(ui: WebUI) -> None:
    a, b, vae = leaf(ui, "01"), leaf(ui, "02"), ui.add(VAE)
    tree, _ = rebuilt(ui.merge(a, b, vae=VAE), [a, b, vae])
    assert tree.nodes[0].bake == "sd_xl_base_1.0.vae"


def test_a_vae_that_nobody_knows_is_reported_once(ui: WebUI) -> None:
    a, b = leaf(ui, "01"), leaf(ui, "02")
    made = ui.merge(ui.merge(a, b, vae=VAE, custom_name="x01a"), b, vae=VAE)
    message = refused(lambda: rebuilt(made, [a, b]))
    assert message == (
        f"the VAE '{VAE}' is baked in, and no file of /m has that name; say which model has it with "
        f"recipe.vae=ID or, for this one alone, recipe.vaes.{VAE}=ID ('merged', 'x01a' baked it in)"
    )
    message = refused(lambda: rebuilt(made, [a, b], vaes={"*": "5"}))
    assert message.startswith(f"the VAE '{VAE}': '5' is not in /m")

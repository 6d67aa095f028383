from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from textwrap import dedent
from typing import TYPE_CHECKING

import pytest

from mergeflow.plan.explain import WIDTH, explain, shares_in_words
from mergeflow.recipe.architecture import architecture
from mergeflow.recipe.request import Budget, Part, PartRequest, Policies
from mergeflow.recipe.shapes import TreeOptions
from mergeflow.recipe.tree import Rules
from mergeflow.tensors import Dtype, si_bytes
from tests.plan.builders import OPEN, SINGLE, USUAL, checkpoint, planned

if TYPE_CHECKING:
    from mergeflow.recipe.shapes import Bake


def test_the_page_of_a_plan_that_can_be_carried_out() -> None:
    models = [checkpoint(id, USUAL | {"odd": (1,)} if id == "7" else USUAL) for id in ("7", "20", "21", "22", "25")]
    x17 = replace(SINGLE, name="x17", file="x17 base.safetensors", components={"image": PartRequest(model="25")})
    x11c = replace(SINGLE, name="x11c", file="x11c.safetensors", selection="nsfw", dtype="fp32")
    plan = planned(
        models,
        x17,
        x11c,
        selections={"models": "7,20,11a,22", "nsfw": "11a"},
        composites={"11a": ("21", "22")},
        budget=Budget(workers=2, reads_in_flight=3, memory=2**30),
    )
    base, nsfw = (si_bytes(output.layout.size) for output in plan.outputs)
    each, every = (si_bytes(threads * (plan.memory.block + plan.memory.scratch)) for threads in (3, 6))
    assert explain(plan) == dedent(f"""\
        2 output(s) from 5 checkpoint(s)

        x17 -> /out/x17 base.safetensors ({base}, 4 tensors)
          text   uniform of 4 models, written as F16
                7 20 11a 22
                share 1/4 each, but 21 1/8, 22 3/8
          image  model 25 as it is, written as F16

        x11c -> /out/x11c.safetensors ({nsfw}, 4 tensors)
          text   uniform of 1 model (2 checkpoints), written as F32
                11a
                share 21 1/2, 22 1/2
          image  uniform of 1 model (2 checkpoints), written as F32
                the same as text of x11c

        read    162 B of 5 file(s), each byte once
        write   {si_bytes(plan.bytes_written)} into 2 file(s)
        work    3 tensors in 3 tiles, 1 shards
        memory  {each} per worker, {every} for 2 worker(s) with 3 block(s) each, of 1.07 GB allowed; beside it
                every process has Python and torch (about 0.3 GB)
        time    about 0.0 s where the storage delivers 1 GB/s, half of it at 2 GB/s

        notes (2)
          - [x17] text: model 22 counts more than once, by 11a and 22; it has 1.5 shares of 4
          - [x17] 1 surplus tensor(s) in 7: odd; ignored

        nothing forbids this plan""")


def test_the_page_of_a_plan_that_cannot_be_carried_out() -> None:
    models = [checkpoint("a"), checkpoint("b", {key: shape for key, shape in USUAL.items() if key != "text.w"})]
    page = explain(planned([*models, replace(models[0], id="c", path="/elsewhere/a link.safetensors")]))
    assert page.partition("time ")[2].partition("\n")[2] == dedent("""
        problems (2)
          - ids a and c are one file (/models/a.safetensors, /elsewhere/a link.safetensors); it would count twice;
            remove one id, or copy the file if that is meant
          - [made] text: 1 tensor(s) not in b: text.w; leave it out of the list, or choose keys.missing=skip (mean of
            those that have it) or keys.missing=base

        this plan cannot be carried out""")


def test_no_memory_is_projected_where_it_does_not_suffice() -> None:
    page = explain(planned([checkpoint("a")], budget=Budget(1, 1, 1000)))
    assert "memory  " not in page
    assert "executor.memory=1.00 kB is too little" in page


def test_ids_and_names_stay_whole_where_lines_are_broken() -> None:
    ids = [f"some-model-with-a-long-name-{number:02}" for number in range(30)]
    page = explain(planned([checkpoint(id) for id in ids]))
    assert all(id in page for id in ids)
    assert all(len(line) <= WIDTH for line in page.splitlines() if "some-model" in line)


def test_a_name_that_is_longer_than_a_line_stays_whole() -> None:
    id = "long-" * 40
    assert f"{id}\n" in explain(planned([checkpoint(id), checkpoint("b")]))


def test_components_with_long_names_stand_apart_from_what_is_said_of_them() -> None:
    assert "  text   uniform of 1 model" in explain(planned([checkpoint("a")]))
    assert "  all  uniform of 1 model" in explain(planned([checkpoint("a")], architecture=OPEN))


def test_a_component_says_all_dtypes_that_it_is_written_in() -> None:
    models = [checkpoint("a", {"x": (2,), "y": (2,), "z": (2,)}, dtypes={"x": Dtype.F32, "y": Dtype.I64})]
    assert "written as F16, F32, I64" in explain(planned(models, architecture=OPEN, dtype="keep"))


def test_a_component_of_which_nothing_is_written_says_so() -> None:
    models = [checkpoint("a"), checkpoint("b", {"text.w": (2, 3), "text.b": (3,)})]
    page = explain(planned(models, policies=Policies()))
    assert "  image  uniform of 2 models, written as nothing\n" in page


# trees


def test_the_page_of_a_plan_that_makes_trees() -> None:
    models = [checkpoint(id, USUAL | {"odd_model": (1,)}) for id in ("7", "20", "21", "22", "25")]
    x17 = replace(SINGLE, name="x17", file="x17.safetensors", components={"image": PartRequest(model="25")})
    x11c = replace(SINGLE, name="x11c", file="x11c.safetensors")
    plan = planned(
        models,
        x17,
        x11c,
        selections={"models": "7,20,11a,22"},
        composites={"11a": ("21", "22")},
        method="pairwise",
        rules=Rules("webui", "half"),
        tree=TreeOptions(bake="top", vae="25"),
        policies=Policies(keys="webui"),
        dtype="keep",
    )
    base, nsfw = (si_bytes(output.layout.size) for output in plan.outputs)
    assert explain(plan).partition("\n\nread")[0] == dedent(f"""\
        2 output(s) from 5 checkpoint(s)

        x17 -> /out/x17.safetensors ({base}, 5 tensors)
          text   pairwise (webui, fp16 scalars) of 4 models, written as F16
                7 20 11a 22
                share 1/4 each, but 21 1/8, 22 3/8
                the VAE of 25 is baked in at models-3
                models-3
                ├─ models-1 = 7 + 20
                └─ models-2
                   ├─ 11a = 21 + 22
                   └─ 22
          image  model 25 as it is, written as F16
          rest   pairwise (webui, fp16 scalars) of 4 models, written as F16
                by the tree of text of x17

        x11c -> /out/x11c.safetensors ({nsfw}, 5 tensors)
          text   pairwise (webui, fp16 scalars) of 4 models, written as F16
                by the tree of text of x17
          image  pairwise (webui, fp16 scalars) of 4 models, written as F16
                by the tree of text of x17
          rest   pairwise (webui, fp16 scalars) of 4 models, written as F16
                by the tree of text of x17""")


WITH_VAE = architecture(
    "with a VAE",
    "fp16",
    {},
    {"text": {"tensors": {"text.w": [2]}}, "vae": {"tensors": {"first_stage_model.w": [2]}}},
)


@pytest.mark.parametrize(
    ("bake", "read", "told"),
    [
        ("top", ["25"], ["pairwise (webui) of 1 model, ", "25", "share 1 each"]),
        ("none", ["7", "20", "21"], ["pairwise (webui) of 3 models, "]),
    ],
    ids=["a VAE of another", "the models' own"],
)
def test_the_models_of_a_vae_are_those_that_are_read_for_it(bake: Bake, read: list[str], told: list[str]) -> None:
    keys: dict[str, tuple[int, ...]] = {"text.w": (2,), "first_stage_model.w": (2,)}
    plan = planned(
        [checkpoint(id, keys) for id in ("7", "20", "21", "25")],
        architecture=WITH_VAE,
        selections={"models": "7,20,21"},
        method="pairwise",
        tree=TreeOptions(bake=bake, vae=None if bake == "none" else "25"),
    )
    by_key = {strip.key: [plan.checkpoints[source].id for source in strip.sources] for strip in plan.strips}
    assert by_key == {"text.w": ["7", "20", "21"], "first_stage_model.w": read}
    _, _, vae = explain(plan).partition("  vae   ")
    lines = [line.strip() for line in vae.splitlines()]
    assert lines[0] == f"{told[0]}written as F16"
    assert lines[1 : len(told) + 1] == [*told[1:], "by the tree of text of made"]


def test_trees_of_two_lists_are_both_drawn() -> None:
    models = [checkpoint(id) for id in "abc"]
    wanted = replace(SINGLE, components={"image": PartRequest("other")})
    page = explain(planned(models, wanted, selections={"other": "c,b,a"}, method="pairwise"))
    assert "├─ models-1 = a + b\n" in page
    assert "├─ other-1 = c + b\n" in page
    assert "by the tree of" not in page


def test_what_belongs_to_no_component_is_shown_only_if_there_is_any() -> None:
    webui = {"method": "pairwise", "policies": Policies(keys="webui"), "dtype": "keep"}
    assert "\n  rest" not in explain(planned([checkpoint("a"), checkpoint("b")], **webui))
    more = [checkpoint(id, USUAL | {"odd_model": (1,)}) for id in "ab"]
    assert "\n  rest   pairwise (webui) of 2 models, written as F16\n" in explain(planned(more, **webui))


@pytest.mark.parametrize(
    ("shares", "entries", "words"),
    [
        ({"a": "1/2", "b": "1/2"}, 2, "share 1/2 each"),
        ({"a": "1"}, 1, "share 1 each"),
        ({"a": "1/14", "21": "1/28", "22": "3/28"}, 14, "share 1/14 each, but 21 1/28, 22 3/28"),
        ({"21": "1/2", "22": "1/2"}, 1, "share 21 1/2, 22 1/2"),
        ({"a": "3571/10000", "b": "6429/10000"}, 2, "share a 0.3571, b 0.6429"),
        ({"a": "14999999999/100000000000", "b": "85000000001/100000000000"}, 2, "share a 0.15, b 0.85"),
        ({"a": "1/100000000000", "b": "99999999999/100000000000"}, 2, "share a 1e-11, b 1"),
        ({"a": "1", "b": "7/10", "c": "-7/10"}, 3, "share a 1, b 7/10, c -7/10"),
        ({"a": "1/257", "b": "1/514", "c": "1/771"}, 3, "share a 1/257, b 1/514, c 1/771"),
    ],
    ids=[
        "equal",
        "one model",
        "a composite",
        "nothing but a composite",
        "long fractions",
        "longer fractions",
        "next to nothing",
        "a difference",
        "many",
    ],
)
def test_shares_are_told_in_few_words(shares: dict[str, str], entries: int, words: str) -> None:
    exact = {id: Fraction(share) for id, share in shares.items()}
    assert shares_in_words(Part("text", tuple(map(str, range(entries))), exact, "uniform")) == words

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors import safe_open

from mergeflow.demo import DEMO_MODELS, Variant, collection, demo_models, ensure_demo, values
from mergeflow.demo.generate import layout_of, synthesize
from mergeflow.errors import ConfigError, StorageError
from mergeflow.formats.safetensors import Safetensors
from mergeflow.recipe.architecture import architecture
from mergeflow.tensors import Dtype

if TYPE_CHECKING:
    from mergeflow.recipe.architecture import Architecture
    from mergeflow.tensors import Header

IDS = [f"{number:02}" for number in range(1, 45)]
IDS_KEY = "conditioner.embedders.0.transformer.text_model.embeddings.position_ids"
UNET_KEY = "model.diffusion_model.middle_block.1.proj_in.weight"
FILENAMES = {model.id: model.filename for model in DEMO_MODELS}

TOY = architecture(
    "toy",
    "fp16",
    {},
    {
        "te": {
            "tensors": {"te.ids": [1, 77], "te.embedding": [96, 64], "te.scale": []},
            "layers": {"te.{a,b}": [64, 32], "te.norm": [64]},
            "integers": ["te.ids"],
        },
        "net": {"layers": {"net.{0..3}": [64, 32, 3, 3]}, "markers": {"flag": [0]}},
    },
)


def header(path: Path) -> Header:
    with path.open("rb") as file:

        def read(offset: int, count: int) -> bytes:
            file.seek(offset)
            return file.read(count)

        return Safetensors().parse(read, path.stat().st_size)


def contents(path: Path) -> dict[str, bytes]:
    data = path.read_bytes()
    return {key: data[info.begin : info.end] for key, info in header(path).tensors.items()}


def dtypes(path: Path, prefix: str = "") -> Counter[Dtype]:
    found = header(path).tensors.items()
    return Counter(info.dtype for key, info in found if key.startswith(prefix) and key != IDS_KEY)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="session")
def demo(demo_dir: Path) -> dict[str, Path]:
    """The files by id."""
    return {id_: demo_dir / name for id_, name in FILENAMES.items()}


# --- what the set is ----------------------------------------------------------------------------------------------


def test_there_are_44_checkpoints_with_the_ids_of_round_1(demo_dir: Path) -> None:
    numbers = [re.fullmatch(r"_x(\d\d)-.+\.safetensors", path.name) for path in sorted(demo_dir.glob("*.safetensors"))]
    assert [found[1] for found in numbers if found] == IDS


def test_there_is_nothing_else_in_the_directory_but_the_index(demo_dir: Path) -> None:
    assert {path.name for path in demo_dir.iterdir()} == {*FILENAMES.values(), "demo.json"}


def test_the_set_takes_less_than_400_megabytes(demo_dir: Path) -> None:
    assert sum(path.stat().st_size for path in demo_dir.iterdir()) < 400_000_000


def test_every_file_opens_with_the_library_and_holds_finite_values_of_the_right_shape(
    demo: dict[str, Path], sdxl: Architecture
) -> None:
    shapes = {key: spec.shape for key, spec in sdxl.scaled(32).usual_keys.items()}
    for path in demo.values():
        with safe_open(path, framework="numpy") as file:
            assert all(tuple(file.get_slice(key).get_shape()) == shapes.get(key) for key in shapes.keys() & file.keys())
            assert np.isfinite(file.get_tensor(UNET_KEY)).all()


def test_most_files_are_plain_fp16_with_int64_position_ids(demo: dict[str, Path]) -> None:
    plain = {
        id_
        for id_, path in demo.items()
        if dtypes(path) == {Dtype.F16: 2514} and (ids := header(path).tensors.get(IDS_KEY)) and ids.dtype is Dtype.I64
    }
    assert set(IDS) - plain == {"05", "06", "09", "13", "17", "22", "24", "27", "31", "35", "36"}


def test_values_are_spread_as_in_trained_models(demo: dict[str, Path]) -> None:
    with safe_open(demo["01"], framework="numpy") as file:
        weight = file.get_tensor("conditioner.embedders.1.model.token_embedding.weight").astype(np.float64)
        norms = [file.get_tensor(key).astype(np.float64) for key in file.keys() if key.endswith("norm1.weight")]  # noqa: SIM118
        biases = [file.get_tensor(key).astype(np.float64) for key in file.keys() if key.endswith("norm1.bias")]  # noqa: SIM118
        logit_scale = file.get_tensor("conditioner.embedders.1.model.logit_scale")
    assert abs(weight.mean()) < 0.001
    assert 0.03 < weight.std() < 0.04
    # Two thirds within one standard deviation, a twentieth beyond two: nearly normal.
    assert 0.65 < (np.abs(weight) < weight.std()).mean() < 0.70
    assert 0.03 < (np.abs(weight) > 2 * weight.std()).mean() < 0.06
    assert 0.99 < np.concatenate(norms).mean() < 1.01
    assert 0.005 < np.concatenate(biases).std() < 0.015
    assert 4.5 < logit_scale < 4.7


def test_13_is_fp32_throughout_and_27_has_an_fp32_vae(demo: dict[str, Path]) -> None:
    assert dtypes(demo["13"]) == {Dtype.F32: 2514}
    assert dtypes(demo["27"], "first_stage_model.") == {Dtype.F32: 248}
    assert dtypes(demo["27"]) == {Dtype.F32: 248, Dtype.F16: 2514 - 248}


def test_06_has_no_vae(demo: dict[str, Path]) -> None:
    assert not dtypes(demo["06"], "first_stage_model.")
    assert dtypes(demo["06"]) == {Dtype.F16: 2514 - 248}


def test_09_has_surplus_keys_and_no_other_file_has_any(demo: dict[str, Path], sdxl: Architecture) -> None:
    surplus = {
        id_: [key for key in header(path).tensors if sdxl.component_of(key) is None] for id_, path in demo.items()
    }
    assert {id_ for id_, keys in surplus.items() if keys} == {"09"}
    assert {"denoiser.sigmas", "betas", "alphas_cumprod"} < set(surplus["09"])
    assert "conditioner.embedders.0.transformer.text_projection.weight" in surplus["09"]


@pytest.mark.parametrize(
    ("stored_as", "ids"),
    [(Dtype.F16, ["05", "17", "22", "31"]), (None, ["24", "36"])],
    ids=["fp16", "absent"],
)
def test_position_ids_are_sometimes_fp16_and_sometimes_absent(
    demo: dict[str, Path], stored_as: Dtype | None, ids: list[str]
) -> None:
    found = {id_: header(path).tensors.get(IDS_KEY) for id_, path in demo.items()}
    assert [id_ for id_, info in found.items() if (info and info.dtype) is stored_as] == ids


def test_position_ids_always_count_from_0_to_76(demo: dict[str, Path]) -> None:
    for path in demo.values():
        with safe_open(path, framework="numpy") as file:
            if IDS_KEY in file.keys():  # noqa: SIM118
                assert file.get_tensor(IDS_KEY).tolist() == [list(range(77))]


@pytest.mark.parametrize(("id_", "key"), [("02", "prompt"), ("20", "sd_merge_recipe"), ("38", "ss_tag_frequency")])
def test_some_files_carry_json_in_their_metadata(demo: dict[str, Path], id_: str, key: str) -> None:
    with safe_open(demo[id_], framework="numpy") as file:
        assert isinstance(json.loads(file.metadata()[key]), dict)


def test_all_other_files_have_no_metadata_or_one_line(demo: dict[str, Path]) -> None:
    found = [header(path).metadata for id_, path in demo.items() if id_ not in {"02", "20", "38"}]
    assert found.count({}) > 10
    assert found.count({"format": "pt"}) > 10
    assert found.count({}) + found.count({"format": "pt"}) == 41


def test_six_models_have_the_text_encoders_of_25_bit_for_bit(demo: dict[str, Path], sdxl: Architecture) -> None:
    def clip(path: Path) -> list[tuple[str, bytes]]:
        return [item for item in contents(path).items() if sdxl.component_of(item[0]) in {"te0", "te1"}]

    original = clip(demo["25"])
    assert len(original) == 197 + 390
    same = [id_ for id_, path in demo.items() if clip(path) == original]
    assert same == ["03", "10", "12", "16", "18", "19", "25"]


def test_25_is_the_base_that_all_others_surround(demo: dict[str, Path]) -> None:
    far = distances(demo)
    assert far.pop("25") == 0
    assert 3 * max(far[id_] for id_ in IDS if id_ not in {"14", "25"}) < far["14"]
    assert min(far.values()) > 0.001


def distances(demo: dict[str, Path]) -> dict[str, float]:
    """How far one tensor of each model lies from that of 25, by root mean square."""

    def weight(path: Path) -> Any:
        with safe_open(path, framework="numpy") as file:
            return file.get_tensor(UNET_KEY).astype(np.float64)

    base = weight(demo["25"])
    return {id_: float(np.sqrt(np.square(weight(path) - base).mean())) for id_, path in demo.items()}


def test_21_and_23_are_one_file_under_two_names_and_no_others_are(demo: dict[str, Path]) -> None:
    ids: dict[str, list[str]] = {}
    for id_, path in demo.items():
        ids.setdefault(sha256(path), []).append(id_)
    assert [same for same in ids.values() if len(same) > 1] == [["21", "23"]]


def test_35_alone_carries_the_markers_of_v_prediction(demo: dict[str, Path]) -> None:
    marked = {id_ for id_, path in demo.items() if "v_pred" in header(path).tensors}
    assert marked == {"35"}
    assert header(demo["35"]).tensors["v_pred"].shape == (0,)


def test_names_are_as_awkward_as_real_ones() -> None:
    names = [model.filename for model in DEMO_MODELS]
    assert len(set(names)) == 44
    assert sum(" " in name for name in names) >= 3
    assert all(any(letter in name for name in names) for letter in "+@[]()")
    assert any(not name.isascii() for name in names)
    assert not any("/" in name or name.startswith(".") for name in names)


def test_more_models_are_the_same_44_and_others_after_them() -> None:
    most = demo_models(70)
    assert demo_models(44) is DEMO_MODELS
    assert demo_models(50) == most[:50]
    assert [model.id for model in most] == [f"{number:02}" for number in range(1, 71)]
    assert len({model.filename for model in most}) == len({model.variant.tune for model in most[44:]}) + 44 == 70
    changed = [model.id for model, other in zip(DEMO_MODELS, most, strict=False) if model != other]
    assert changed == ["35"], "which later rounds merge"
    assert not most[34].variant.markers


@pytest.mark.parametrize("count", [0, 43, 71])
def test_a_set_of_another_size_is_refused(count: int) -> None:
    with pytest.raises(ConfigError, match=f"models.count={count} is not from 44 to 70"):
        demo_models(count)


def test_a_larger_set_is_made_and_one_of_another_size_is_not_made_beside_it(tmp_path: Path) -> None:
    assert ensure_demo(tmp_path, TOY, count=45)
    assert not ensure_demo(tmp_path, TOY, count=45)
    assert len(list(tmp_path.glob("*.safetensors"))) == 45
    with pytest.raises(StorageError, match=r"holds a demo model set of another size \(.* are not in one of 44\)"):
        ensure_demo(tmp_path, TOY)
    with pytest.raises(StorageError, match=r"choose another models\.dir or models\.count"):
        ensure_demo(tmp_path, TOY)
    assert len(list(tmp_path.glob("*.safetensors"))) == 45


# --- how the set is kept ------------------------------------------------------------------------------------------


@pytest.fixture
def set_of_three(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Only the first three models, for tests that make the set again; their names."""
    monkeypatch.setattr(collection, "demo_models", lambda _: DEMO_MODELS[:3])
    return [model.filename for model in DEMO_MODELS[:3]]


@pytest.fixture
def linked(tmp_path: Path, demo_dir: Path) -> Path:
    """The whole set once more, without copying it; a file may be replaced here, but not written to."""
    for path in demo_dir.glob("*.safetensors"):
        os.link(path, tmp_path / path.name)
    shutil.copy(demo_dir / "demo.json", tmp_path)
    return tmp_path


class Made(list[tuple[int, int]]):
    """What a progress function was told."""

    def __call__(self, done: int, total: int) -> None:
        self.append((done, total))


def test_an_intact_set_is_left_alone_at_once(demo_dir: Path, sdxl: Architecture) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in demo_dir.iterdir()}
    begin = time.perf_counter()
    assert not ensure_demo(demo_dir, sdxl)
    assert time.perf_counter() - begin < 1
    assert {path.name: path.stat().st_mtime_ns for path in demo_dir.iterdir()} == before


def truncate(path: Path) -> None:
    data = path.read_bytes()[:-1000]
    path.unlink()
    path.write_bytes(data)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    path.unlink()
    data[-1] ^= 1
    path.write_bytes(data)


def delete(path: Path) -> None:
    path.unlink()


def lead_nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("gone"))


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, delete, lead_nowhere], ids=lambda damage: damage.__name__)
def test_a_damaged_file_alone_is_made_again_as_it_was(
    linked: Path, demo_dir: Path, sdxl: Architecture, damage: Any
) -> None:
    damage(linked / FILENAMES["33"])
    told = Made()
    assert ensure_demo(linked, sdxl, progress=told)
    assert told == [(1, 1)]
    assert (linked / FILENAMES["33"]).read_bytes() == (demo_dir / FILENAMES["33"]).read_bytes()
    assert not ensure_demo(linked, sdxl)


def test_a_set_that_was_copied_is_compared_by_content_once(
    tmp_path: Path, sdxl: Architecture, set_of_three: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ensure_demo(tmp_path / "first", sdxl, progress=Made())
    shutil.copytree(tmp_path / "first", tmp_path / "second", copy_function=shutil.copyfile)
    assert not ensure_demo(tmp_path / "second", sdxl)
    monkeypatch.setattr(Path, "read_bytes", None)
    assert not ensure_demo(tmp_path / "second", sdxl)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"stamp": 1}', '{"stamp": "STAMP", "models": {"a": {"size": 1}}}'])
def test_an_index_that_cannot_be_read_counts_for_nothing(
    tmp_path: Path, sdxl: Architecture, set_of_three: list[str], text: str
) -> None:
    ensure_demo(tmp_path, sdxl, progress=Made())
    index = tmp_path / "demo.json"
    stamp = json.loads(index.read_text("utf-8"))["stamp"]
    index.write_text(text.replace("STAMP", stamp), "utf-8")
    told = Made()
    assert ensure_demo(tmp_path, sdxl, progress=told)
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_a_set_by_another_generator_is_made_again(
    tmp_path: Path, sdxl: Architecture, set_of_three: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ensure_demo(tmp_path, sdxl, progress=Made())
    monkeypatch.setattr(collection, "VERSION", collection.VERSION + 1)
    assert ensure_demo(tmp_path, sdxl, progress=Made())


def test_what_an_interrupted_run_made_is_kept(tmp_path: Path, sdxl: Architecture, set_of_three: list[str]) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure_demo(tmp_path, sdxl, progress=interrupt, workers=1)
    assert len(json.loads((tmp_path / "demo.json").read_text("utf-8"))["models"]) == 2
    told = Made()
    assert ensure_demo(tmp_path, sdxl, progress=told)
    assert told == [(1, 1)]
    assert sorted(path.name for path in tmp_path.glob("_x*")) == set_of_three


def test_files_that_were_put_beside_the_set_are_left_alone(
    tmp_path: Path, sdxl: Architecture, set_of_three: list[str]
) -> None:
    ensure_demo(tmp_path, sdxl, progress=Made())
    (tmp_path / "_x45-mine.safetensors").write_bytes(b"mine")
    (tmp_path / set_of_three[0]).unlink()
    ensure_demo(tmp_path, sdxl, progress=Made())
    assert (tmp_path / "_x45-mine.safetensors").read_bytes() == b"mine"


def test_a_folder_of_somebody_s_own_is_refused_and_left_as_it_is(
    tmp_path: Path, sdxl: Architecture, set_of_three: list[str]
) -> None:
    (tmp_path / "_x01-mine.safetensors").write_bytes(b"mine")
    with pytest.raises(StorageError, match=r"_x01-mine\.safetensors, and the demo model set would be made among them"):
        ensure_demo(tmp_path, sdxl, progress=Made())
    assert [path.name for path in tmp_path.iterdir()] == ["_x01-mine.safetensors"]


def test_what_a_killed_run_left_without_an_index_is_no_reason_to_refuse(
    tmp_path: Path, sdxl: Architecture, set_of_three: list[str]
) -> None:
    (tmp_path / f"{set_of_three[0]}.draft").write_bytes(b"half")
    (tmp_path / set_of_three[1]).write_bytes(b"half")
    assert ensure_demo(tmp_path, sdxl, progress=Made())
    assert not (tmp_path / f"{set_of_three[0]}.draft").exists()


def test_without_a_terminal_one_line_on_stderr_says_what_is_made(
    tmp_path: Path, sdxl: Architecture, set_of_three: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "a [bold]name[/bold]"
    ensure_demo(directory, sdxl)
    (directory / set_of_three[1]).unlink()
    ensure_demo(directory, sdxl)
    ensure_demo(directory, sdxl)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        f"Making the demo model set in {directory} (3 models, 21.82 MB)",
        f"Making the demo model set in {directory} (1 of its 3 models, 7.27 MB)",
    ]


def test_an_architecture_without_shapes_is_refused(tmp_path: Path, anything: Architecture) -> None:
    with pytest.raises(ConfigError, match=r"^arch 'any' names no tensors to make; choose one that does$"):
        ensure_demo(tmp_path / "demo", anything)
    assert not (tmp_path / "demo").exists()


def test_importing_it_loads_nothing_heavy() -> None:
    code = "import sys, mergeflow.demo; print({'torch', 'numpy', 'rich', 'ray', 'hydra'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# --- how one file is made -----------------------------------------------------------------------------------------

MIXED = Variant(7, dtypes={"te": Dtype.F32}, markers=("flag",), surplus=(("betas", Dtype.F32, (10,)),))


def test_bytes_depend_on_the_arguments_alone(tmp_path: Path) -> None:
    # Pinned: another machine, numpy or Python must come to the same. Raise collection.VERSION when this is changed.
    digests = {synthesize(tmp_path / name, TOY, MIXED, divisor=2) for name in ("one.safetensors", "two.safetensors")}
    assert digests == {"7beb6779144e6b46d58bbc8fa0b24c13d6ea5fa061fd1267e818f8f58492a994"}
    assert sha256(tmp_path / "two.safetensors") in digests


def test_the_demo_set_is_the_one_that_was_pinned(demo_dir: Path) -> None:
    index = json.loads((demo_dir / "demo.json").read_text("utf-8"))["models"]
    digests = "".join(index[model.filename]["sha256"] for model in DEMO_MODELS)
    assert (
        hashlib.sha256(digests.encode()).hexdigest()
        == "ec9ef7b97fa2ad5ab4e9fea4c1340769860d333c82ac83a2ea828fcb573289fe"
    )


@pytest.mark.parametrize("tile", [7, 64, 4096])
def test_bytes_do_not_depend_on_the_tile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    whole = synthesize(tmp_path / "whole", TOY, MIXED, divisor=8)
    monkeypatch.setattr(values, "TILE", tile)
    assert synthesize(tmp_path / "tiled", TOY, MIXED, divisor=8) == whole


def test_a_tensor_does_not_depend_on_what_else_is_in_the_file(tmp_path: Path) -> None:
    synthesize(tmp_path / "whole", TOY, Variant(7))
    synthesize(tmp_path / "part", TOY, Variant(7, without=("te",)))
    whole, part = contents(tmp_path / "whole"), contents(tmp_path / "part")
    assert set(part) == {key for key in whole if key.startswith("net.")}
    assert all(whole[key] == data for key, data in part.items())


def test_another_seed_is_another_model(tmp_path: Path) -> None:
    one, two = (synthesize(tmp_path / "model", TOY, Variant(7), seed=seed) for seed in (1, 2))
    assert one != two


def test_fp16_is_fp32_rounded_once(tmp_path: Path) -> None:
    for dtype in (Dtype.F16, Dtype.F32):
        synthesize(tmp_path / dtype.code, TOY, Variant(7, dtype=dtype))
    narrow, wide = contents(tmp_path / "F16"), contents(tmp_path / "F32")
    for key in narrow.keys() - {"te.ids"}:
        assert np.frombuffer(wide[key], "<f4").astype("<f2").tobytes() == narrow[key]


def test_a_full_size_file_is_the_one_that_its_layout_promises(tmp_path: Path) -> None:
    synthesize(tmp_path / "model", TOY, Variant(7))
    layout = layout_of(TOY, Variant(7))
    assert header(tmp_path / "model").tensors == layout.tensors
    assert (tmp_path / "model").stat().st_size == layout.size


def test_a_model_larger_than_memory_could_be_made(tmp_path: Path) -> None:
    wide = architecture("wide", "fp16", {}, {"all": {"layers": {"a": [4096, 2048], "b": [2048, 2048]}}})
    tracemalloc.start()
    try:
        synthesize(tmp_path / "model", wide, Variant(7))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "model").stat().st_size > 25_000_000
    assert peak < 6_000_000


def test_a_key_without_a_shape_cannot_be_made() -> None:
    shapeless = architecture("vague", "fp16", {}, {"all": {"tensors": {"weight": None}}})
    with pytest.raises(ConfigError, match=r"^arch 'vague' gives no shape for 'weight'; choose one that does$"):
        layout_of(shapeless, Variant(1))

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save, save_file

from mergeflow.compare import run
from mergeflow.compare.result import OTHER, Comparison, Difference
from mergeflow.compare.run import compare, compare_pair, open_pair
from mergeflow.compare.statistics import Statistics
from mergeflow.errors import ConfigError, FormatError, MergeflowError, Problems, StorageError
from mergeflow.storage.local import LocalStore
from mergeflow.tensors import Dtype
from tests.fakes import CountingStore, Extent, MemoryStore, merged, overlaps
from tests.models import ANY, TOY, toy_model

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from mergeflow.recipe.architecture import Architecture

    Model = Mapping[str, Tensor]


def compared(directory: Path, a: Model, b: Model, arch: Architecture = ANY) -> Comparison:
    """Two models, written and compared."""
    directory.mkdir(exist_ok=True)
    paths = str(directory / "a.safetensors"), str(directory / "b.safetensors")
    for path, model in zip(paths, (a, b), strict=True):
        save_file(dict(model), path)
    return compare(*paths, arch)


def component(comparison: Comparison, name: str) -> Difference:
    return next(difference for difference in comparison.components if difference.component == name)


def timeless(comparison: Comparison) -> Comparison:
    return replace(comparison, seconds=0.0)


def large(seed: int = 1) -> dict[str, Tensor]:
    """Tensors of several reads each, small ones between them, and all the dtypes that there are."""
    generator = torch.Generator().manual_seed(seed)
    made = {f"large.{n}": torch.randn(1_500_001 + n, generator=generator) for n in range(2)}
    made |= {f"small.{n}": torch.randn(n, n, generator=generator).half() for n in range(20)}
    made["bytes"] = torch.randint(0, 255, (9, 9, 9), generator=generator, dtype=torch.uint8)
    made["wide"] = torch.randn(7, generator=generator, dtype=torch.float64)
    return made


# --- what is found --------------------------------------------------------------------------------------------------


def test_a_file_is_equal_to_its_copy(tmp_path: Path) -> None:
    found = compared(tmp_path, toy_model(1), toy_model(1), TOY)
    assert found.total.equal
    assert [difference.component for difference in found.components] == ["text", "vae", "net"]
    assert all(difference.equal for difference in found.components)
    assert found.total.statistics.elements == sum(tensor.numel() for tensor in toy_model(1).values())
    assert (found.total.statistics.cosine, found.total.statistics.relative_l2) == (1.0, 0.0)
    assert found.worst() == []


def test_every_component_is_told_by_itself(tmp_path: Path) -> None:
    other = toy_model(1)
    other["net.0.mix.weight"][3, 5] += 0.5
    other["net.5.mix.bias"] *= -1
    found = compared(tmp_path, toy_model(1), other, TOY)
    assert [part.component for part in found.components if not part.equal] == ["net"]
    net = component(found, "net").statistics
    assert (net.differing, net.nonfinite) == (17, 0)
    assert found.total.statistics.differing == 17
    assert net.largest is not None
    assert (net.largest.key, net.largest.element) == ("net.0.mix.weight", 3 * 16 + 5)
    assert [tensor.key for tensor in found.worst()] == ["net.5.mix.bias", "net.0.mix.weight"]
    assert found.worst()[0].statistics.relative_l2 == 2.0
    assert [tensor.key for tensor in found.worst(1)] == ["net.5.mix.bias"]


def test_tensors_that_only_one_file_has_are_listed_and_not_read(tmp_path: Path) -> None:
    one = {key: value for key, value in toy_model(1).items() if not key.startswith("vae.conv")}
    other = {key: value for key, value in toy_model(1).items() if not key.startswith("text.2")}
    found = compared(tmp_path, one | {"surplus": torch.ones(3)}, other, TOY)
    assert found.total.only_a == ("surplus", "text.2.proj.bias", "text.2.proj.weight")
    assert found.total.only_b == ("vae.conv.bias", "vae.conv.weight")
    assert component(found, "text").only_a == ("text.2.proj.bias", "text.2.proj.weight")
    assert component(found, "vae").only_b == found.total.only_b
    assert component(found, "vae").tensors == 1  # the one without elements
    assert component(found, OTHER).only_a == ("surplus",)
    assert component(found, "net").equal
    assert not found.total.equal
    assert found.total.statistics.differing == 0


def test_tensors_of_two_shapes_are_listed_and_not_compared(tmp_path: Path) -> None:
    found = compared(tmp_path, {"w": torch.ones(2, 3), "v": torch.ones(2)}, {"w": torch.ones(3, 2), "v": torch.ones(2)})
    assert [(match.key, match.a.shape, match.b.shape) for match in found.total.shapes] == [("w", (2, 3), (3, 2))]
    assert (found.total.tensors, found.bytes_read) == (1, 16)
    assert not found.total.equal


def test_dtypes_that_differ_are_listed_and_compared_by_value(tmp_path: Path) -> None:
    model = toy_model(1, torch.float32)
    half = {key: value.half() for key, value in model.items()}
    found = compared(tmp_path, model, half, TOY)
    assert len(found.total.dtypes) == len(model)
    assert found.total.statistics.differing > 0
    assert found.total.statistics.histogram[0] == found.total.statistics.elements  # 0 ULP of fp16 apart
    assert {tensor.unit for tensor in found.tensors} == {Dtype.F16}
    again = compared(tmp_path / "again", half, {key: value.float() for key, value in half.items()}, TOY)
    assert again.total.equal
    assert len(again.total.dtypes) == len(model)
    assert {(match.a.dtype, match.b.dtype) for match in again.total.dtypes} == {(Dtype.F16, Dtype.F32)}


def test_tensors_without_elements_or_dimensions_are_compared(tmp_path: Path) -> None:
    one = {"none": torch.empty(0, 4), "scalar": torch.tensor(1.0), "count": torch.tensor(7)}
    found = compared(tmp_path, one, one | {"scalar": torch.tensor(1.5)})
    assert (found.total.tensors, found.total.statistics.elements) == (3, 2)
    assert [tensor.key for tensor in found.worst()] == ["scalar"]
    assert found.total.statistics.relative_l2 == 0.5
    only = compared(tmp_path / "only", {"none": torch.empty(0)}, {"none": torch.empty(0)})
    assert only.total.equal
    assert (only.total.tensors, only.total.statistics) == (1, Statistics())


def test_complex_numbers_are_two_numbers_each(tmp_path: Path) -> None:
    one = torch.tensor([[1 + 2j, 3 + 4j]])
    found = compared(tmp_path, {"w": one}, {"w": torch.tensor([[1 + 2j, 3 - 4j]])})
    assert (found.total.statistics.elements, found.total.statistics.differing) == (4, 1)
    assert found.total.statistics.largest is not None
    assert found.total.statistics.largest[2:] == (3, 4.0, -4.0)
    pairs = compared(tmp_path / "pairs", {"w": one}, {"w": torch.view_as_real(one).contiguous()})
    assert pairs.total.equal
    assert len(pairs.total.dtypes) == 1
    assert len(compared(tmp_path / "real", {"w": one}, {"w": one.real.contiguous()}).total.shapes) == 1


def test_whole_numbers_count_but_have_no_part_in_lengths_beside_weights(tmp_path: Path) -> None:
    other = {key: value * 2 if key != "text.position_ids" else value.half() + 1 for key, value in toy_model(1).items()}
    found = compared(tmp_path, toy_model(1), other, TOY)
    text = component(found, "text").statistics
    assert text.differing == text.elements
    assert text.relative_l2 == pytest.approx(1.0, rel=1e-12)
    assert text.cosine == pytest.approx(1.0)
    alone = compared(tmp_path / "alone", {"ids": torch.tensor([3, 4])}, {"ids": torch.tensor([3, 9])})
    assert alone.total.statistics.relative_l2 == 1.0
    assert [tensor.unit for tensor in alone.tensors] == [None]


def test_tensors_with_nan_in_one_file_come_first(tmp_path: Path) -> None:
    other = toy_model(1)
    other["vae.conv.bias"][2] = torch.nan
    other["net.0.mix.weight"] *= 3
    found = compared(tmp_path, toy_model(1), other, TOY)
    assert [tensor.key for tensor in found.worst()] == ["vae.conv.bias", "net.0.mix.weight"]
    assert (found.total.statistics.nonfinite, component(found, "vae").statistics.differing) == (1, 1)


def test_files_without_a_common_tensor_are_not_divided_by_zero(tmp_path: Path) -> None:
    found = compared(tmp_path, {"v": torch.ones(3)}, {"w": torch.ones(3)})
    assert (found.total.tensors, found.bytes_read, found.total.statistics) == (0, 0, Statistics())
    assert not found.total.equal
    assert (found.worst(), found.blocks()) == ([], ())


# --- blocks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "blocks"),
    [
        (
            ["net.in.0.w", "net.in.1.0.w", "net.in.1.1.w", "net.mid.w", "net.out.0.w", "net.out.1.w"],
            [("in", 0, 1), ("in", 1, 2), ("out", 0, 1), ("out", 1, 1), ("", None, 1)],
        ),
        (["time.0.w", "time.2.w", "label.0.w"], [("", None, 3)]),
        (["embedders.1.model.layers.0.w", "embedders.1.model.layers.1.w"], [("layers", 0, 1), ("layers", 1, 1)]),
        ([f"layers.{n}.w" for n in (0, 1, 2, 10, 3, 4, 5, 6, 7, 8, 9)], [("layers", n, 1) for n in range(11)]),
        (["a.x.0.w", "a.x.1.w", "b.x.0.w", "b.x.1.w"], [("a.x", 0, 1), ("a.x", 1, 1), ("b.x", 0, 1), ("b.x", 1, 1)]),
        (["0.w", "1.w"], [("", None, 2)]),
        (["x.00.w", "x.1.w", "x.²"], [("", None, 3)]),
    ],
)
def test_tensors_are_grouped_by_the_numbers_in_their_names(
    tmp_path: Path, keys: list[str], blocks: list[tuple[str, int | None, int]]
) -> None:
    model = {key: torch.ones(1) for key in keys}
    found = compared(tmp_path, model, model).blocks()
    assert [(block.stage, block.number, block.statistics.elements) for block in found] == blocks
    assert {block.component for block in found} == {"all"}


def test_the_blocks_of_sdxl_are_those_that_people_know(tmp_path: Path, sdxl: Architecture) -> None:
    keys = sdxl.usual_keys
    model = {key: torch.zeros(1) for key in keys}
    found = compared(tmp_path, model, model, sdxl).blocks()
    stages = {(block.component, block.stage) for block in found}
    counts = {stage: sum((block.component, block.stage) == stage for block in found) for stage in stages}
    assert counts == {
        ("unet", "input_blocks"): 9,
        ("unet", "middle_block"): 3,
        ("unet", "output_blocks"): 9,
        ("unet", ""): 1,
        ("te0", "layers"): 12,
        ("te0", ""): 1,
        ("te1", "resblocks"): 32,
        ("te1", ""): 1,
        ("vae", "decoder.up"): 4,
        ("vae", "encoder.down"): 4,
        ("vae", ""): 1,
    }
    assert sum(block.statistics.elements for block in found) == len(keys)


# --- how it is read -------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """Two files that lie differently: other dtypes, other tensors between them."""
    one = large()
    other = {key: value.half() if key == "large.0" else value for key, value in large(2).items()}
    paths = (str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"))
    save_file(one, paths[0])
    save_file(other | {"large.2": torch.ones(99)}, paths[1])
    return paths


def test_the_result_does_not_depend_on_the_number_of_threads(files: tuple[str, str]) -> None:
    first = timeless(compare(*files, ANY, threads=1))
    assert first.total.statistics.differing > 3_000_000
    for threads in (2, 3, 7):
        assert timeless(compare(*files, ANY, threads=threads)) == first
    assert timeless(compare(*files, ANY)) == first


def test_each_byte_is_read_once_and_little_at_a_time(files: tuple[str, str]) -> None:
    store = CountingStore(LocalStore())
    pair = open_pair(*files, ANY, store)
    store.forget()
    found = compare_pair(pair, store, threads=3)
    for side, path in zip((pair.a, pair.b), files, strict=True):
        reads = store.reads(path)
        assert overlaps(reads) == []
        wanted = [info for key, info in side.header.tensors.items() if key != "large.2"]
        assert merged(reads) == merged(Extent(info.begin, info.end) for info in wanted)
        assert max(end - begin for begin, end in reads) <= run.LONGEST_READ
        assert max(info.end - info.begin for info in wanted) > run.LONGEST_READ / 2
    assert (
        found.bytes_read == pair.bytes_to_read == sum(end - begin for path in files for begin, end in store.reads(path))
    )


def test_how_it_is_cut_changes_no_count(files: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    first = compare(*files, ANY)
    monkeypatch.setattr(run, "LONGEST_READ", 4096)
    second = compare(*files, ANY)
    assert second.total.statistics.counts() == first.total.statistics.counts()
    assert second.total.statistics.l2 == pytest.approx(first.total.statistics.l2, rel=1e-14)


def test_progress_is_told_every_byte(files: tuple[str, str]) -> None:
    told: list[int] = []
    found = compare(*files, ANY, progress=told.append)
    assert len(told) > 1
    assert sum(told) == found.bytes_read


def test_torch_has_its_threads_back_afterwards(files: tuple[str, str]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        compare(*files, ANY)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("compare")]


# --- what cannot be compared ----------------------------------------------------------------------------------------


def test_both_files_problems_are_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "page.safetensors").write_text("<!DOCTYPE html>")
    with pytest.raises(Problems) as caught:
        compare(str(tmp_path / "page.safetensors"), str(tmp_path / "missing.safetensors"), ANY)
    assert [type(error) for error in caught.value.errors] == [FormatError, StorageError]
    assert "a: " in str(caught.value.errors[0])
    assert "page.safetensors cannot be used: it is" in str(caught.value)
    assert f"b: {tmp_path}/missing.safetensors does not exist" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "error", "said"),
    [
        (None, StorageError, "b: .* does not exist"),
        (b"", FormatError, r"b: .* it is empty"),
        (b"PK\x03\x04\x00\x00\x08\x08" + bytes(100), FormatError, "b: .* zip archive"),
        (save({"w": torch.ones(9)})[:-5], FormatError, "b: .* truncated"),
    ],
    ids=["missing", "empty", "zip", "truncated"],
)
def test_a_file_that_is_no_checkpoint_is_told_by_name(
    content: bytes | None, error: type[MergeflowError], said: str
) -> None:
    store = MemoryStore({"a": save({"w": torch.ones(9)})} | ({} if content is None else {"b": content}))
    with pytest.raises(error, match=said):
        compare("a", "b", ANY, store)


def test_a_file_that_changes_meanwhile_is_an_error() -> None:
    store = MemoryStore({name: save({"w": torch.ones(9)}) for name in "ab"})
    with pytest.raises(StorageError, match=r"b: b was changed while it was being read: it has .*; compare again"):
        compare("a", "b", ANY, store, progress=lambda _: store.put("b", save({"w": torch.zeros(9)})))


def test_a_read_that_fails_ends_it(files: tuple[str, str]) -> None:
    store = MemoryStore({name: save({f"{n}.w": torch.ones(999) for n in range(9)}) for name in "ab"})
    pair = open_pair("a", "b", ANY, store)
    store.put("b", b"short")
    before = torch.get_num_threads()
    with pytest.raises(StorageError, match="b ends at byte"):
        compare_pair(pair, store, threads=2)
    assert torch.get_num_threads() == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("compare")]


def test_it_stops_when_it_is_interrupted(files: tuple[str, str]) -> None:
    def interrupt(count: int) -> None:
        raise KeyboardInterrupt

    store = CountingStore(LocalStore())
    with pytest.raises(KeyboardInterrupt):
        compare(*files, ANY, store, progress=interrupt, threads=1)
    assert sum(end - begin for begin, end in store.reads(files[0])) < 3 * run.BATCH
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("compare")]


def test_no_threads_are_refused(files: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match="threads=0"):
        compare(*files, ANY, threads=0)

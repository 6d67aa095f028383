from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import synthetic
from benchmarks.bookkeeping import tiny
from benchmarks.place import need
from mergeflow.errors import ConfigError, StorageError
from mergeflow.tensors import Dtype

if TYPE_CHECKING:
    from pathlib import Path


def test_a_full_size_model_is_an_sdxl_checkpoint() -> None:
    full = synthetic.sdxl(1)
    assert len(full.tensors) == 2515
    assert 6.9e9 < full.size < 7.0e9


def test_half_the_width_is_a_quarter_of_the_bytes() -> None:
    assert 0.24 < synthetic.sdxl(0.25).size / synthetic.sdxl(0.5).size < 0.26


@pytest.mark.parametrize("scale", [0, -1, 0.3, 2, 1 / 64])
def test_widths_that_are_no_whole_numbers_are_refused(scale: float) -> None:
    with pytest.raises(ConfigError, match=f"--scale {scale:g} is not 1, 0.5"):
        synthetic.sdxl(scale)


def test_models_agree_in_whole_numbers_and_differ_in_weights(tmp_path: Path) -> None:
    like = synthetic.layout([("weight", Dtype.F16, (300, 8)), ("position_ids", Dtype.I64, (1, 77))])
    one, two = (load_file(path) for path in synthetic.models(tmp_path, 2, like))
    assert torch.equal(one["position_ids"], torch.arange(77).reshape(1, 77))
    assert torch.equal(one["position_ids"], two["position_ids"])
    assert not torch.equal(one["weight"], two["weight"])
    assert one["weight"].isfinite().all()
    assert 0.02 < one["weight"].float().std() < 0.04


def test_a_model_with_a_hole_has_its_size_and_ends_in_zeros(tmp_path: Path) -> None:
    like = synthetic.layout([("weight", Dtype.F16, (5000,))])
    (path,) = synthetic.models(tmp_path, 1, like, filled=4000)
    weight = load_file(path)["weight"]
    assert path.stat().st_size == like.size
    assert weight[:2000].count_nonzero() > 1900
    assert not weight[2000:].any()


def test_models_that_are_there_are_left_alone_and_others_are_replaced(tmp_path: Path) -> None:
    like = synthetic.layout([("weight", Dtype.F16, (64,))])
    first, second = synthetic.models(tmp_path, 2, like)
    before = first.stat().st_mtime_ns
    second.write_bytes(b"something else")
    synthetic.models(tmp_path, 2, like)
    assert first.stat().st_mtime_ns == before
    assert second.stat().st_size == like.size


def test_models_of_the_bookkeeping_have_the_same_keys_and_headers_of_their_own() -> None:
    one, two = tiny(1), tiny(2)
    assert list(one.tensors) == list(two.tensors)
    assert len(one.tensors) == 2515
    assert one.head != two.head


def test_what_would_not_fit_is_refused_before_it_is_made(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"5 synthetic models need 1,000\.00 TB .* smaller --scale"):
        need(tmp_path, 10**15, "5 synthetic models")

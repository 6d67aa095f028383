"""The lists of later rounds, which people really use."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mergeflow.config.convert import to_config, to_request
from mergeflow.demo import demo_models
from mergeflow.errors import ConfigError
from mergeflow.recipe.resolve import resolve
from mergeflow.recipe.selection import parse_selection

if TYPE_CHECKING:
    from tests.config.conftest import Compose

COUNTS = {
    ("round1", 44): (14, 21, 32),
    ("round2", 50): (22, 31, 44),
    ("round2", 70): (22, 31, 44),
    ("round4", 70): (61, 42, 52),
}


@pytest.mark.parametrize(("round", "count"), COUNTS, ids=str)
def test_the_lists_of_a_round_select_what_they_say(round: str, count: int, compose: Compose) -> None:
    request = to_request(to_config(compose(f"selection={round}", "target=x17", "models=demo70")))
    recipe = resolve(request, [f"/demo/{model.filename}" for model in demo_models(count)])
    parts = {part.component: part for part in recipe.targets[0].parts}
    assert tuple(len(parts[name].entries) for name in ("te0", "te1", "unet")) == COUNTS[round, count]


def test_the_larger_demo_set_has_a_folder_of_its_own(compose: Compose) -> None:
    config = to_config(compose("models=demo70"))
    assert (config.models.demo, config.models.count, config.models.dir) == (True, 70, "demo70")
    assert to_config(compose()).models.count == 44


def test_a_size_without_a_demo_set_has_no_effect_and_is_refused(compose: Compose) -> None:
    config = to_config(compose("models=folder", "models.dir=/data", "models.count=50"))
    with pytest.raises(ConfigError) as caught:
        to_request(config)
    assert str(caught.value) == "models.count is the size of the demo set; with other models it has no effect"


def test_switches_in_a_config_select_models(compose: Compose) -> None:
    request = to_request(to_config(compose("experiment=select_by_score", "selection.models.8=false")))
    models = resolve(request, [f"/demo/{model.filename}" for model in demo_models(44)]).models
    assert parse_selection("models", request.selections["models"], models) == ("02", "04", "07", "11")

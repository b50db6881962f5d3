"""A prompt unlike all known ones runs the full plan, one at a time, in a batch and offline, also after saving."""

from dataclasses import replace

import numpy as np
import pytest
from tiny import padded_batch, tiny_model
from tiny_allocator import SETS, make_allocator, resigned

from backbone.errors import ArtefactError
from controller.certificate.outliers import OutlierTest
from controller.features import prompt_features, rows_of
from runtime.allocator import Allocator


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def knowing(model, rows: list[int], threshold: float = 0.05) -> OutlierTest:
    """A test whose references are some prompts of `padded_batch`."""
    batch = padded_batch()
    features = prompt_features(model, batch["input_ids"], batch["attention_mask"], 2, SETS)
    known = rows_of(features, np.array(rows))
    return replace(OutlierTest.fit(known, known, ("states",), 0.05), threshold=threshold)


def test_only_the_prompt_that_is_unlike_the_others_is_sent_to_the_full_plan(model, tmp_path) -> None:
    allocator, batch = make_allocator(model), padded_batch()
    before = allocator.allocate(model, **batch)
    strange = next(place for place, plan in enumerate(before) if not plan.is_full)
    known = [place for place in range(len(before)) if place != strange]
    watching = replace(allocator, outliers=knowing(model, known))
    watching.save_pretrained(tmp_path)
    for one in (watching, Allocator.from_pretrained(tmp_path)):
        after = one.allocate(model, **batch)
        assert after[strange].is_full
        assert [after[place] for place in known] == [before[place] for place in known]
        alone = {name: values[strange : strange + 1] for name, values in batch.items()}
        assert one.allocate(model, **alone)[0].is_full
    everything = replace(allocator, outliers=knowing(model, list(range(len(before)))))
    assert everything.allocate(model, **batch) == before


def test_a_test_of_features_that_the_controller_does_not_read_is_refused(model, tmp_path) -> None:
    allocator, batch = make_allocator(model), padded_batch()
    features = prompt_features(model, batch["input_ids"], batch["attention_mask"], 2, ("embedding",))
    other = OutlierTest.fit(features, features, ("embedding",), 0.05)
    replace(allocator, outliers=other).save_pretrained(tmp_path)
    resigned(tmp_path)
    with pytest.raises(ArtefactError, match="its outlier test reads embedding, its controller states, path, length"):
        Allocator.from_pretrained(tmp_path)

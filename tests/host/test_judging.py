"""Concept Learner keeps states, draws them and proposes one; the last state is as without."""

from __future__ import annotations

import pytest
import torch

from continual_concepts.core.errors import ConceptError

pytestmark = pytest.mark.usefixtures("as_in_comfyui", "own_folder", "short_previews")


@pytest.fixture
def vision(comfyui):
    from continual_concepts.core.comfy.demo import DemoVision

    return DemoVision()


def test_states_are_judged_and_the_last_one_is_as_without(studio, pack, vision):
    given = {"name": "rex", "method": "slots", "steps": 4, "clip_vision": vision}
    judging = pack.ConceptJudgeSettings.execute(states=2, sample_prompts="<rex> on a boat\n\n", samples=2)[0]
    output = studio.learner(**given, judging=[judging])
    plain = studio.learner(**given)
    assert output[0]["rex"].digest() == plain[0]["rex"].digest()
    assert plain[4] is plain[0] and output[4].names == ["rex"]
    assert output[4].infos["rex"].provenance.steps in (2, 4) and output[4]["rex"].thumbnail
    assert output[5].ndim == 4 and output[5].shape[1] > plain[5].shape[1] and torch.isfinite(output[5]).all()
    text = output.ui["text"][0] if hasattr(output, "ui") else ""
    assert "step 2: likeness" in text and "proposed" in text and "sample prompts: <rex> on a boat" in text


@pytest.mark.parametrize(("given", "sentence"), [
    ({"sample_prompts": "a dog"}, "the sample prompt 'a dog' does not name the concept; write <rex>"),
    ({"sample_prompts": "<rex>\n" * 9}, "there are 9 sample prompts; allowed: up to 8"),
])
def test_wrong_prompts_are_named(studio, pack, vision, given, sentence):
    with pytest.raises(ConceptError, match=sentence):
        judging = pack.ConceptJudgeSettings.execute(**{"states": 2, "samples": 2} | given)
        studio.learner(name="rex", judging=[judging[0]], clip_vision=vision)


def test_a_preset_for_other_programs_learns_a_plain_lora(studio):
    given = {"name": "rex", "preset": "object", "effort": "quick", "training_settings": [{"steps": 2}]}
    info = studio.learner(**given, readable_by="other programs")[0].infos["rex"]
    assert info.method == "lora" and info.provenance.settings["method"]["layerwise"] is False
    assert studio.learner(**given)[0].infos["rex"].method == "slots"
    with pytest.raises(ConceptError, match="'readable by' is 'nobody'; allowed: this pack, other programs"):
        studio.learner(**given, readable_by="nobody")

"""Concept Learner adds photos to a concept of the bank."""

from __future__ import annotations

import pytest
import torch

from continual_concepts.core.errors import ConceptError

pytestmark = pytest.mark.usefixtures("as_in_comfyui", "own_folder")


@pytest.fixture
def stop_at(monkeypatch, pack):
    """stop_at(step): the next runs are cancelled after that step; returns the steps they did."""
    import comfy.model_management

    from continual_concepts.nodes import progress

    before, seen = progress.Reporter.__call__, []

    def arrange(step: int) -> list[int]:
        def report(self, info):
            seen.append(info.step)
            if info.step == step:
                comfy.model_management.interrupt_current_processing()
            before(self, info)

        monkeypatch.setattr(progress.Reporter, "__call__", report)
        return seen

    yield arrange
    comfy.model_management.interrupt_current_processing(False)


def test_new_photos_are_added_to_a_concept(studio, stop_at):
    """It keeps its place, the other concept stays, and the same graph run again changes nothing."""
    both = studio.learn(name="tom", noun="cat", bank=[studio.learn()])
    new = {"images": 1 - studio.photos(), "if_known": "refine it", "training_settings": [{"replay": 2}]}
    refined = studio.learn(bank=[both], **new)
    before, after = both.infos["spot"].provenance, refined.infos["spot"].provenance
    assert refined.names == ["spot", "tom"] and refined["tom"] is both["tom"]
    assert len(after.images) == 4 and after.images[:2] == before.images
    assert [(run["date"], run["steps"]) for run in after.refined] == [(before.date, 3)]
    assert not all(torch.equal(delta.up, both["spot"].deltas[key].up)
                   for key, delta in refined["spot"].deltas.items())
    steps = stop_at(-1)
    assert studio.learn(bank=[refined], **new) is refined and steps == []


def test_a_cancelled_refinement_goes_on_exactly(studio, tmp_path, stop_at):
    import comfy.model_management as management

    known = studio.learn()
    new = {"bank": [known], "images": 1 - studio.photos(), "if_known": "refine it", "steps": 4,
           "training_settings": [{"replay": 1}]}
    whole = studio.learn(**new)["spot"]
    for file in (tmp_path / "concept_banks" / ".unfinished").iterdir():
        file.unlink()
    steps = stop_at(2)
    with pytest.raises(management.InterruptProcessingException):
        studio.learn(**new)
    stop_at(-1)
    resumed = studio.learn(**new)["spot"]
    assert steps == [1, 2, 3, 4]
    assert all(torch.equal(delta.up, whole.deltas[key].up) for key, delta in resumed.deltas.items())


def test_a_variant_starts_from_another_concept(studio, pack):
    """The class noun may be empty, as for a refined concept; the parent stays."""
    given, replay = {"name": "rex", "method": "slots"}, [{"replay": 2}]
    bank = studio.learn(**given)
    grown = studio.learn(**given | {"name": "rex-winter", "noun": "", "bank": [bank], "variant_of": "<rex>"})
    assert grown.names == ["rex", "rex-winter"] and grown["rex"] is bank["rex"]
    info = grown.infos["rex-winter"]
    assert (info.class_noun, info.provenance.variant_of) == ("dog", "rex")
    for wrong, sentence in (({"variant_of": "max"}, "the bank holds no concept 'max' that could have a"),
                            ({"variant_of": "rex", "if_known": "refine it"}, "'variant of' is 'rex', whic")):
        with pytest.raises(ConceptError, match=sentence):
            studio.learn(**given | {"name": "rex-winter", "bank": [bank]} | wrong)
    assert pack.ConceptLearner.validate_inputs(["rex-winter"], [""], ["keep it"], ["rex"]) is True
    refined = studio.learn(**given | {"noun": "", "bank": [bank], "if_known": "refine it",
                                      "images": 1 - studio.photos(), "training_settings": replay})
    assert refined.infos["rex"].class_noun == "dog"


def test_a_save_keeps_an_unfinished_run_that_learns_a_concept_again(studio, tmp_path, stop_at):
    """Same photos, other settings: it was taken for the run of the concept in the bank."""
    import comfy.model_management as management

    save, unfinished = studio.pack.ConceptBankSave.execute, tmp_path / "concept_banks" / ".unfinished"

    def again():
        return studio.learn(seed=2, bank=[first], if_known="learn it again")

    first = studio.learn(seed=1)
    save(first, "pets", False)
    assert not list(unfinished.glob("*.checkpoint"))      # its own run is finished
    stop_at(1)
    with pytest.raises(management.InterruptProcessingException):
        again()
    stop_at(-1)
    both = studio.learn(name="tom", noun="cat", bank=[first])
    save(both, "pets", False)
    assert len(list(unfinished.glob("spot*.checkpoint"))) == 1
    save(again().merge(both.remove("spot")), "pets", False)
    assert not list(unfinished.glob("spot*.checkpoint"))


def test_a_save_deletes_all_finished_runs_of_a_concept(studio, tmp_path):
    """A person tries some seeds and saves the last one."""
    unfinished = tmp_path / "concept_banks" / ".unfinished"
    banks = [studio.learn(seed=seed) for seed in (1, 2, 3)]
    assert len(list(unfinished.glob("*.checkpoint"))) == 3
    studio.pack.ConceptBankSave.execute(banks[-1], "pets", False)
    assert not list(unfinished.glob("*.checkpoint"))

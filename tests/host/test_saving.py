"""Whether a bank can be saved is asked before it is learned; what a file loses is said."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from continual_concepts.core.errors import ConceptError

pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.fixture
def graph(studio, monkeypatch):
    """Sets what runs: a learner '7' whose bank goes to Save Concept Bank with these inputs."""
    def run(**inputs):
        save = {"class_type": "ConceptBankSave", "inputs": {"bank": ["7", 0], **inputs}}
        learner = {"class_type": "ConceptLearner", "inputs": {}}
        hidden = SimpleNamespace(unique_id="7", prompt={"7": learner, "9": save}, extra_pnginfo=None)
        monkeypatch.setattr(studio.pack.ConceptLearner, "hidden", hidden, raising=False)

    return run


def test_a_bank_that_cannot_be_saved_is_not_learned(studio, graph, monkeypatch):
    """It was said after the learning, which takes an hour on a slow machine."""
    studio.pack.ConceptBankSave.execute(studio.bank, "pets", False)
    other = studio.learner(name="tom").args[0]
    graph(bank_name="pets", allow_fewer=False)
    with pytest.raises(ConceptError, match=r"nothing was learned: 'pets.safetensors' holds <rex>.*04 Add"):
        studio.learner(steps=10**6)
    assert "spot" in studio.learner(bank=[studio.bank]).args[0].names      # joined with the file's concepts
    merge = "join that file and the bank at the input 'bank' with Merge"
    with pytest.raises(ConceptError, match=merge):
        studio.learner(bank=[other], steps=10**6)
    with pytest.raises(ConceptError, match=merge):
        studio.learner(name="tom", bank=[other], if_known="learn it again", steps=10**6)
    known = studio.learner(name="tom", bank=[other]).args[0]      # nothing is learned, so pictures are drawn
    assert known.names == ["tom"]
    renamed = studio.bank.rename("rex", "bello")      # the save renames it in the file
    assert {"bello", "spot"} < set(studio.learner(bank=[renamed]).args[0].names)
    with pytest.raises(ConceptError, match="holds <rex>; "):      # what is learned again is another concept
        studio.learner(name="bello", bank=[renamed], if_known="learn it again", steps=10**6)


@pytest.mark.parametrize("inputs", [
    {"bank_name": "pets", "allow_fewer": True}, {"bank_name": "others", "allow_fewer": False},
    {"bank_name": ["3", 0], "allow_fewer": False}, {"bank_name": "pets", "allow_fewer": ["3", 0]},
    {"bank": ["8", 0], "bank_name": "pets", "allow_fewer": False}])
def test_what_can_be_saved_or_is_not_known_yet_is_learned(studio, graph, inputs):
    studio.pack.ConceptBankSave.execute(studio.bank, "pets", False)
    graph(**inputs)
    assert studio.learner().args[0].names == ["spot"]


def _graph(**savers):
    """Two learners in a row, 7 and 8, and nodes Save Concept Bank with these links."""
    learners = {"7": {"bank": ["3", 0], "name": "rex"}, "8": {"bank": ["7", 0], "name": "<tom>"}}
    return {**{node: {"class_type": "ConceptLearner", "inputs": inputs} for node, inputs in learners.items()},
            **{node: {"class_type": "ConceptBankSave",
                      "inputs": {"bank": link, "bank_name": "pets", "allow_fewer": False}}
               for node, link in savers.items()}}


@pytest.mark.parametrize("link, is_checked", [(["7", 0], True), (["7", 4], True), (["8", 0], True),
                                              (["7", 1], False), (["9", 0], False), ([], False)])
def test_learners_in_a_row_and_proposed_banks_are_checked(studio, link, is_checked):
    from continual_concepts.nodes.saving import check_saving

    studio.pack.ConceptBankSave.execute(studio.bank, "pets", False)
    held = [name for name in studio.bank.names if name != "mimi"]
    if is_checked:
        with pytest.raises(ConceptError, match=r"'pets.safetensors' holds <mimi>;"):
            check_saving(_graph(s=link), "7", None, held)
    else:
        check_saving(_graph(s=link), "7", None, held)
    check_saving(_graph(s=link), "7", None, [*held, "mimi"])


def test_what_a_further_learner_adds_is_not_lacking(studio):
    from continual_concepts.nodes.saving import check_saving

    studio.pack.ConceptBankSave.execute(studio.learner(name="tom").args[0], "pets", False)
    check_saving(_graph(s=["8", 0]), "7", None, ["rex"])
    with pytest.raises(ConceptError, match="holds <tom>"):
        check_saving(_graph(s=["7", 0]), "7", None, ["rex"])


@pytest.mark.parametrize("outputs, is_checked", [(["s"], True), (["other"], False)])
def test_a_node_that_does_not_run_is_not_checked(studio, monkeypatch, outputs, is_checked):
    from continual_concepts.nodes import saving

    studio.pack.ConceptBankSave.execute(studio.bank, "pets", False)
    monkeypatch.setattr(saving, "running_item", lambda: (0, "id", {}, {}, outputs))
    try:
        saving.check_saving(_graph(s=["7", 0]), "7", None, ["rex"])
        assert not is_checked
    except ConceptError:
        assert is_checked


def test_a_damaged_file_is_told_before_learning(studio, graph, own_folder):
    studio.pack.ConceptBankSave.execute(studio.bank, "pets", False)
    file = own_folder / "concept_banks" / "pets.safetensors"
    file.write_bytes(file.read_bytes()[:900])
    graph(bank_name="pets", allow_fewer=True)
    with pytest.raises(ConceptError, match="nothing was learned: .*pets"):
        studio.learner(steps=10**6)


@pytest.mark.parametrize("prompt", [None, [], {"9": None}, {"9": {"class_type": "ConceptBankSave"}},
                                    {"9": {"class_type": "ConceptBankSave", "inputs": [1]}}])
def test_a_graph_of_another_form_is_not_checked(pack, prompt):
    """Programs send what they like."""
    from continual_concepts.nodes.saving import check_saving

    check_saving(prompt, "7", None, ["rex"])


def test_a_concept_that_is_replaced_in_a_file_is_told(studio):
    def saved(bank):
        return studio.pack.ConceptBankSave.execute(bank, "pets", False).ui["text"][0]

    first = studio.learner(seed=1).args[0]
    assert "replaced" not in saved(first) and "replaced" not in saved(first)
    both = studio.learner(name="tom", noun="cat", bank=[first]).args[0]
    assert "replaced" not in saved(both)
    again = studio.learner(seed=2, bank=[both], if_known="learn it again").args[0]
    assert "replaced: <spot>; the earlier file is kept as a version" in saved(again)


def test_an_imported_concept_with_other_weights_is_told(studio, make_concept):
    """Files have no date of learning; one name may have had other weights."""
    from continual_concepts.core.bank.bank import ConceptBank
    from continual_concepts.core.bank.concepts import Provenance

    def saved(seed):
        concept = make_concept(studio.bank.layout, "ana", seed=seed)
        origin = Provenance(settings={"files": ["ana.safetensors"]})
        concept = replace(concept, info=replace(concept.info, provenance=origin))
        bank = ConceptBank(studio.bank.layout).add(concept)
        return studio.pack.ConceptBankSave.execute(bank, "people", False).ui["text"][0]

    assert "replaced" not in saved(1) and "replaced" not in saved(1)
    assert "replaced: <ana>" in saved(2)


def test_a_damaged_concept_of_the_file_does_not_end_a_save(studio, make_concept, own_folder):
    """Its tensors were read to tell whether it is replaced, and what had been learned could not be saved."""
    from continual_concepts.core.bank.bank import ConceptBank
    from continual_concepts.core.bank.concepts import Provenance

    concept = make_concept(studio.bank.layout, "ana")
    imported = replace(concept, info=replace(concept.info, provenance=Provenance(settings={"files": ["a"]})))
    bank = ConceptBank(studio.bank.layout).add(imported)
    save, file = studio.pack.ConceptBankSave.execute, own_folder / "concept_banks" / "people.safetensors"
    for new in (bank, bank.rename("ana", "eva")):
        save(bank, "people", True)
        data = file.read_bytes()
        file.write_bytes(data[:-40] + b"\xff" * 40)      # NaN
        assert new.names[0] in save(new, "people", True).ui["text"][0]
        file.unlink()


def test_another_noun_of_an_imported_concept_is_told(studio, make_concept):
    from continual_concepts.core.bank.bank import ConceptBank

    def saved(noun):
        concept = make_concept(studio.bank.layout, "pot")
        concept = replace(concept, info=replace(concept.info, class_noun=noun))
        bank = ConceptBank(studio.bank.layout).add(concept)
        return studio.pack.ConceptBankSave.execute(bank, "things", False).ui["text"][0]

    assert "replaced" not in saved("drawing") and "replaced" not in saved("drawing")
    assert "replaced: <pot>" in saved("teapot")


def test_a_renamed_concept_is_renamed_in_the_file(studio):
    """It was refused as a loss, with the advice to merge, which would have brought the old name back."""
    pack = studio.pack
    pack.ConceptBankSave.execute(studio.bank, "pets", False)
    edited = pack.ConceptBankEdit.execute(studio.bank, "rename", "rex", "bello").args[0]
    text = pack.ConceptBankSave.execute(edited, "pets", False).ui["text"][0]
    assert "renamed: <rex> is <bello> now" in text and "replaced" not in text
    again = pack.ConceptBankEdit.execute(edited, "rename", "rex", "bello")      # the graph runs again
    assert again.args[0] is edited and "nothing to rename" in again.ui["text"][0]
    with pytest.raises(ConceptError, match="lacks"):
        pack.ConceptBankSave.execute(edited.remove("bello"), "pets", False)
    with pytest.raises(ConceptError, match="'rexx'"):
        pack.ConceptBankEdit.execute(edited, "rename", "rexx", "tom")


def test_only_the_same_concept_counts_as_renamed(studio, make_concept):
    """Each new name stands for one old one, and other nouns are other concepts. A name that the file has is
    not a new one: where names move on, a removed concept would be lost."""
    from continual_concepts.core.bank.bank import ConceptBank, renamed_in

    def bank_of(*pairs):
        bank = ConceptBank(studio.bank.layout)
        for name, seed, noun in pairs:
            made = make_concept(bank.layout, "x", seed=seed)
            origin = replace(made.info.provenance, date=f"2025-01-0{seed}")
            info = replace(made.info, class_noun=noun, provenance=origin)
            bank = bank.add(replace(made, info=info).renamed(name))
        return bank

    one = bank_of(("bello", 1, "dog"))
    assert renamed_in(one, bank_of(("rex", 1, "dog"))) == {"rex": "bello"}
    assert renamed_in(one, bank_of(("rex", 1, "dog"), ("copy", 1, "dog"))) == {"rex": "bello"}
    assert renamed_in(one, bank_of(("rex", 1, "cat"))) == {}
    assert renamed_in(one, bank_of(("rex", 2, "dog"))) == {}
    stored = bank_of(("rex", 1, "dog"), ("mimi", 2, "dog"))
    assert renamed_in(bank_of(("rex", 2, "dog")), stored) == {}
    three = bank_of(("rex", 1, "dog"), ("mimi", 2, "dog"), ("tom", 3, "dog"))
    assert renamed_in(bank_of(("rex", 2, "dog"), ("mimi", 3, "dog")), three) == {}
    alike = renamed_in(bank_of(("a", 1, "dog"), ("b", 1, "dog")), bank_of(("x", 1, "dog"), ("y", 1, "dog")))
    assert alike == {"x": "a", "y": "b"}


@pytest.mark.parametrize("if_known, is_refused", [("keep it", False), ("learn it again", True)])
def test_a_further_learner_that_learns_a_renamed_concept_again(studio, if_known, is_refused):
    from continual_concepts.nodes.saving import check_saving

    studio.pack.ConceptBankSave.execute(studio.bank, "pets", False)
    graph = _graph(s=["8", 0])
    graph["8"]["inputs"] |= {"name": "bello", "if_known": if_known}
    bank = studio.bank.rename("rex", "bello")
    if is_refused:
        with pytest.raises(ConceptError, match="holds <rex>; join"):
            check_saving(graph, "7", bank, ["spot"])
    else:
        check_saving(graph, "7", bank, ["spot"])


def test_an_input_that_another_node_gives_is_not_known_yet(studio):
    from continual_concepts.nodes.saving import check_saving

    studio.pack.ConceptBankSave.execute(studio.bank, "pets", False)
    graph, renamed = _graph(s=["8", 0]), studio.bank.rename("rex", "bello")
    graph["8"]["inputs"] |= {"name": "bello", "if_known": ["4", 0]}      # perhaps it keeps it
    check_saving(graph, "7", renamed, ["spot"])
    with pytest.raises(ConceptError, match="holds <mimi>"):      # lost in any case
        check_saving(graph, "7", renamed.remove("mimi"), ["spot"])
    graph["8"]["inputs"]["name"] = ["4", 0]
    check_saving(graph, "7", renamed.remove("mimi"), ["spot"])


@pytest.mark.parametrize("if_known", ["keep it", "learn it again"])
def test_only_what_is_learned_again_may_be_damaged(studio, own_folder, if_known):
    from continual_concepts.core.bank.format import open_bank
    from continual_concepts.nodes.saving import check_saving

    file = own_folder / "concept_banks" / "pets.safetensors"
    studio.pack.ConceptBankSave.execute(studio.learner(name="tom").args[0], "pets", False)
    file.write_bytes(file.read_bytes()[:-40] + b"\xff" * 40)
    graph = _graph(s=["8", 0])
    graph["8"]["inputs"]["if_known"] = if_known
    check_saving(graph, "7", open_bank(file), ["tom"])      # the first one learns it again
    if if_known == "keep it":
        with pytest.raises(ConceptError, match="tom.* if it is damaged, remove"):
            check_saving(graph, "7", open_bank(file), ["rex"])
    else:
        check_saving(graph, "7", open_bank(file), ["rex"])


def test_a_bank_that_no_file_could_take_is_told_before_learning(studio, graph, own_folder):
    """It was learned to the end, and then no bank_name could save it."""
    from continual_concepts.core.bank.format import open_bank

    file = own_folder / "concept_banks" / "pets.safetensors"
    studio.pack.ConceptBankSave.execute(studio.learner().args[0], "pets", False)
    file.write_bytes(file.read_bytes()[:-40] + b"\xff" * 40)
    for name in ("pets", "others"):
        graph(bank_name=name, allow_fewer=False)
        with pytest.raises(ConceptError, match="nothing was learned: .*spot.*if it is damaged, remove this"):
            studio.learner(name="tom", bank=[open_bank(file)], steps=10**6)
    learned = studio.learner(name="tom", bank=[open_bank(file).remove("spot")]).args[0]
    studio.pack.ConceptBankSave.execute(learned, "others", False)


def test_a_bank_of_another_base_is_not_to_be_merged(studio, graph, make_layout, make_concept):
    """No merge can join them."""
    from continual_concepts.core.bank.bank import ConceptBank

    layout = make_layout(studio.bank.layout)
    studio.pack.ConceptBankSave.execute(ConceptBank(layout).add(make_concept(layout, "ana")), "pets", False)
    with pytest.raises(ConceptError, match="holds <ana>, which .* lacks; its base is another one; choose"):
        studio.pack.ConceptBankSave.execute(studio.bank, "pets", False)
    graph(bank_name="pets", allow_fewer=False)
    with pytest.raises(ConceptError, match="holds <ana>; its base is another one; choose another bank_name"):
        studio.learner(bank=[studio.bank], steps=10**6)


@pytest.fixture
def make_layout():
    """A layout of another kind of base."""
    return lambda layout: replace(layout, sites=layout.sites[:-1])


def test_what_is_removed_from_a_file_is_told(studio):
    save = studio.pack.ConceptBankSave.execute
    save(studio.bank, "pets", False)
    told = save(studio.bank.remove("rex").rename("mimi", "tom"), "pets", True).ui["text"][0]
    assert "removed: <rex>; the earlier file is kept" in told and "renamed: <mimi> is <tom>" in told


def test_a_graph_that_ran_before_has_nothing_left_to_do(studio):
    """Its bank was saved, and Load Concept Bank gives it again."""
    pack = studio.pack
    once = pack.ConceptBankEdit.execute(studio.bank, "remove", "rex").args[0]
    twice = pack.ConceptBankEdit.execute(once, "remove", "rex")
    assert twice.args[0] is once
    assert twice.ui["text"][0].startswith("nothing to remove: the bank holds no <rex>; it holds <mimi>")
    other = studio.learner(name="tom").args[0]
    merged = pack.ConceptBankMerge.execute(studio.bank, other).args[0]
    assert pack.ConceptBankMerge.execute(merged, other).args[0].names == merged.names
    again = studio.learner(name="tom", seed=5).args[0]
    with pytest.raises(ConceptError, match="both banks hold 'tom'"):
        pack.ConceptBankMerge.execute(merged, again)

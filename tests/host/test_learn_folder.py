"""The node that learns a folder of concepts: one bank and one report, and an exact resume after a cancel."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
from PIL import Image

from continual_concepts.core.demo import scenes
from continual_concepts.core.errors import ConceptError

pytestmark = pytest.mark.usefixtures("as_in_comfyui", "own_folder", "short_previews")
GIVEN = {"preset": "object", "effort": "quick", "steps": 3, "seed": 0, "preview_every": 2,
         "if_known": "keep it", "find_subject": False, "caption_templates": False,
         "training_settings": {"batch_size": 1}}


@pytest.fixture
def cast(pack):
    """Photos of two things and a style inside ComfyUI's input folder."""
    folder = pack.folder / "input" / "cast"
    for path, name in (("rex dog", "rex"), ("5_mimi tabby cat", "mimi"), ("chalk drawing", "chalk")):
        (folder / path).mkdir(parents=True)
        Image.fromarray(scenes.CONCEPTS[name].pictures(1, seed=1)[0][0]).save(folder / path / "0.png")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def learn(pack, studio, cast):
    def run(**given):
        base = {"model": studio.model, "clip": studio.clip, "vae": studio.vae}
        return pack.ConceptFolderLearner.execute(folder="cast", **base, **GIVEN | given)

    return run


def contents(bank) -> list:
    return [(concept.name, concept.digest(), concept.thumbnail) for concept in bank]


def test_a_folder_becomes_a_bank_with_one_report(learn, cast):
    (cast / "loose.txt").write_text("nothing")
    bank, cards, report = learn().args
    assert bank.names == ["mimi", "chalk", "rex"] and bank.infos["mimi"].class_noun == "tabby cat"
    assert cards.ndim == 4 and cards.shape[-1] == 3
    assert report.startswith("the bank holds 3 concepts; 3 were learned now, 0 were there already")
    assert "'loose.txt' is not used" in report and "<chalk>  drawing, object, slots" in report
    again, _, report = learn(bank=bank).args
    assert contents(again) == contents(bank)
    assert report.startswith("the bank holds 3 concepts; 0 were learned now, 3 were there already")


def test_it_says_before_it_learns_what_could_not_be_saved(learn, studio, pack, monkeypatch):
    bank = learn().args[0]
    pack.ConceptBankSave.execute(studio.bank, "pets", False)
    graph = {"7": {"class_type": "ConceptFolderLearner", "inputs": {}},
             "9": {"class_type": "ConceptBankSave",
                   "inputs": {"bank": ["7", 0], "bank_name": "pets", "allow_fewer": False}}}
    hidden = SimpleNamespace(unique_id="7", prompt=graph, extra_pnginfo=None)
    monkeypatch.setattr(pack.ConceptFolderLearner, "hidden", hidden, raising=False)
    assert learn(bank=bank).args[0].names == bank.names      # nothing is left to learn
    for given, advice in ((None, "connect Load Concept Bank"), (bank.remove("chalk"), "Merge Concept Banks")):
        with pytest.raises(ConceptError, match=f"nothing was learned: .* holds <blueprint>; .*{advice}"):
            learn(bank=given, steps=10**6)


def test_a_cancelled_run_resumes_exactly(learn, monkeypatch, own_folder):
    import comfy.model_management

    from continual_concepts.nodes import progress

    whole = learn().args[0]
    shutil.rmtree(own_folder / "concept_banks")
    before, steps = progress.Reporter.__call__, []

    def report(self, info):
        steps.append((self.part.name, info.step))
        if steps[-1] == cancel_at:
            comfy.model_management.interrupt_current_processing()
        before(self, info)

    monkeypatch.setattr(progress.Reporter, "__call__", report)
    for cancel_at in (("mimi", 2), ("rex", 1)):      # noqa: B007 - read by report
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            learn()
    cancel_at = None
    assert contents(learn().args[0]) == contents(whole)
    assert steps == [(name, step) for name in ("mimi", "chalk", "rex") for step in (1, 2, 3)]


def test_a_concept_that_fails_is_reported_and_the_others_are_learned(learn, cast):
    (cast / "rex dog" / "0.png").write_bytes(b"damaged")
    bank, _, report = learn().args
    assert bank.names == ["mimi", "chalk"] and "not learned: <rex>: the picture" in report
    for path in cast.glob("*/0.png"):
        path.write_bytes(b"damaged")
    with pytest.raises(ConceptError, match="no concept was learned: <mimi>: the picture .*<rex>"):
        learn()


@pytest.mark.parametrize(("table", "sentence"), [
    ("folder,name,noun\n../elsewhere,rex,dog\n", "names '../elsewhere'; allowed here: paths inside"),
    ("folder,name,noun\n/etc,rex,dog\n", "names '/etc'; allowed here: paths inside"),
    ("folder,name,noun,captions\nrex dog,rex,dog,~/x\n", "names '~/x'; allowed here: paths inside"),
    ("folder,name,noun,kind\nrex dog,rex,dog,style\n", "'style', and its preset is 'object'; give its row"),
    ("folder,name,noun,preset\nrex dog,rex,dog,cat\n", "preset of concept 'rex' is 'cat'; allowed: person"),
    ("folder,name\nrex dog,rex\n", "concept 'rex' has no class noun"),
])
def test_faults_are_named_before_any_work(learn, cast, table, sentence):
    (cast / "concepts.csv").write_text(table, encoding="utf-8")
    with pytest.raises(ConceptError) as caught:
        learn()
    assert sentence in str(caught.value)


def test_only_listed_folders_are_read(pack, cast, studio):
    with pytest.raises(ConceptError, match="'../cast' is not the name of a folder inside .*: cast$"):
        pack.ConceptFolderLearner.execute(folder="../cast", model=None, clip=None, vae=None, **GIVEN)
    (cast / "concepts.csv").write_text("folder,name,noun,preset\nchalk drawing,chalk,drawing,style\n")
    base = {"model": studio.model, "clip": studio.clip, "vae": studio.vae}
    bank = pack.ConceptFolderLearner.execute(folder="cast", **base, **GIVEN).args[0]
    assert bank.infos["chalk"].kind == "style"

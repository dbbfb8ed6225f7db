"""What is said of a bank: facts, likeness, collisions, warnings before the next concept."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.evaluation.bank_picture import bank_pages
from continual_concepts.core.evaluation.collisions import (
    collisions_of,
    composition_of_method,
    header_warnings,
    warnings_before,
)
from continual_concepts.core.evaluation.inspection import facts_of, inspect, lines
from continual_concepts.core.methods import METHODS
from continual_concepts.core.model.deltas import SparseDelta


def thumbnail(shade: int, kink: int = 0) -> bytes:
    """Left and right of different colours, so that a crop's mean is another one; `kink` moves it a little."""
    image = Image.new("RGB", (40, 30), (shade, 60, 200 - shade))
    image.paste((255, 255, kink), (0, 0, 12, 30))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def mean_colour(pictures):
    """An Encode that sees nothing but the colour."""
    return torch.nn.functional.normalize(torch.stack([picture.mean((1, 2)) + 1 for picture in pictures]),
                                         dim=-1)


@pytest.fixture
def concept(layout, make_concept):
    """concept(name, seed, method, ...): other keywords are the header's; photos: digests."""
    def make(name="rex", seed=0, method="cidm", photos=("a", "b"), picture=b"", **header):
        made = make_concept(layout, name, seed, method=method, thumbnail=picture)
        origin = replace(made.info.provenance, images=tuple(photos))
        return replace(made, info=replace(made.info, provenance=origin, **header))

    return make


@pytest.fixture
def bank_of(layout):
    def make(*concepts):
        bank = ConceptBank(layout)
        for one in concepts:
            bank = bank.add(one)
        return bank

    return make


def twin(one, name):
    """The same deltas under another name, learned from other photos."""
    made = one.renamed(name)
    return replace(made, info=replace(made.info, provenance=replace(made.info.provenance, images=("x", "y"))))


def test_facts_are_what_the_concept_holds(concept, layout):
    one = concept(picture=thumbnail(9), class_noun="cat", kind="style", method="lora_m")
    facts = facts_of(one.info, one)
    identity = (facts.name, facts.placeholder, facts.class_noun, facts.kind, facts.method)
    assert identity == ("rex", "<rex>", "cat", "style", "lora_m")
    origin = (facts.composes, facts.words, facts.photos, facts.steps, facts.date)
    assert origin == ("summed", 2, 2, 3, "2025-01-01")
    assert facts.stores == "rank 2" and facts.copies == layout.copies and facts.nbytes == one.nbytes()
    assert facts.thumbnail == one.thumbnail
    places = SparseDelta((4, 5), torch.arange(7, dtype=torch.int32), torch.ones(7))
    assert facts_of(one.info, replace(one, deltas={(0, "to_k"): places})).stores == "7 weights"
    assert facts_of(one.info, replace(one, deltas={})).stores == "words only"
    assert facts.way == "lora_m, always on" and facts_of(replace(one.info, method="bound")).way == "bound"
    assert facts_of(one.info).nbytes == 0      # from the header alone


def test_every_method_composes_in_a_way_with_a_name():
    assert {composition_of_method(name) for name in METHODS} == {"bound", "routed", "summed", "averaged"}
    assert composition_of_method("of another version") == "routed"
    assert (composition_of_method("slots"), composition_of_method("slots", "style")) == ("bound", "routed")


def test_a_report_is_json_and_complete(concept, bank_of):
    found = inspect(bank_of(concept("rex", 1, picture=thumbnail(9)), concept("mimi", 2, photos="c"),
                            concept("ink", 3, photos="d")))
    told = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert [one["name"] for one in told["concepts"]] == ["rex", "mimi", "ink"]
    assert told["concepts"][0]["cover"] is True
    assert set(told["likeness"]) == {"deltas", "words"} and told["likeness"]["deltas"][1][1] == 1
    nearest = told["concepts"][0]["most_like"]["deltas"]
    row = [told["likeness"]["deltas"][0][i] for i in (1, 2)]
    assert nearest == {"name": ("mimi", "ink")[row[1] > row[0]], "cosine": max(row)}
    assert told["collisions"] == [] and told["warnings"] == []


def test_an_empty_bank_and_a_single_concept(concept, bank_of):
    for nothing in (None, bank_of()):
        assert inspect(nothing).to_json() == {"concepts": [], "collisions": [], "warnings": [],
                                              "likeness": {}}
    alone = inspect(bank_of(concept()), mean_colour)
    assert alone.nearest("rex") is None and alone.collisions == ()
    assert json.dumps(alone.to_json(), allow_nan=False)


def test_one_damaged_concept_is_told_of_and_the_others_seen(concept, bank_of):
    def fails():
        raise ConceptError("concept 'bad' in 'x' cannot be read: it holds NaN")

    bank = bank_of(concept("rex", 1, photos="a")).lazily(concept("bad", 2, photos="b").info, fails).merge(
        bank_of(concept("mimi", 3, photos="c")))
    found = inspect(bank, mean_colour)
    assert [bool(facts.fault) for facts in found.facts] == [False, True, False]
    assert "'bad'" in found.warnings[0]
    assert found.nearest("bad") is None and found.nearest("rex").name == "mimi"


def test_thumbnails_are_compared_where_there_is_an_encoder(concept, bank_of):
    bank = bank_of(concept("rex", 1, "bound", "a", thumbnail(10)),
                   concept("mimi", 2, "bound", "b", thumbnail(10, 9)),
                   concept("tom", 3, "bound", "c", thumbnail(10, 5), class_noun="cat"),
                   concept("ink", 4, "bound", "d", b"no picture"),
                   concept("fido", 5, "bound", "e", thumbnail(200)))
    found = inspect(bank, mean_colour)
    # tom is a cat
    assert [(one.one, one.other, one.kind) for one in found.collisions] == [("rex", "mimi", "covers")]
    assert found.nearest("rex").measure == "covers" and found.nearest("ink").measure == "deltas"
    assert found.partners("mimi") == ["rex"] and found.partners("tom") == []
    assert inspect(bank).collisions == ()
    assert "<rex> and <mimi> collide" in found.warnings[0]
    thumbnails = found.likeness["covers"]
    # the diagonal: a thumbnail and its own crop
    assert thumbnails[0, 1] > thumbnails[0, 0] > thumbnails[0, 4]
    assert thumbnails[3].isnan().all()


def test_styles_are_not_judged_by_thumbnails(concept, bank_of):
    bank = bank_of(*(concept(name, i, "bound", name, thumbnail(10, i), kind="style", class_noun="drawing")
                     for i, name in enumerate("abc")))
    assert inspect(bank, mean_colour).collisions == ()


def test_thumbnails_of_one_pixel_can_be_compared(concept, bank_of):
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, "PNG")
    bank = bank_of(*(concept(name, i, "bound", name, buffer.getvalue()) for i, name in enumerate("ab")))
    assert inspect(bank, mean_colour).likeness["covers"].shape == (2, 2)


@pytest.mark.parametrize("features", [torch.full((4, 3), torch.nan), torch.ones(2, 3), torch.ones(4)])
def test_a_vision_model_that_gives_no_vectors_is_refused(concept, bank_of, features):
    bank = bank_of(concept("rex", 1, photos="a", picture=thumbnail(1)),
                   concept("mimi", 2, photos="b", picture=thumbnail(2)))
    with pytest.raises(ConceptError, match="choose another"):
        inspect(bank, lambda pictures: features)


def test_one_record_under_two_names_is_a_copy_whatever_the_photos(concept, bank_of):
    first = concept("rex", 1, "bound")
    found = inspect(bank_of(first, twin(first, "mimi"), concept("tom", 2, photos="c")))
    assert [(c.one, c.other, c.kind) for c in found.collisions] == [("rex", "mimi", "copy")]


def test_alike_deltas_or_words_alone_are_no_collision(concept, bank_of):
    first, other = concept("rex", 1), concept("tom", 2, photos="c")
    assert inspect(bank_of(first, replace(twin(first, "mimi"),
                                          tokens=replace(other.tokens,
                                                         words=("mimi-1", "mimi-2"))))).collisions == ()
    assert inspect(bank_of(first, replace(twin(first, "mimi"), deltas=other.deltas))).collisions == ()
    assert inspect(bank_of(first, replace(twin(first, "mimi"), deltas={}))).collisions == ()


def test_words_decide_where_there_are_no_deltas(concept, bank_of):
    first = replace(concept("rex", 1, "textual_inversion"), deltas={})
    other = replace(concept("tom", 2, "textual_inversion", photos="c"), deltas={})
    bank = bank_of(first, twin(first, "mimi"), other)
    for found in (inspect(bank), inspect(bank, only="rex")):
        assert [(c.one, c.other) for c in found.collisions] == [("rex", "mimi")]
        assert found.nearest("rex").measure == "words"


def test_one_concept_alone_can_be_compared_with_the_others(concept, bank_of):
    bank = bank_of(*(concept(name, i, photos=name) for i, name in enumerate("abcd")))
    whole, one = inspect(bank), inspect(bank, only="c")
    for measure in ("deltas", "words"):
        mine, all_of = one.likeness[measure], whole.likeness[measure]
        assert torch.allclose(mine[2], all_of[2]) and torch.allclose(mine[:, 2], all_of[:, 2])
        assert mine[0, 1].isnan()
        assert one.nearest("c", measure).name == whole.nearest("c", measure).name


def test_the_same_photos_collide_whatever_the_method(concept):
    def kinds(*photos, **header):
        made = [concept(f"c{i}", i, "bound", one).info for i, one in enumerate(photos)]
        made[-1] = replace(made[-1], **header)
        return [(c.one, c.other, c.kind) for c in collisions_of(made)]

    assert kinds("abc", "abd") == [("c0", "c1", "photos")] and kinds("abcd", "aefg") == []
    assert kinds("abcdef", "ab") == [("c0", "c1", "photos")]      # half of the smaller
    assert kinds("abc", "abc", class_noun="cat") == [] and kinds("abc", "abc", kind="style") == []
    assert kinds("abc", "abc", class_noun=" Dog ") == [("c0", "c1", "photos")]
    assert kinds(("", ""), ("", "")) == []      # photos without a digest
    # each with the one it shares most with
    assert kinds("ab", "abc", "abc") == [("c0", "c1", "photos"), ("c1", "c2", "photos")]


def test_a_thousand_headers_are_looked_at_in_a_moment(concept):
    infos = [concept(f"c{i}", 0, "lora_m", (f"p{i}", f"q{i}")).info for i in range(3)]
    many = [replace(infos[0], name=f"c{i}", words=(f"w{i}",)) for i in range(1000)]
    assert len(collisions_of(many)) == 999      # all from the same photos: one each, not half a million


def test_headers_tell_which_concepts_mix(concept, bank_of):
    made = [concept(name, i, method, str(i), class_noun=noun) for i, (name, method, noun) in enumerate(
        [("rex", "lora_m", "dog"), ("fido", "finetune", "Dog"), ("spot", "bound", "dog"),
         ("mimi", "lora_m", "cat"), ("Rex", "cidm", "")])]
    mixing, case = header_warnings(bank_of(*made))
    assert "<rex>, <fido> share the class noun 'dog'" in mixing and "<spot>" not in mixing
    assert case.startswith("<rex>, <Rex> differ in upper and lower case")


@pytest.mark.parametrize("name, noun, method, expected", [
    ("tom", "cat", "bound", []),
    ("rex", "", "bound", ["holds <rex> already"]),
    ("rex-1", "", "bound", ["placeholder of <rex>", "a part of the other"]),
    ("REX", "", "bound", ["upper and lower case"]),
    ("trex", "", "", ["<trex> and <rex> is a part"]),
    ("tom", "dog", "bound", ["<fido>: a dog as well, and the two will share the weights in every"]),
    ("tom", "dog", "cidm", ["<fido>: a dog as well, and", "<spot>: a dog as well; named in one prompt"]),
    ("tom", " Dog", "", ["<fido>: a Dog as well"]),
    ("tom", "dog", "lora_m", ["<rex>, <fido>, <spot>: a dog as well"]),
    ("tom", "cat", "lora_m", []),
])
def test_warnings_before_a_concept_is_learned(concept, bank_of, name, noun, method, expected):
    bank = bank_of(concept("rex", 1, "bound"), concept("fido", 2, "lora_m", photos="c"),
                   concept("spot", 3, "cidm", photos="d"))
    found = warnings_before(bank, name, noun, method)
    assert len(found) == len(expected), found
    assert all(part in warning for part, warning in zip(expected, found, strict=True)), found
    assert warnings_before(None, name, noun, method) == ()


@pytest.mark.parametrize("digests, noun, kind, warned", [
    ("ab", "dog", "object", True), ("abcdef", " Dog", "object", True), ("axyz", "dog", "object", True),
    ("xyz", "dog", "object", False),
    ("ab", "cat", "object", False), ("ab", "dog", "style", False), ("", "dog", "object", False)])
def test_known_photos_give_a_warning_before_learning(concept, bank_of, digests, noun, kind, warned):
    warnings = warnings_before(bank_of(concept("rex", 1, "bound", photos="ab")), "spot", noun, "bound", kind,
                               list(digests))
    assert [("<rex> was learned from the same photos" in warning) for warning in warnings] == [True] * warned


def test_names_that_are_not_allowed_are_refused():
    with pytest.raises(ConceptError, match="not allowed"):
        warnings_before(None, "a b", "dog")


def test_many_names_are_counted(concept, bank_of):
    bank = bank_of(*(concept(f"dog{i}", i, "lora_m", str(i)) for i in range(9)))
    assert "and 6 more" in header_warnings(bank)[0]


def test_a_header_full_of_nonsense_is_survived(concept, bank_of):
    """A bank may come from anywhere: what is not checked when it is opened must not break what is said of
    it."""
    odd = concept("odd", 1, photos=({"a": 1}, 7, None, ["b"]), class_noun="7", method="x")
    odd = replace(odd, info=replace(odd.info, provenance=replace(odd.info.provenance, date=5, steps="many")))
    bank = bank_of(odd, concept("rex", 2, class_noun=""))
    assert json.dumps(inspect(bank).to_json()) and header_warnings(bank) == ()
    assert warnings_before(bank, "tom", "7", "lora_m") != ()
    assert "<odd>  7, object" in lines(inspect(bank))[0] and bank_pages(inspect(bank))


def test_words_of_the_class_noun_are_no_likeness(make_concept, layout, bank_of):
    """Two dogs of `slots` have the words of "dog": every pair was "most like ... by words, cosine 1.00"."""
    def of(name, seed, noun="dog", kind="object"):
        made = make_concept(layout, name, seed=seed)
        origin = replace(made.info.provenance, settings={"method": {"learn_words": False}})
        info = replace(made.info, provenance=origin, class_noun=noun, kind=kind)
        return replace(made, info=info, deltas={})

    bank = bank_of(of("rex", 1), of("fido", 1), of("ink", 2, kind="style"), of("nia", 3, noun=""))
    found = inspect(bank)
    assert found.nearest("rex") is None and found.nearest("ink").name == "nia"
    assert found.to_json()["concepts"][0]["most_like"] == {}

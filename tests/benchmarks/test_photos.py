"""The benchmark on photos: folders of tasks, bad folders, and the whole command on random weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from continual_concepts.benchmarks.__main__ import main
from continual_concepts.benchmarks.continual import chart, judged, photos
from continual_concepts.benchmarks.continual.photos import FIRST_SEED, adjectives, read_tasks, seeds_of
from continual_concepts.benchmarks.continual.prompt_suite import groups_and_pairs
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.sampling.settings import SampleSettings

PROMPTS = {"test_pet.txt": ["A <TOK> in the forest", "", "A sad <TOK>"],
           "test_plushy.txt": ["A <TOK> on a table"],
           "test_style.txt": ["A <TOK> of a house", "A <TOK> of a dog"]}


@pytest.fixture
def folder(tmp_path):
    """A dog, a duck toy, a style and a second dog, two pictures each."""
    tasks = []
    for i, (name, noun, kind, said) in enumerate((("dog", "dog", "object", "dog"),
                                                  ("duck", "duck toy", "object", "yellow duck toy"),
                                                  ("ink", "painting", "style", "painting"),
                                                  ("dog2", "dog", "object", "dog"))):
        images, captions = tmp_path / "images" / name, tmp_path / "caption" / name
        images.mkdir(parents=True)
        captions.mkdir(parents=True)
        for j in range(2):
            pixels = np.random.default_rng(10 * i + j).integers(0, 256, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(images / f"{j}.png")
            (captions / f"{j}.txt").write_text(f"{'a ' * j}{said} on a sofa {j}\n")
        tasks.append({"images": f"images/{name}", "captions": f"caption/{name}", "class_noun": noun,
                      "kind": kind,
                      "tokens": [f"<dog{2 * (i > 2) + j + 1}>" if noun == "dog" else f"<{name}{j + 1}>"
                                 for j in range(2)]})
    (tmp_path / "tasks.json").write_text(json.dumps({"source": "somebody", "tasks": tasks}))
    (tmp_path / "evaluation_prompts").mkdir()
    for name, lines in PROMPTS.items():
        (tmp_path / "evaluation_prompts" / name).write_text("\n".join(lines))
    return tmp_path


def change(folder, task=0, **other):
    file = folder / "tasks.json"
    data = json.loads(file.read_text())
    data["tasks"][task] |= other
    file.write_text(json.dumps(data))


def test_a_folder_becomes_tasks(folder):
    dog, duck, ink, other = read_tasks(folder)
    # <dog2> is a word of <dog>
    assert [t.name for t in (dog, duck, ink, other)] == ["dog", "duck", "ink", "dog_2"]
    assert dog.words == ("dog1", "dog2") and other.words == ("dog3", "dog4") and ink.kind == "style"
    assert dog.prompts == ("A <dog> in the forest",
                           "A sad <dog>")
    assert dog.noun_prompts == ("A dog in the forest", "A sad dog")
    assert duck.prompts == ("A yellow <duck> on a table",)
    assert duck.noun_prompts == ("A yellow duck toy on a table",)
    assert ink.prompts == ("A <ink> of a house", "A <ink> of a dog")
    assert [p.caption for p in duck.pictures] == ["yellow duck toy on a sofa 0",
                                                  "a yellow duck toy on a sofa 1"]
    assert dog.references.shape == (2, 3, 512, 512) and len(dog.held_out) == 0 and dog.pictures[0].digest
    assert [t.name for t in read_tasks(folder, 2)] == ["dog", "duck"]
    groups, pairs = groups_and_pairs((dog, duck, ink, other))
    assert groups == (("dog", "duck"), ("duck", "dog_2")) and pairs == (("dog", "dog_2"),)


def test_names_and_prompts_of_the_tasks_own(folder):
    (folder / "mine.txt").write_text("<TOK> and <TOK>")
    change(folder, name="rex", prompts="mine.txt")
    task = read_tasks(folder, 1)[0]
    assert task.name == "rex" and task.prompts == ("<rex> and <rex>",)


@pytest.mark.parametrize("captions, noun, expected", [
    (["yellow rubber duck toy here", "a yellow rubber duck toy"], "duck toy", "yellow rubber"),
    (["woman with a red backpack", "red backpack"], "backpack", "red"), (["a dog", "the dog"], "dog", ""),
                                                      (["a dog", "a dog"], "dog", ""),
    (["red cat", "cat"], "cat", ""), (["red cat", "a bird"], "cat", ""), ([], "cat", ""),
                                                      (["Red Cat", "the red cat"], "cat", "red"),
])
def test_adjectives_are_what_all_captions_say(captions, noun, expected):
    assert adjectives(captions, noun) == expected


def test_every_prompt_has_its_own_seeds():
    seeds = seeds_of(45, 20)
    assert seeds[:20] == (FIRST_SEED,) * 20 and seeds[20:40] == (FIRST_SEED + 1,) * 20
    assert len({(i % 20, seed) for i, seed in enumerate(seeds)}) == 45


@pytest.mark.parametrize("other, sentence", [
    ({"images": "../outside"}, "leads out of"), ({"images": "/"}, "leads out of"),
    ({"images": None}, "images of task 1 is None"), ({"images": "images/none"}, "does not exist"),
    ({"captions": "../../x"}, "leads out of"), ({"captions": 3}, "captions of 'dog' is 3"),
    ({"prompts": "../x"}, "leads out of"), ({"prompts": "none.txt"}, "no text file"),
    ({"class_noun": ""}, "class_noun of task 1"), ({"class_noun": "<duck>"}, "class_noun of task 1"),
    ({"class_noun": 5}, "class_noun of task 1"), ({"kind": "face"}, "kind of task 1"),
    ({"kind": ["object"]}, "kind of task 1"), ({"tokens": ["<a b>"]}, "token of task 1"),
    ({"tokens": ["<a>", "<a>"]}, "tokens of task 1"), ({"tokens": "dog"}, "tokens of task 1"),
    ({"name": "a/b"}, "name of task 1"), ({"name": 4}, "name of task 1"),
    ({"name": "duck"}, "name of task 2"), ({"images": "a\0b"}, "images of task 1"),
    ({"tokens": ["<duck1>"]}, "two tasks have the token"),
])
def test_what_a_folder_says_is_checked(folder, other, sentence):
    change(folder, **other)
    with pytest.raises(ConceptError, match=sentence) as caught:
        read_tasks(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"tasks": []}', '{"tasks": [1]}',
                                     '{"tasks": {"a": 1}}', "[" * 100_000])
def test_files_that_are_no_lists_of_tasks(folder, content):
    (folder / "tasks.json").write_text(content)
    with pytest.raises(ConceptError, match="tasks.json"):
        read_tasks(folder)


def test_prompts_without_a_place_for_the_concept(folder):
    for lines in ("A dog", "A <TOK>\nA <cat>", "\n"):
        (folder / "evaluation_prompts" / "test_pet.txt").write_text(lines)
        with pytest.raises(ConceptError, match="<TOK>"):
            read_tasks(folder)


def test_more_tasks_than_there_are_and_single_pictures(folder):
    with pytest.raises(ConceptError, match="tasks is 5"):
        read_tasks(folder, 5)
    (folder / "images" / "dog" / "1.png").unlink()
    with pytest.raises(ConceptError, match="two or more"):
        read_tasks(folder)


def test_the_benchmarks_photos(benchmark_photos):
    tasks = read_tasks(benchmark_photos)
    assert [len(t.pictures) for t in tasks] == [5, 4, 5, 6, 7, 7, 5, 6, 5, 5]
    assert [t.name for t in tasks][::3] == ["dog", "backpack", "dog_2", "ink_painting"]
    assert all(len(t.prompts) == 20 and f"<{t.name}>" in t.prompts[0] for t in tasks)
    assert tasks[1].prompts[0] == "A yellow rubber <duck_toy>, in the ocean"
    assert tasks[1].words == ("duck1", "duck2", "duck3")
    assert tasks[3].noun_prompts[0] == "A red backpack, in the ocean"
    groups, pairs = groups_and_pairs(tasks)
    assert set(pairs) == {("dog", "dog_2"), ("cat", "cat_2")} and groups


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_base, tiny_clip, tiny_dino):
    folder = tmp_path_factory.mktemp("models")
    return {name: save(folder / name)
            for name, save in (("base", tiny_base), ("clip", tiny_clip), ("dino", tiny_dino))}


@pytest.fixture
def command(folder, tmp_path, models, monkeypatch):
    """Runs the benchmark on random weights, two tasks of a step.

    Returns its exit code and its result's file.
    """
    monkeypatch.setattr(photos, "sampling",
                        lambda resolution: SampleSettings(2, 7.5, (resolution,) * 2, photos.NEGATIVE))
    file = tmp_path / "result" / "photos.json"
    usual = {**models, "data": folder, "json": file, "resolution": 32, "pictures": 3, "tasks": 2, "steps": 1,
             "seeds": 1, "methods": "bound,clora"}

    def run(**other):
        flags = [f"--{key}={value}" for key, value in (usual | other).items() if value is not None]
        return main(["continual", *flags]), file

    return run


@pytest.mark.slow
def test_the_command_on_photos(command, capsys, monkeypatch):
    code, file = command()
    assert code == 0, capsys.readouterr().err
    result = json.loads(file.read_text())
    assert set(result["methods"]) == {"bound", "clora"} and result["tasks"] == 2
    assert all(-1 <= result[row]["alone"]["cosine"] <= 1 for row in ("floor", "ceiling"))
    # no real picture shows two of them, so nothing says how far the way is
    assert "combined" not in result["ceiling"] and "mean" not in result["methods"]["bound"]["combined"]
    assert -1 <= result["methods"]["bound"]["combined"]["cosine"] <= 1
    assert file.with_suffix(".png").exists() and "| bound |" in capsys.readouterr().out
    run = json.loads((file.parent / "photos.cells" / "bound-n2-o0-s0.json").read_text())
    assert run["concepts"] == ["dog", "duck"] and run["settings"] == {} and run["base_change"] == 0
    assert run["pictures"] == 3
    assert run["encoder"] == "CLIP and DINO" and len(run["base"]) == 16
    assert run["steps"] == 1 and set(run["judges"]) == {"encoder"}
    monkeypatch.setattr(chart, "draw", lambda *_: None)
    with monkeypatch.context() as patched:
        patched.setattr(judged, "floor_and_ceiling", None)      # known from the first run
        assert command()[0] == 0
    assert json.loads(file.read_text()) == result
    # other pictures are not mixed in
    assert command(pictures=4)[0] == 1
    assert "pictures 3, but 4 was requested" in capsys.readouterr().err


@pytest.mark.parametrize("other, sentence", [
    ({"clip": None}, "--clip is missing"), ({"data": None}, "--clip is for photos"),
    ({"pictures": 1}, "pictures is 1"),
    ({"data": None, "clip": None, "dino": None, "resolution": None, "pictures": None}, "--base is"),
    ({"tasks": 9}, "tasks is 9"), ({"clip": "nowhere"}, "does not exist"),
    ({"data": "nowhere"}, "does not exist"), ({"resolution": 33}, "multiples of 4"),
])
def test_flags_that_do_not_fit(command, capsys, other, sentence):
    assert command(**other)[0] == 1
    assert sentence in capsys.readouterr().err

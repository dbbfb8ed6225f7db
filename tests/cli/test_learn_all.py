"""The command learn-all: a folder of folders becomes a bank, and every fault is named before any work."""

from __future__ import annotations

import pytest
from PIL import Image

from continual_concepts.core.bank.format import open_bank
from continual_concepts.core.cli import learning, learning_all
from continual_concepts.core.cli.parser import main
from continual_concepts.core.demo import scenes
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.training.folders import headline

QUICK = ["--steps", "1", "--batch-size", "1", "--base", "embedded-64"]


def fill(folder, name="rex", count=1):
    folder.mkdir(parents=True)
    for i, (picture, _) in enumerate(scenes.CONCEPTS[name].pictures(count, seed=1)):
        Image.fromarray(picture).save(folder / f"{i}.png")


@pytest.fixture
def cast(tmp_path):
    """Photos of two things and a style."""
    folder = tmp_path / "cast"
    for path, name in (("rex dog", "rex"), ("5_mimi tabby cat", "mimi"), ("chalk drawing", "chalk")):
        fill(folder / path, name)
    return folder


def test_names_of_folders_say_name_and_noun(cast):
    found = {planned.name: planned.noun for planned in learning_all.plan(cast)}
    assert found == {"rex": "dog", "mimi": "tabby cat", "chalk": "drawing"}


def test_a_table_says_more(cast):
    (cast / "concepts.csv").write_text("folder, name, noun, kind, captions\n"
                                       "chalk drawing, chalk-1, drawing, style, rex dog\n\n"
                                       "rex dog, rex, dog\n", encoding="utf-8")
    style, thing = learning_all.plan(cast)
    assert (style.name, style.kind, style.captions) == ("chalk-1", "style", cast / "rex dog")
    assert (thing.name, thing.kind, thing.captions) == ("rex", "", None)


@pytest.mark.parametrize(("table", "sentence"), [
    ("folder,name,colour\n", "has a column 'colour'; allowed: folder, name, noun"),
    ("folder,noun\nrex dog,dog", "needs the columns folder and name"),
    ("folder,name,noun\nnowhere,rex,dog", "names 'nowhere', which does not exist"),
    ("folder,name,noun\n,rex,dog", "names no folder for 'rex'"),
    ("folder,name,noun\nrex dog,a/b,dog", "folder 'rex dog': concept name 'a/b' is not allowed"),
    ("folder,name,noun\nrex dog,rex,<dog>", "class noun '<dog>' is not allowed"),
    ("folder,name,noun,kind\nrex dog,rex,dog,animal", "kind of concept 'rex' is 'animal'; allowed: object"),
    ("folder,name\nrex dog,rex", "concept 'rex' has no class noun; name its folder 'rex dog'"),
    ("folder,name,noun\nrex dog,rex,dog\n5_mimi tabby cat,rex,cat", "the name 'rex' is given to more than"),
    ("folder,name,noun\n", "names no folder with pictures"),
])
def test_faults_are_named_before_any_work(cast, tmp_path, capsys, table, sentence):
    (cast / "concepts.csv").write_text(table, encoding="utf-8")
    bank = tmp_path / "bank.safetensors"
    assert main(["learn-all", str(cast), "--bank", str(bank), *QUICK]) == 1
    assert sentence in capsys.readouterr().err and not bank.exists()


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ConceptError, match="none' does not exist"):
        learning_all.plan(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(ConceptError, match="file' is not a folder"):
        learning_all.plan(tmp_path / "file")


def test_memory_that_runs_out_for_one_does_not_stop_the_others(cast, tmp_path, capsys, monkeypatch):
    learn, asked = learning_all.learn, []

    def scarce(options):
        asked.append(options.name)
        if options.name == "mimi":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return learn(options)

    monkeypatch.setattr(learning_all, "learn", scarce)
    bank = tmp_path / "bank.safetensors"
    assert main(["learn-all", str(cast), "--bank", str(bank), *QUICK]) == 1
    assert "1 of 3 concepts was not learned; the bank holds the others" in capsys.readouterr().err
    assert len(asked) == 3 and sorted(open_bank(bank).names) == ["chalk", "rex"]


def test_all_are_learned_and_the_same_command_goes_on(cast, tmp_path, capsys):
    """A concept that fails does not stop the others; what the bank holds is not learned again."""
    (cast / "5_mimi tabby cat" / "0.png").write_bytes(b"damaged")
    bank, sheets = tmp_path / "bank.safetensors", tmp_path / "sheets"
    command = ["learn-all", str(cast), "--bank", str(bank), "--contact-sheets", str(sheets), *QUICK]
    assert main(command) == 1
    shown = capsys.readouterr()
    assert "1 of 3 concepts was not learned" in shown.err and "<mimi>" in shown.err
    assert sorted(open_bank(bank).names) == ["chalk", "rex"]
    before = bank.read_bytes()
    picture = scenes.CONCEPTS["mimi"].pictures(1, seed=1)[0][0]
    Image.fromarray(picture).save(cast / "5_mimi tabby cat" / "0.png")
    assert main(command) == 0
    assert "holds 3 concepts; 1 was learned now, 2 were there already" in capsys.readouterr().out
    assert sorted(open_bank(bank).names) == ["chalk", "mimi", "rex"] and bank.read_bytes() != before
    assert {path.stem for path in sheets.iterdir()} == {"chalk", "mimi", "rex"}


def test_contact_sheets_of_names_that_differ_by_case_have_different_files(tmp_path, monkeypatch):
    """On a disk that ignores case, too."""
    for name in ("Rex dog", "rex cat", "REX bird"):
        (tmp_path / "cast" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "cast" / name / "0.png")
    asked = []
    monkeypatch.setattr(learning_all, "learn", lambda options: asked.append(options.contact_sheet))
    assert main(["learn-all", str(tmp_path / "cast"), "--bank", str(tmp_path / "bank.safetensors"),
                 "--contact-sheets", str(tmp_path / "sheets"), *QUICK]) == 0
    assert len(asked) == len({sheet.name.casefold() for sheet in asked}) == 3
    assert {sheet.name[:3].casefold() for sheet in asked} == {"rex"}


@pytest.mark.parametrize(("table", "sentence"), [
    ("folder,name,noun\nrex dog,rex,dog,style\n", "line 2 has no column for 'style'"),
    ("folder,name,noun,noun\nrex dog,rex,dog,cat\n", "the column 'noun' is there twice"),
    ('folder,name,noun\nrex dog,rex,"dog\n5_mimi tabby cat,mimi,cat\n', "cannot be read: unexpected end"),
    ('folder,name,noun\nrex dog,rex,"' + "d" * 200_000 + '"\n', "cannot be read: field larger"),
    ("folder,name,noun\n" + "x" * 300 + ",rex,dog\n", "x', which does not exist"),
    ("folder,name,noun\n~nobody-here/x,rex,dog\n", "names '~nobody-here/x', which does not exist"),
    ("folder,name,noun\nempty,rex,dog\n", "names the folder 'empty', which holds no pictures"),
    ("folder,name,noun\nrex dog,r\0x,dog\n", "the table '{}' is not in UTF-8"),
])
def test_odd_tables_are_named_in_one_sentence(cast, table, sentence):
    (cast / "empty").mkdir()
    (cast / "concepts.csv").write_text(table, encoding="utf-8", newline="")
    with pytest.raises(ConceptError) as caught:
        learning_all.plan(cast)
    assert sentence.format(cast / "concepts.csv") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("table", [
    "folder;name;noun\r\nrex dog;rex;dog\r\n",
    "Folder\tName\tNoun\nrex dog\trex\tdog\n",
    "folder,name,noun,\nrex dog,rex,dog,\n",
    "folder,name,noun\rrex dog,rex,dog\r",
    'folder,name,noun\n"rex dog",rex," dog "\n',
])
def test_tables_of_spreadsheets_are_read(cast, table):
    (cast / "concepts.csv").write_text(table, encoding="utf-8", newline="")
    planned, = learning_all.plan(cast)
    assert (planned.folder, planned.name, planned.noun) == (cast / "rex dog", "rex", "dog")


def test_a_table_that_cannot_be_read_is_named(cast, tmp_path):
    for table, reason in ((tmp_path / "none.csv", "No such file"), (cast, "Is a directory")):
        with pytest.raises(ConceptError, match=f"the table '{table}' cannot be read: {reason}"):
            learning_all.plan(cast, table)
    (cast / "concepts.csv").symlink_to(tmp_path / "none.csv")
    with pytest.raises(ConceptError, match="concepts.csv' cannot be read: No such file"):
        learning_all.plan(cast)


@pytest.mark.parametrize(("given", "sentence"), [
    (["--set", "nonsense=1"], "method 'slots' has no setting 'nonsense'"),
    (["--prior", "nowhere"], "the picture folder 'nowhere' does not exist"),
    (["--contact-sheets", "{}/sheets"], ".png' lies in '{}', where it would be taken for a photo"),
])
def test_a_fault_of_all_concepts_is_named_once(cast, tmp_path, capsys, given, sentence):
    bank = tmp_path / "bank.safetensors"
    given = [text.format(cast) for text in given]
    assert main(["learn-all", str(cast), "--bank", str(bank), *QUICK, *given]) == 1
    shown = capsys.readouterr()
    assert shown.err.count(sentence.format(cast)) == 1 and "not learned" not in shown.err
    assert not shown.out and not bank.exists()


def test_one_reason_for_several_concepts_is_said_once():
    assert learning_all._sentence({"no base": ["rex", "mimi"], "odd": ["chalk"]}, 4).endswith(
        "<rex>, <mimi>: no base; <chalk>: odd")


def test_what_is_not_in_a_folder_of_photos_is_named(cast):
    (cast / "loose.png").write_bytes((cast / "rex dog" / "0.png").read_bytes())
    (cast / "later").mkdir()
    (cast / "gone").symlink_to("nowhere")
    (cast / ".hidden").mkdir()
    assert {file.name: file.reason.split(" ")[0] for file in learning_all.passed_over(cast)} == {
        "loose.png": "not", "later": "a", "gone": "not"}


def contents(bank):
    return [(concept.name, concept.digest(), concept.thumbnail) for concept in open_bank(bank)]


def test_a_command_that_is_cut_twice_gives_the_same_bank(cast, tmp_path, monkeypatch):
    """It is stopped within the second concept, and then between the concept and its thumbnail."""
    command = ["learn-all", str(cast), *QUICK, "--steps", "3"]
    bank = tmp_path / "cut" / "bank.safetensors"
    shown, thumbnail = learning._show, learning._thumbnail

    def stop_within(bar, info):
        shown(bar, info)
        if "mimi" in bar.desc and info.step == 2:
            raise KeyboardInterrupt

    def stop_behind(backbone, bank, name, *rest):
        if name == "mimi":
            raise KeyboardInterrupt
        return thumbnail(backbone, bank, name, *rest)

    (cast / "concepts.csv").write_text("folder,name,noun,kind\nchalk drawing,chalk,drawing,style\n"
                                       "5_mimi tabby cat,mimi,tabby cat,\nrex dog,rex,dog,\n")
    assert main([*command, "--bank", str(tmp_path / "whole.safetensors")]) == 0
    for target, instead, names in (("_show", stop_within, ["chalk"]),
                                   ("_thumbnail", stop_behind, ["chalk", "mimi"])):
        with monkeypatch.context() as patch:
            patch.setattr(learning, target, instead)
            assert main([*command, "--bank", str(bank)]) == 130
        assert open_bank(bank).names == names
    assert main([*command, "--bank", str(bank)]) == 0
    assert contents(bank) == contents(tmp_path / "whole.safetensors")
    assert all(thumbnail for _, _, thumbnail in contents(bank)) and not list(bank.parent.glob(".*checkpoint"))


def test_a_row_of_the_table_has_a_preset_of_its_own(cast, tmp_path, capsys):
    (cast / "concepts.csv").write_text("folder,name,noun,preset\nrex dog,rex,dog,\nchalk drawing,chalk,"
                                       "drawing,style\n", encoding="utf-8")
    bank = tmp_path / "bank.safetensors"
    command = ["learn-all", str(cast), "--bank", str(bank), *QUICK]
    assert main([*command, "--preset", "person", "--effort", "quick"]) == 0
    assert {name: info.kind for name, info in open_bank(bank).infos.items()} == {"rex": "object",
                                                                                 "chalk": "style"}
    assert "holds 2 concepts; 2 were learned now, 0 were there already" in capsys.readouterr().out
    (cast / "concepts.csv").write_text("folder,name,noun,preset\nrex dog,rex,dog,animal\n", encoding="utf-8")
    assert main(command) == 1
    assert "preset of concept 'rex' is 'animal'; allowed: person, object, style" in capsys.readouterr().err


def test_the_report_counts_in_plain_words():
    assert headline("a bank", 1, 1, 0) == "a bank holds 1 concept; 1 was learned now, 0 were there already"
    assert headline("a bank", 3, 2, 1) == "a bank holds 3 concepts; 2 were learned now, 1 was there already"

"""B: settings, flags and names, as people type them."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields

import pytest
import torch

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.format import open_bank
from continual_concepts.core.cli import backbones, learning
from continual_concepts.core.cli.arguments import width_and_height, with_plain_booleans
from continual_concepts.core.cli.parser import build_parser
from continual_concepts.core.data.framing import Framing, Picture
from continual_concepts.core.data.training_set import prepare
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.evaluation.clip import ClipEncoder
from continual_concepts.core.methods import METHODS, Task, make
from continual_concepts.core.neurons.neurons import NeuronSelection
from continual_concepts.core.settings import read_setting, unusual
from continual_concepts.core.training.config import TrainingConfig
from continual_concepts.core.training.trainer import Trainer

BOUND = METHODS["bound"].config


@pytest.mark.parametrize("text", ["False", "false", "NO", "off", "0", " no "])
def test_b1_booleans_in_every_spelling(text):
    opposite = {"False": "True", "false": "true", "NO": "YES", "off": "on", "0": "1", " no ": " yes "}[text]
    assert read_setting(BOUND, "layerwise", text) is False
    assert read_setting(BOUND, "layerwise", opposite) is True
    assert with_plain_booleans([f"--flip={text}", "--steps=0"], TrainingConfig) == ["--no-flip", "--steps=0"]


def test_b1_other_words_are_refused(learn, photos):
    assert learn(photos, "--set", "layerwise=maybe").sentence.endswith(
        "setting 'layerwise' is 'maybe'; allowed: true or false")
    assert "--flip" in learn(photos, "--flip=maybe").sentence


@pytest.mark.parametrize(("pair", "allowed"), [
    ("rank=abc", "a whole number, 1 to 128"), ("rank=8.5", "a whole number, 1 to 128"),
    ("rank=true", "a whole number, 1 to 128"), ("rank=", "a whole number, 1 to 128"),
    ("rank=0", "allowed: 1 to 128"), ("lr=high", "a number, 0 or more"),
    ("lr=nan", "a number, 0 or more"), ("lr=inf", "a number, 0 or more"), ("lr=-1", "0 or more"),
    ("stored=int8", "float16")])
def test_b2_wrong_values_get_one_sentence(learn, photos, pair, allowed):
    name, text = pair.split("=")
    sentence = learn(photos, "--set", pair).sentence
    assert name in sentence and text in sentence and allowed in sentence


@pytest.mark.parametrize(("flag", "text", "allowed"), [
    ("steps", "abc", "a whole number, 1 or more"), ("steps", "0", "allowed: 1 or more"),
    ("warmup", "1.5", "a whole number, 0 or more"), ("noise-offset", "some", "a number, 0 or more"),
    ("caption-dropout", "1", "allowed: 0 to below 1"), ("framing", "square", "crop, pad, buckets"),
    ("schedule", "Linear", "constant, linear, cosine"), ("precision", "fp16", "float32, bfloat16, float16"),
    ("optimizer", "adamw", "AdamW")])
def test_b2_sibling_flags_of_training_read_alike(learn, photos, flag, text, allowed):
    sentence = learn(photos, f"--{flag}={text}").sentence
    assert flag.replace("-", "_") in sentence and text in sentence and allowed in sentence


def test_b2_sibling_a_setting_that_comes_twice_or_belongs_elsewhere(learn, photos):
    assert "'rank' is given twice" in learn(photos, "--set", "rank=4", "--set", "rank=8").sentence
    assert "give --steps 5 instead of --set" in learn(photos, "--set", "steps=5").sentence
    assert "'rank' is not of the form key=value" in learn(photos, "--set", "rank").sentence
    assert "has no setting 'rnk'; it has" in learn(photos, "--set", "rnk=5").sentence


@pytest.mark.parametrize("arguments", [
    ("--count", "0"), ("--count", "many"), ("--steps", "2.5"), ("--cfg", "-1"), ("--cfg", "nan"),
    ("--size", "0"), ("--size", "256x"), ("--size", "64x64x64"), ("--size", "64.5"), ("--size", "²"),
    ("--size", "9" * 5000), ("--size", "999999999992"),
    ("--size", "64x16385"), ("--strength", "inf"), ("--solo", "2"), ("--seed", "-1")])
def test_b2_sibling_flags_of_sample(run, arguments):
    flag, text = arguments
    sentence = run("sample", "a dog", *arguments).sentence
    assert f"argument {flag}: '{text}' is not allowed; allowed: a " in sentence


def test_b2_sibling_the_largest_size_is_allowed():
    assert width_and_height("16384x8") == (16384, 8)


def test_b3_unusual_rates_are_told(learn, photos):
    assert unusual(make("bound", {"lr": 50.0}).config) == ["setting 'lr' is 50; usual: 1e-06 to 0.02"]
    frozen = make("clora", {"token_lr": 0.0}).config
    assert unusual(frozen) == ["setting 'token_lr' is 0; usual: 1e-06 to 0.2"]
    told = learn(photos, "--set", "token_lr=0.5", "--noise-offset", 2)
    assert told.code == 0 and "warning: setting 'token_lr' is 0.5; usual: 1e-06 to 0.2" in told.err
    assert "warning: setting 'noise_offset' is 2; usual: 0 to 1" in told.err


@pytest.mark.parametrize("method", sorted(METHODS))
def test_b3_sibling_defaults_are_usual(method):
    assert unusual(make(method, backbones.EMBEDDED_RATES).config) == []
    assert unusual(make(method).config) == unusual(TrainingConfig()) == []
    assert unusual(backbones.EMBEDDED_TRAINING) == []


def test_b4_patience_works_on_the_embedded_base(learn, photos, monkeypatch):
    scores = iter((0.5, 0.6, 0.4, 0.3))
    monkeypatch.setattr(learning.Previews, "evaluate", lambda self, bank, step: next(scores))
    told = learn(photos, "--steps", 40, "--patience", 1, "--look-every", 2)
    assert told.code == 0 and "ended after 6 of 40 steps" in told.out


def test_b4_the_embedded_judge_scores(learn, photos):
    """The real judge, and two steps only: that is the time of one evaluation."""
    assert learn(photos, "--patience", 1, "--look-every", 2).code == 0


def test_b4_sibling_other_bases_need_an_encoder(learn, photos, tmp_path):
    other = learn(photos, "--base", tmp_path, "--patience", 1, "--look-every", 1)
    assert "setting 'patience' is 1; with this base it needs --encoder" in other.sentence
    alone = learn(photos, "--patience", 1)
    assert "setting 'look_every' is 0; allowed: 1 or more where patience is not 0" in alone.sentence
    assert "give --patience" in learn(photos, "--encoder", tmp_path).sentence
    missing = learn(photos, "--patience", 1, "--look-every", 1, "--encoder", tmp_path / "clip")
    assert "the CLIP folder" in missing.sentence and "does not exist" in missing.sentence
    assert ClipEncoder.features      # what is called


@pytest.fixture
def stopped(learn, photos, monkeypatch, tmp_path):
    """A run of two steps that was interrupted after the first one; its checkpoint."""
    def stop(bar, info):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(learning, "_show", stop)
        assert learn(photos).code == 130
    return tmp_path / ".bank.safetensors.rex.checkpoint"


def test_b5_resuming_names_what_differs_and_both_ways_on(stopped, learn, photos):
    sentence = learn(photos, "--seed", 3, "--set", "rank=8").sentence
    assert f"the checkpoint '{stopped}' belongs to another run" in sentence
    assert "its rank is 4, now 8; its seed is 0, now 3; " in sentence
    assert sentence.endswith("give the values of that run to resume it, or delete the file to start again")
    assert "its method is 'slots', now 'cidm'; give" in learn(photos, "--method", "cidm").sentence
    (photos / "0.txt").write_text("<rex> in the rain")
    assert "its captions number 1 is 'a photo of <rex>', now '<rex> in the rain'" in learn(photos).sentence
    (photos / "0.png").unlink()
    assert "it has 3 images, now 2; 2 of them are the same" in learn(photos).sentence
    stopped.unlink()
    assert learn(photos).code == 0


@pytest.mark.parametrize("seed", [2**64, -1, 10**30])
def test_b6_seeds_that_are_too_large(learn, run, photos, seed):
    assert f"setting 'seed' is {seed}; allowed: 0 to {2**64 - 1}" in learn(
        photos, f"--seed={seed}").sentence
    assert f"argument --seed: '{seed}' is not allowed" in run("sample", "a dog", f"--seed={seed}").sentence


def test_b5_sibling_a_damaged_checkpoint_names_the_way_on(tmp_path, learn, photos):
    (tmp_path / ".bank.safetensors.rex.checkpoint").write_bytes(b"half")
    assert "is not a checkpoint" in learn(photos).sentence and "delete it" in learn(photos).sentence


def test_b6_sibling_the_largest_seeds(run):
    assert TrainingConfig(seed=2**64 - 1).seed == 2**64 - 1
    past = run("sample", "a dog", "--seed", 2**64 - 1, "--count", 2)
    assert f"setting 'seed' is {2**64}" in past.sentence
    assert "each picture after the first adds 1" in past.sentence


@pytest.fixture
def again(run, learned, photos):
    """again(*more): learns <rex> again, from the photos of the bank `learned`."""
    def call(*more, name="rex"):
        return run("learn", photos, "--bank", learned, "--name", name, "--noun", "dog", "--batch-size", 2,
                   "--steps", 2, *more)

    return call


def test_b7_a_known_concept_is_kept_or_replaced(again, learned):
    before = learned.read_bytes()
    kept = again()
    assert kept.code == 0 and "<rex> is in" in kept.out and "nothing was changed" in kept.out
    other = again("--seed", 5).sentence
    assert "a concept 'rex', learned from other photos or settings (its seed is 0, now 5)" in other
    assert other.endswith("choose another name, or give --if-known again to replace it")
    assert learned.read_bytes() == before
    assert "(its class noun is 'dog', now 'cat'; its kind is 'object', now 'style')" in again(
        "--noun", "cat", "--kind", "style").sentence
    replaced = again("--seed", 5, "--if-known", "again")
    assert replaced.code == 0 and open_bank(learned).names == ["rex"]
    assert open_bank(learned).infos["rex"].provenance.settings["training"]["seed"] == 5


def test_b7_likeness_to_known_concepts_is_told(again, learned):
    told = again("--if-known", "again", name="Rex").err
    assert "warning: <Rex> and <rex> differ in upper and lower case only" in told
    assert "warning: <rex> was learned from the same photos" in told
    assert open_bank(learned).names == ["rex", "Rex"]


def test_b7_sibling_json_says_whether_it_was_learned(run, learned, photos):
    facts = json.loads(run("learn", photos, "--bank", learned, "--name", "rex", "--noun", "dog", "--json",
                           "--batch-size", 2, "--steps", 2).out)      # --json may stand anywhere
    assert facts["learned"] is False and facts["concepts"] == ["rex"]


def test_b8_brackets_of_names_are_stripped(run, learned):
    options = build_parser().parse_args(["learn", "photos", "--bank", "b", "--name", " <rex>"])
    assert options.name == "rex"
    assert options.words == ()
    words = ["learn", "photos", "--bank", "b", "--name", "rex", "--words", "<a>, b"]
    assert build_parser().parse_args(words).words == ("a", "b")
    assert run("bank", "show", learned, "<rex>").code == 0
    assert run("bank", "rename", learned, "<rex>", "<tom>").code == 0
    assert run("bank", "remove", learned, "<tom>").code == 0 and open_bank(learned).names == []


@pytest.mark.parametrize(("method", "term"), [("lwf", "distil"), ("l2dm", "distillation")])
def test_b9_dropped_captions_leave_distillation(slim_backbone, teach, method, term):
    """All options with all methods: tests/training/test_options.py."""
    settings = {"lwf": {}, "l2dm": {"eta": 1, "generation_steps": 1}}[method]
    bank = teach(slim_backbone, ConceptBank(slim_backbone.layout), "rex", method, settings).bank
    config = TrainingConfig(steps=2, batch_size=2, resolution=32, flip=False, caption_dropout=0.5)
    pictures = [Picture(torch.full((3, 32, 32), 0.1 * i), digest=str(i)) for i in range(2)]
    data = prepare(slim_backbone, pictures, "mimi", "cat", Framing(32))
    trainer = Trainer(Task("mimi", "cat", slim_backbone, bank), make(method, settings), data, config)
    with trainer.session():
        assert all(term in trainer.step().terms for _ in range(2))


def test_b10_a_selection_for_a_method_without_neurons():
    with pytest.raises(ConceptError, match="method 'bound' cannot use a neuron selection; methods that can"):
        make("bound").use_selection(NeuronSelection({}, {}))


def _parsers(parser: argparse.ArgumentParser):
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _parsers(command)


PARSERS = {parser.prog: parser for parser in _parsers(build_parser())}


@pytest.mark.parametrize("name", PARSERS)
def test_b11_help_says_what_the_code_does(name):
    """Every argument has a help text, which names the default where there is one."""
    parser = PARSERS[name]
    for action in parser._actions:
        if isinstance(action, (argparse._HelpAction, argparse._SubParsersAction)):
            continue
        text = parser._get_formatter()._expand_help(action) if action.help else ""
        assert text, (name, action.dest)
        if action.default not in (None, "", False, [], (), argparse.SUPPRESS):
            assert f"(default {action.default})" in text, (name, action.dest)
    assert parser.format_help()


def test_b11_defaults_of_training_are_those_of_the_base():
    options = build_parser().parse_args(["learn", "photos", "--bank", "b", "--name", "rex"])
    assert learning._training(options) == backbones.EMBEDDED_TRAINING
    helps = {action.dest: action.help for action in PARSERS["continual-concepts learn"]._actions}
    for field in fields(TrainingConfig):
        plain, embedded = (getattr(config, field.name)
                           for config in (TrainingConfig(), backbones.EMBEDDED_TRAINING))
        shown = {True: "on", False: "off"}.get(plain, plain) if field.type == "bool" else plain
        assert f"(default {shown}" in helps[field.name]
        assert (f"; {embedded} for the embedded base)" in helps[field.name]) == (plain != embedded)


def test_b11_guidance_and_size_of_the_base(run):
    text = run("sample", "--help").out
    assert "default 3 for the embedded" in text and backbones.EMBEDDED_CFG == 3.0
    assert "else 7.5" in text and backbones.OTHER_CFG == 7.5


@pytest.mark.parametrize("arguments", [
    (), ("learn",), ("learn", "photos", "--bank"), ("sample",), ("bank",), ("bank", "shwo"),
    ("bank", "merge", "a"), ("demo", "--no-such-flag"),
    ("learn", "photos", "--bank", "b", "--name", "rex", "--method", "dreambooth")])
def test_b11_usage_errors_are_one_line(run, arguments):
    told = run(*arguments)
    assert told.code == 2 and told.err.count("\n") == 1 and "--help" in told.sentence


def test_b11_without_a_bank_the_sentence_says_so(run):
    assert "names <rex>, but no bank was given" in run("sample", "a photo of <rex>").sentence


def test_b12_all_clashing_names_are_told(layout, make_concept):
    bank = ConceptBank(layout)
    for i, name in enumerate(("rex", "mimi", "tom")):
        bank = bank.add(make_concept(layout, name, i))
    other = ConceptBank(layout).add(make_concept(layout, "rex", 5)).add(make_concept(layout, "tom", 6))
    with pytest.raises(ConceptError, match="both banks hold 'rex', 'tom'; rename"):
        bank.merge(other)

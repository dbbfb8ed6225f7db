"""`learn --keep-states` and `--for-other-programs`: the best state is stored, and what other programs read is
learned."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from continual_concepts.core.bank.format import open_bank
from continual_concepts.core.cli import learning, states
from continual_concepts.core.cli.parser import main
from continual_concepts.core.demo import scenes
from continual_concepts.core.errors import WriteError
from continual_concepts.core.evaluation.previews import Previews
from continual_concepts.core.training.trainer import Trainer


@pytest.fixture
def learn(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.fromarray(scenes.CONCEPTS["rex"].pictures(1, seed=1)[0][0]).save(folder / "0.png")

    def run(*more, name="rex"):
        return main(["--json", "learn", str(folder), "--bank", str(tmp_path / "bank.safetensors"), "--name",
                     name, "--noun", "dog", "--steps", "4", "--batch-size", "1", "--base", "embedded-64",
                     *more])

    return run


def test_the_proposed_state_is_stored_and_all_are_shown(learn, tmp_path, capsys):
    picture = tmp_path / "states.png"
    assert learn("--keep-states", "2", "--samples", "2", "--sample-prompt", "<rex> on a boat",
                 "--states-picture", str(picture)) == 0
    states = json.loads(capsys.readouterr().out)["states"]
    assert [state["step"] for state in states] == [2, 4]
    chosen, = (state["step"] for state in states if state["proposed"])
    assert open_bank(tmp_path / "bank.safetensors").infos["rex"].provenance.steps == chosen
    assert Image.open(picture).width > 400
    assert learn("--keep-states", "2") == 0      # known: learned from these photos and settings
    assert json.loads(capsys.readouterr().out)["learned"] is False


@pytest.mark.parametrize(("given", "sentence"), [
    (["--sample-prompt", "<rex>"], "--sample-prompt belongs to --keep-states"),
    (["--keep-states", "2", "--sample-prompt", "a dog"], "sample prompt 'a dog' does not name the concept"),
    (["--keep-states", "2", "--sample-prompt", "<rex> and <mimi>"], "names <mimi>, which the bank does not"),
    (["--keep-states", "2", "--states-picture", "a.jpg"], "the picture of states 'a.jpg' does not end in"),
    (["--for-other-programs", "--set", "layerwise=true"], "setting 'layerwise' is True; allowed for other"),
    (["--keep-states", "2", "--states-picture", "a.png", "--contact-sheet", "./a.png"], "are both 'a.png'"),
    (["--device", "meta"], "--device is 'meta', which cannot be used here; allowed: cpu"),
    (["--keep-states", "2", "--method", "cidm"], "method 'cidm' passes a state to later concepts"),
    (["--for-other-programs", "--method", "bound"], "needs the method 'lora', but the method is 'bound'"),
])
def test_what_cannot_be_is_one_sentence(learn, tmp_path, capsys, given, sentence):
    assert learn(*given) == 1
    assert sentence in capsys.readouterr().err and not (tmp_path / "bank.safetensors").exists()


def test_a_failure_at_the_end_loses_nothing(learn, tmp_path, capsys, monkeypatch):
    """The picture of the states cannot be written any more; the concept is then stored without states."""
    def full(*_):
        raise WriteError("cannot write 'states.png': no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(states, "write_picture", full)
        assert learn("--keep-states", "2", "--samples", "1", "--states-picture", str(tmp_path / "s.png")) == 1
    assert "no space left on device; what was learned is kept: the same" in capsys.readouterr().err
    monkeypatch.setattr(Trainer, "step", lambda self: pytest.fail("learned again"))
    assert learn() == 0 and "rex" in open_bank(tmp_path / "bank.safetensors")


def test_a_finished_run_leaves_no_checkpoint_whatever_state_is_stored(learn, tmp_path, monkeypatch):
    """The command is stopped between storing an earlier state and deleting the checkpoint."""
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(states, "proposed", lambda found: 0)
        patched.setattr(learning, "_thumbnail", stop)
        assert learn("--keep-states", "2", "--samples", "1") == 130
    file, = tmp_path.glob(".*.checkpoint")
    assert open_bank(tmp_path / "bank.safetensors").infos["rex"].provenance.steps == 2
    assert learn() == 0 and not file.exists()


def test_a_run_that_ended_early_leaves_no_checkpoint_whatever_state_is_stored(learn, tmp_path, monkeypatch):
    """The same for a run that early stopping has ended."""
    def stop(*_):
        raise KeyboardInterrupt

    early = "--patience", "1", "--look-every", "1"
    monkeypatch.setattr(Previews, "evaluate", lambda self, bank, step: -float(step))      # worse every time
    with monkeypatch.context() as patched:
        patched.setattr(states, "proposed", lambda found: 0)
        patched.setattr(learning, "_thumbnail", stop)
        assert learn("--keep-states", "4", "--samples", "1", *early) == 130
    file, = tmp_path.glob(".*.checkpoint")
    assert open_bank(tmp_path / "bank.safetensors").infos["rex"].provenance.steps == 1
    assert learn(*early) == 0 and not file.exists()


def test_states_that_a_run_did_not_keep_are_told(learn, tmp_path, monkeypatch, capsys):
    step = Trainer.step

    def stop(trainer):
        if len(trainer.losses) == 2:
            raise KeyboardInterrupt
        return step(trainer)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", stop)
        assert learn() == 130
    told = []
    monkeypatch.setattr(learning.tqdm, "write", lambda bar, line: told.append(line))
    assert main(["learn", str(tmp_path / "photos"), "--bank", str(tmp_path / "bank.safetensors"), "--name",
                 "rex", "--noun", "dog", "--steps", "4", "--batch-size", "1", "--base", "embedded-64",
                 "--keep-states", "2", "--samples", "1"]) == 0
    assert told == ["the run began without keeping states of steps 2, so they are not among those that are "
                    "compared", "resumed at step 2"]


def test_what_is_learned_for_other_programs_is_exported_without_loss(learn, tmp_path, capsys):
    """The files, read again, are the concept: one vector per word, and the products of the factors."""
    assert learn("--for-other-programs", "--preset", "object", "--effort", "quick") == 0
    bank, out = tmp_path / "bank.safetensors", tmp_path / "out"
    assert main(["bank", "export", str(bank), "rex", "--output", str(out)]) == 0
    assert main(["bank", "import", str(tmp_path / "again.safetensors"), "rex", "--noun", "dog", "--lora",
                 str(out / "rex_lora.safetensors"), "--embedding", str(out / "rex.safetensors"), "--base",
                 "embedded-64"]) == 0
    learned, read = open_bank(bank)["rex"], open_bank(tmp_path / "again.safetensors")["rex"]
    assert learned.info.method == "lora" and learned.tokens.copies == 1
    for encoder, vectors in learned.tokens.vectors.items():
        assert torch.equal(vectors.float(), read.tokens.vectors[encoder].float())
    assert set(learned.deltas) == set(read.deltas)
    for key, delta in learned.deltas.items():
        one, other = (d.scale * d.up.float() @ d.down.float() for d in (delta, read.deltas[key]))
        assert torch.allclose(one, other, atol=1e-7, rtol=1e-4)

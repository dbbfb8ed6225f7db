"""Several processes learn what one process learns, and micro-batches what whole batches do."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from contextlib import redirect_stdout

import pytest
import torch
from PIL import Image

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.format import open_bank
from continual_concepts.core.cli.parser import main
from continual_concepts.core.data.framing import Framing, Picture
from continual_concepts.core.data.training_set import prepare
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.methods import METHODS
from continual_concepts.core.methods.base import Task, make
from continual_concepts.core.training.config import TrainingConfig
from continual_concepts.core.training.micro_batches import micro_batches
from continual_concepts.core.training.process_group import ProcessGroup
from continual_concepts.core.training.trainer import Trainer


@pytest.fixture(scope="module")
def training_set(slim_backbone):
    g = torch.Generator().manual_seed(3)
    pictures = [Picture(torch.rand(3, 32, 32, generator=g) * 2 - 1, caption)
                for caption in ("a <spot>", "", "<spot> in a park", "")]
    return prepare(slim_backbone, pictures, "spot", "dog", Framing(32, flip=False))


def run_of(backbone, data, method="bound", group=None, bank=None, **config):
    task = Task("spot", "dog", backbone, bank or ConceptBank(backbone.layout))
    settings = TrainingConfig(**{"steps": 3, "batch_size": 2, "resolution": 32, **config})
    return Trainer(task, make(method), data, settings, *(() if group is None else (group,)))


def parameters(run):
    return torch.cat([p.detach().flatten() for p in run.parameters])


def in_micro_batches(backbone, limit, monkeypatch):
    """A backbone whose memory holds `limit` pictures; returns how many it was asked for."""
    sizes, predict = [], backbone.predict

    def short_of_memory(latents, *args):
        sizes.append(len(latents))
        if len(latents) > limit:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return predict(latents, *args)

    monkeypatch.setattr(backbone, "predict", short_of_memory)
    return sizes


@pytest.mark.parametrize("config", [{}, {"caption_dropout": 0.5}, {"accumulation": 2}, {"batch_size": 3}])
def test_a_batch_in_micro_batches_teaches_the_same(slim_backbone, training_set, monkeypatch, config):
    whole, split = (run_of(slim_backbone, training_set, **config) for _ in range(2))
    for _ in range(3):
        whole.step()
    sizes = in_micro_batches(slim_backbone, 1, monkeypatch)
    for _ in range(3):
        split.step()
    assert max(sizes[:2]) > 1 and set(sizes[4:]) == {1} and split.measures.rows == 1
    assert torch.allclose(parameters(split), parameters(whole), atol=1e-5)
    assert split.losses == pytest.approx(whole.losses, rel=1e-4)


def test_memory_for_not_one_picture_is_told(slim_backbone, training_set, monkeypatch):
    run = run_of(slim_backbone, training_set)
    before = parameters(run)
    in_micro_batches(slim_backbone, 0, monkeypatch)
    with pytest.raises(ConceptError, match="memory ran out at step 1 of concept 'spot' with 1 pictures of 32 "
                                           "pixels"):
        run.step()
    assert torch.equal(parameters(run), before)


def test_replay_is_added_to_every_piece(slim_backbone, training_set, make_concept, monkeypatch):
    bank = ConceptBank(slim_backbone.layout).add(make_concept(slim_backbone.layout, "rex", 1, method="lwf"))
    run = run_of(slim_backbone, training_set, "lwf", bank=bank)
    sizes = in_micro_batches(slim_backbone, 2, monkeypatch)
    run.step()
    # one picture and its old request
    assert sizes[0] == 4 and 2 in sizes and torch.isfinite(parameters(run)).all()


def test_shares_are_equal_and_make_up_the_batch(slim_backbone, training_set):
    run = run_of(slim_backbone, training_set, batch_size=4)
    batch = training_set.draw(4, 1.0, torch.Generator().manual_seed(1))
    parts = []
    for rank in range(2):
        found = list(micro_batches(batch, run.method, run.config, 1000, torch.Generator().manual_seed(2),
                                   ProcessGroup(rank, 2), size=1))
        assert [one.weight for one in found] == [0.5, 0.5]
        parts.append(found)
    whole = next(micro_batches(batch, run.method, run.config, 1000, torch.Generator().manual_seed(2),
                               ProcessGroup()))
    shared = [parts[i % 2][i // 2] for i in range(4)]
    assert torch.equal(torch.cat([one.drawn.noise for one in shared]), whole.drawn.noise)
    assert torch.equal(torch.cat([one.batch.latents for one in shared]), whole.batch.latents)
    assert tuple(one.batch.prompts[0] for one in shared) == whole.batch.prompts
    with pytest.raises(ConceptError, match="a batch has 3 pictures; with 2 processes allowed: a multiple of "
                                           "2"):
        ProcessGroup(0, 2).share(3)


@pytest.mark.parametrize("method",
                         sorted(name for name, entry in METHODS.items() if entry.method.learns_alone))
def test_methods_that_learn_alone_say_so(slim_backbone, training_set, method):
    with pytest.raises(ConceptError, match=f"method '{method}' depends on its own gradients or replays"):
        run_of(slim_backbone, training_set, method, ProcessGroup(0, 2))


def by_torchrun(arguments, folder):
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([sys.executable, "-I", *start, "-m", "continual_concepts.core", *arguments],
                          cwd=folder, text=True, capture_output=True, timeout=300, check=False,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def run_rank(rank, port, arguments, folder):
    torch.set_num_threads(1)      # a fork has none of the other threads
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test")
    with (folder / f"{rank}.txt").open("w") as said, redirect_stdout(said):
        code = main(arguments)
    sys.exit(code)


def by_forks(arguments, folder):
    """The same with forks of this process, in an environment like torchrun's. torchrun imports PyTorch three
    times, which takes longer than learning."""
    if torch.cuda.is_available():
        pytest.skip("PyTorch cannot learn in a fork where there is a graphics card")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=run_rank, args=(rank, port, arguments, folder)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    try:
        for rank in ranks:
            rank.join(300)
        assert [rank.exitcode for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    return (folder / "0.txt").read_text()


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(4):
        Image.new("RGB", (64, 64), (60 * i, 200 - 40 * i, 90)).save(tmp_path / "photos" / f"{i}.png")
    return tmp_path


@pytest.mark.parametrize("in_two", [by_forks, pytest.param(by_torchrun, marks=pytest.mark.slow)])
def test_two_processes_learn_what_one_does(photos, installed, capsys, quick_commands, in_two):
    """The command itself, on the embedded base."""
    said = {}
    for processes in (1, 2):
        bank = photos / f"{processes}.safetensors"
        options = ["--bank", bank, "--name", "spot", "--noun", "dog", "--steps", 3, "--batch-size", 4,
                   "--method", "bound", "--base", "embedded-64"]
        arguments = [*map(str, ["--json", "learn", photos / "photos", *options])]
        if processes == 1:      # here: starting a process takes longer than learning
            assert main(arguments) == 0
            said[1] = json.loads(capsys.readouterr().out)
        else:
            said[2] = json.loads(in_two(arguments, photos))
    one, two = (open_bank(photos / f"{n}.safetensors")["spot"] for n in (1, 2))
    for key, delta in one.deltas.items():
        assert torch.allclose(two.deltas[key].dense(), delta.dense(), atol=2e-5)
    assert torch.allclose(two.tokens.vectors["clip_l"].float(), one.tokens.vectors["clip_l"].float(),
                          atol=2e-3)
    assert any(delta.dense().abs().max() > 1e-4
               for delta in one.deltas.values()) and said[1].keys() == said[2].keys()
    assert not list(photos.glob(".*checkpoint"))

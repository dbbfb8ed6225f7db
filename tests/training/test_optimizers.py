"""Optimisers of libraries: a stopped run resumes bit for bit, and what cannot work is refused."""

from __future__ import annotations

import pytest
import torch

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.training import checkpoint
from continual_concepts.core.training.config import TrainingConfig
from continual_concepts.core.training.optimizers import (
    EIGHT_BIT,
    LIBRARIES,
    MATRICES,
    SCHEDULE_FREE,
    averaged,
    make_optimizer,
    optimizer_class,
)

OTHERS = [name for name in LIBRARIES if name not in EIGHT_BIT]
ALL = [*OTHERS, "Muon", *EIGHT_BIT]


@pytest.fixture(scope="module")
def empty(slim_backbone):
    return ConceptBank(slim_backbone.layout)


def needs(name: str) -> None:
    """Skips the test if the optimiser is not installed, or does not run on a CPU."""
    if optimizer_class(name) is None:
        pytest.skip(f"{LIBRARIES.get(name, ('', 'a newer torch'))[1]} is not installed")
    if name in EIGHT_BIT:      # tensors below 4096 elements have states of 32 bits
        weight = torch.nn.Parameter(torch.ones(64, 64))
        weight.grad = torch.ones(64, 64)
        try:
            optimizer_class(name)([weight], lr=1e-3).step()
        except Exception as error:  # noqa: BLE001 - of any kind
            pytest.skip(f"bitsandbytes does not run {name} on this machine ({type(error).__name__})")


def training_with(name: str) -> dict:
    return {"optimizer": name, "steps": 6, "method": "slots", "schedule": "constant", "warmup": 2,
            "settings": {"slots": 32}}


def same(left, right) -> bool:
    tensors = [[tensor for delta in learned.concept.deltas.values() for tensor in delta.tensors()]
               for learned in (left, right)]
    pairs = zip(*tensors, strict=True)
    return left.losses == right.losses and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", ALL)
def test_a_stopped_run_resumes_bit_for_bit(slim_backbone, empty, teach, tmp_path, name):
    needs(name)
    file = tmp_path / "run.safetensors"

    def stop(info) -> None:
        info.snapshot()      # as a preview does
        if info.step == 3:
            raise KeyboardInterrupt

    whole = teach(slim_backbone, empty, **training_with(name))
    with pytest.raises(KeyboardInterrupt):
        teach(slim_backbone, empty, callback=stop, checkpoint_file=file, **training_with(name))
    steps = []
    resumed = teach(slim_backbone, empty, callback=lambda info: steps.append(info.step), checkpoint_file=file,
                    **training_with(name))
    assert steps == [4, 5, 6] and same(resumed, whole)
    assert any(delta.value.abs().max() > 0 for delta in whole.concept.deltas.values())


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_states_of_eight_bits_pass_through_a_checkpoint(tmp_path, name):
    needs(name)
    gradients = torch.randn(6, 64, 64, generator=torch.Generator().manual_seed(0))

    def stepped(weight, optimizer, part) -> torch.Tensor:
        for gradient in part:
            weight.grad = gradient.clone()
            optimizer.step()
        return weight.detach().clone()

    def fresh(start) -> tuple:
        weight = torch.nn.Parameter(start.clone())
        return weight, make_optimizer(name, [{"params": [weight], "lr": 1e-2}], 0.01)

    first = fresh(torch.ones(64, 64))
    half = stepped(*first, gradients[:3])
    assert first[1].state[first[0]]["state1"].dtype == torch.uint8
    checkpoint.save(tmp_path / "state.safetensors", first[1].state_dict())
    again = fresh(half)
    again[1].load_state_dict(checkpoint.load(tmp_path / "state.safetensors"))
    assert torch.equal(stepped(*first, gradients[3:]), stepped(*again, gradients[3:]))


@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_what_is_learned_is_the_average(name):
    needs(name)
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = make_optimizer(name, [{"params": [weight], "lr": 0.1}], 0.0)
    for _ in range(20):
        weight.grad = weight.detach().clone()
        optimizer.step()
    during = weight.detach().clone()
    with averaged(optimizer):
        assert not torch.equal(weight, during)
    assert torch.equal(weight, during) and optimizer.param_groups[0]["train_mode"]


@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_schedule_free_optimisers_refuse_what_does_not_fit(slim_backbone, empty, teach, name):
    needs(name)
    with pytest.raises(ConceptError, match=f"'schedule' is 'linear'; allowed with .*{name}: constant"):
        TrainingConfig(optimizer=name)
    with pytest.raises(ConceptError, match="does work of its own after every step"):
        teach(slim_backbone, empty, method="ewc", optimizer=name, schedule="constant")


def test_prodigy_takes_no_learning_rates_of_the_method():
    needs("Prodigy")
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "lr": rate} for rate in (1e-3, 1e-2)]
    assert [group["lr"] for group in make_optimizer("Prodigy", groups, 0.0).param_groups] == [1.0, 1.0]


@pytest.mark.skipif(not MATRICES, reason="this torch has no Muon")
def test_muon_refuses_weights_that_are_no_matrices(slim_backbone, empty, teach):
    with pytest.raises(ConceptError, match="optimizer 'Muon' cannot train these weights"):
        teach(slim_backbone, empty, method="textual_inversion", optimizer="Muon")


@pytest.mark.parametrize("name", ["Prodigy", "CAME", "AdamWScheduleFree"])
def test_a_missing_library_is_named(monkeypatch, name):
    import sys

    module, package = LIBRARIES[name]
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConceptError, match=f"'optimizer' is '{name}'; allowed: .* where {package} is"):
        TrainingConfig(optimizer=name)

"""Numbers that go wrong: NaN, infinity, what is too large for the bank's type. One sentence, or nothing lost;
never a silent infinity."""

from __future__ import annotations

import pytest
import torch

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.format import open_bank, save_bank, verify_bank
from continual_concepts.core.data.framing import Framing, Picture
from continual_concepts.core.data.training_set import prepare
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.methods import METHODS, Task, make
from continual_concepts.core.model.deltas import LowRankDelta
from continual_concepts.core.model.storage import stored_deltas, wide_enough
from continual_concepts.core.sampling.sampling import sample
from continual_concepts.core.sampling.settings import SampleSettings
from continual_concepts.core.training import checkpoint
from continual_concepts.core.training.config import TrainingConfig
from continual_concepts.core.training.trainer import Trainer

NAN, INF = float("nan"), float("inf")
LARGEST = torch.finfo(torch.float16).max      # 65504


@pytest.fixture
def empty(slim_backbone):
    return ConceptBank(slim_backbone.layout)


def tensors_of(concept) -> list[torch.Tensor]:
    return [*concept.tokens.vectors.values(),
            *(t for _, delta in sorted(concept.deltas.items()) for t in delta.tensors())]


def numbers_in(state) -> list[torch.Tensor]:
    if torch.is_tensor(state):
        return [state]
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return [tensor for part in parts for tensor in numbers_in(part)]


@pytest.fixture
def spoil(monkeypatch, slim_backbone):
    """spoil(call, how): from that call on, what the UNet says goes through `how`."""
    def arrange(call: int, how) -> None:
        predict, calls = slim_backbone.predict, []

        def spoiled(*args, **kwargs):
            calls.append(1)
            output = predict(*args, **kwargs)
            return how(output) if len(calls) >= call else output

        monkeypatch.setattr(slim_backbone, "predict", spoiled)

    return arrange


def gradient_of(value: float):
    """Sound output whose gradient is not."""
    def how(output):
        output.register_hook(lambda gradient: torch.full_like(gradient, value))
        return output * 1.0

    return how


WAYS = {"a loss of NaN": (lambda output: output * NAN, "the loss became nan"),
        "an infinite loss": (lambda output: output * INF, "the loss became (inf|nan)"),
        "a loss beyond float32": (lambda output: output.detach().sign() * 1e30 + output * 0,
                              "the loss became inf"),
        "a gradient of NaN": (gradient_of(NAN), "the gradient became nan"),
        "an infinite gradient": (gradient_of(INF), "the gradient became (inf|nan)")}


@pytest.mark.parametrize("way", WAYS)
def test_it_is_reported_at_the_step_and_nothing_is_poisoned(
        slim_backbone, empty, teach, tmp_path, monkeypatch, spoil, way):
    file, (how, says) = tmp_path / "run.checkpoint", WAYS[way]
    whole = teach(slim_backbone, empty, steps=3, checkpoint_every=1)
    spoil(3, how)
    with pytest.raises(ConceptError, match=f"{says} at step 3 of concept 'rex'; lower .* the bank is "
                                           "unchanged") as caught:
        teach(slim_backbone, empty, steps=3, checkpoint_every=1, checkpoint_file=file)
    assert "\n" not in str(caught.value) and len(empty) == 0
    state = checkpoint.load(file)
    assert len(state["losses"]) == 2 and all(torch.isfinite(tensor).all() for tensor in numbers_in(state))
    monkeypatch.undo()
    again = teach(slim_backbone, empty, steps=3, checkpoint_every=1, checkpoint_file=file)
    assert again.losses == whole.losses
    assert all(map(torch.equal, tensors_of(again.concept), tensors_of(whole.concept)))


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_last_step_that_goes_too_far_is_told(slim_backbone, empty, teach, monkeypatch, value):
    """No later loss would show it."""
    def too_far(optimizer, *_):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.detach().fill_(value)

    monkeypatch.setattr(torch.optim.AdamW, "step", too_far)
    says = r"norm of the weights became (nan|inf) at step 1 of concept 'rex'; .*\(lr, token_lr\).* unchanged"
    with pytest.raises(ConceptError, match=says):
        teach(slim_backbone, empty, steps=1, settings={"shared": "off"})
    assert len(empty) == 0


@pytest.mark.parametrize("method", ["cidm", "bound", "textual_inversion"])
def test_words_that_grow_without_end_stay_what_they_are(slim_backbone, empty, teach, tmp_path, method):
    """Beyond what float16 holds they are stored in float32."""
    learned = teach(slim_backbone, empty, method=method, settings={"token_lr": 1e6, "stored": "float16"},
                    steps=2)
    assert max(t.abs().max() for t in learned.concept.tokens.vectors.values()) > LARGEST
    save_bank(learned.bank, tmp_path / "b.safetensors")
    verify_bank(tmp_path / "b.safetensors")
    again = open_bank(tmp_path / "b.safetensors")["rex"]
    assert all(map(torch.equal, tensors_of(again), tensors_of(learned.concept)))


@pytest.fixture(scope="module")
def run_of(slim_backbone):
    """run_of(method): a run before its first step."""
    pictures = [Picture(torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1,
                        digest="0")]
    data = prepare(slim_backbone, pictures, "rex", "dog", Framing(32, flip=False))

    def begin(name: str) -> Trainer:
        settings = {"stored": "float16"}
        task = Task("rex", "dog", slim_backbone, ConceptBank(slim_backbone.layout))
        return Trainer(task, make(name, settings), data, TrainingConfig(steps=2, resolution=32, flip=False))

    return begin


@pytest.mark.parametrize("name", sorted(METHODS))
def test_no_method_stores_infinity(run_of, name):
    """Whatever was learned is finite, so what is stored of it is; and with usual numbers it is float16."""
    run = run_of(name)
    run.step()
    usual = run.method.finish()
    with torch.no_grad():
        for parameter in run.parameters:
            parameter.view(-1)[0] = 1e5
    try:
        outcome = run.method.finish()
    except ConceptError as error:      # a method that looks at the model's features with such weights
        assert "NaN or infinity" in str(error)
        return
    stored = [*outcome.tokens.vectors.values(), *(t for d in outcome.deltas.values() for t in d.tensors()),
              *outcome.shared.values()]
    assert all(torch.isfinite(tensor).all() for tensor in stored)
    assert all(vectors.dtype == torch.float16 for vectors in usual.tokens.vectors.values())
    assert {t.dtype for d in usual.deltas.values() for t in d.tensors()} <= {torch.float16, torch.int32}


def test_features_of_infinity_are_not_fused(run_of):
    run = run_of("mix_of_show")
    with torch.no_grad():
        for parameter in run.parameters:
            parameter.add_(1e30)
    with pytest.raises(ConceptError, match="NaN or infinity .* cannot be fused .* lower the learning rates"):
        run.method.finish()


@pytest.mark.parametrize(("value", "dtype"),
                         [(65000.0, torch.float16), (LARGEST, torch.float16), (65519.0, torch.float32),
                          (7e4, torch.float32), (-7e4, torch.float32), (3e38, torch.float32)])
def test_values_near_the_end_of_float16(layout, make_concept, tmp_path, value, dtype):
    up = torch.ones(4, 2)
    up[1, 1] = value
    deltas = stored_deltas({(0, "to_q"): LowRankDelta(up, torch.ones(2, 4)),
                            (1, "to_q"): LowRankDelta(torch.ones(6, 2), torch.ones(2, 6))},
                         torch.float16)
    assert {t.dtype for delta in deltas.values() for t in delta.tensors()} == {dtype}
    concept = make_concept(layout)
    bank = ConceptBank(layout).add(type(concept)(concept.info, concept.tokens, deltas))
    save_bank(bank, tmp_path / "b.safetensors")
    verify_bank(tmp_path / "b.safetensors")
    found = open_bank(tmp_path / "b.safetensors")["rex"].deltas[0, "to_q"].up[1, 1]
    assert float(found) == pytest.approx(value, rel=1e-3)


def test_what_is_no_number_does_not_become_one():
    for value in (NAN, INF):
        tensor = torch.tensor([value])
        assert not torch.isfinite(tensor.to(wide_enough(torch.float16, [tensor]))).any()
    assert wide_enough(torch.float16, []) == torch.float16 == wide_enough(torch.float16, [torch.zeros(0)])


def test_half_precision_without_a_graphics_card(slim_backbone, empty, teach):
    """It learns the same as in float32, roughly; nothing of it overflows."""
    half, full = (teach(slim_backbone, empty, precision=name) for name in ("float16", "float32"))
    assert half.losses == pytest.approx(full.losses, rel=0.05)
    assert all(torch.isfinite(tensor).all() for tensor in tensors_of(half.concept))


def test_half_precision_that_overflows_is_told(slim_backbone, empty, teach, spoil):
    spoil(2, lambda output: (output * 1e6).half().float())
    with pytest.raises(ConceptError, match="the loss became (inf|nan) at step 2 of concept 'rex'; lower .* "
                                           "or use precision float32"):
        teach(slim_backbone, empty, precision="float16")


def test_sampling_with_the_largest_numbers_of_float16_is_no_crash(slim_backbone, empty, make_concept):
    bank = empty.add(make_concept(empty.layout, "rex", size=1e4, dtype=torch.float16))
    pictures = sample(slim_backbone, bank, ["a photo of <rex>"], [0], SampleSettings(steps=2, size=(32, 32)))
    assert pictures.shape == (1, 3, 32, 32)

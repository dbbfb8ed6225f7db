"""Learning inside ComfyUI leaves everything as it found it, stops when asked to, goes on exactly, and learns
what the other host learns."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.usefixtures("as_in_comfyui", "own_folder")
SCENE = "a photo of a red dog on a beach"


class Failure(Exception):
    pass


@pytest.fixture
def stop_at(monkeypatch, pack):
    """stop_at(step, how): the next runs end after that step, by "cancel" (ComfyUI's button) or "failure";
    returns the steps they did."""
    import comfy.model_management

    from continual_concepts.nodes import progress

    before, seen = progress.Reporter.__call__, []

    def arrange(step: int, how: str) -> list[int]:
        def report(self, info):
            seen.append(info.step)
            if info.step == step and how == "cancel":
                comfy.model_management.interrupt_current_processing()
            elif info.step == step:
                raise Failure
            before(self, info)

        monkeypatch.setattr(progress.Reporter, "__call__", report)
        return seen

    yield arrange
    comfy.model_management.interrupt_current_processing(False)


@pytest.fixture
def stopped(comfyui):
    """What ends a run early."""
    from comfy.model_management import InterruptProcessingException

    return InterruptProcessingException, Failure


def modules_of(studio) -> list[torch.nn.Module]:
    return [studio.model.model, studio.clip.cond_stage_model, studio.vae.first_stage_model]


def traces(studio) -> dict:
    """Whatever could be left on the modules: hooks, forwards, patches, gradients, training mode."""
    found = {"patches": (len(studio.model.patches), len(studio.clip.patcher.patches),
                         len(studio.model.object_patches)),
             "options": repr(studio.model.model_options)}
    for i, whole in enumerate(modules_of(studio)):
        for name, module in whole.named_modules():
            hooks = [len(getattr(module, kind)) for kind in
                     ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")]
            found[i, name] = (hooks, "forward" in module.__dict__, module.training,
                              getattr(module, "activation", None))
        for name, weight in whole.named_parameters():
            found[i, name, "gradient"] = weight.grad is None
    return found


def weights(studio) -> list[dict]:
    return [{name: tensor.clone() for name, tensor in whole.state_dict().items()}
            for whole in modules_of(studio)]


def same(before: list[dict], after: list[dict]) -> bool:
    return all(torch.equal(tensor, b[name]) for a, b in zip(before, after, strict=True)
               for name, tensor in a.items())


@pytest.mark.parametrize("how", ["finished", "cancel", "failure"])
def test_everything_is_found_as_it_was(studio, how, stop_at, stopped):
    before, found, had = studio.ksampler(studio.model, SCENE, ""), traces(studio), weights(studio)
    settings = [{"gradient_checkpointing": True}] if how != "cancel" else None
    if how == "finished":
        studio.learn(training_settings=settings, preview_every=2)
    else:
        stop_at(2, how)
        with pytest.raises(stopped):
            studio.learn(training_settings=settings)
    assert same(had, weights(studio))
    assert {key: value for key, value in traces(studio).items() if value != found[key]} == {}
    assert torch.equal(before, studio.ksampler(studio.model, SCENE, ""))


def test_the_global_state_is_what_it_was(studio):
    import comfy.model_management as management

    torch.manual_seed(11)
    state, training = torch.get_rng_state(), getattr(management, "in_training", None)
    assert torch.is_inference_mode_enabled()
    studio.learn()
    assert torch.is_inference_mode_enabled() and getattr(management, "in_training", None) == training
    assert torch.equal(state, torch.get_rng_state())


def test_memory_returns(studio, count_tensors):
    """Counted from the second run on: the first makes what Python and ComfyUI keep for good."""
    def run(seed):
        bank = studio.learn(seed=seed, steps=2)
        model, clip, positive = studio.aggregate("<spot>", bank)
        studio.ksampler(model, positive, studio.encode(clip, ""))
        studio.regional("a meadow", [studio.region("<spot>", right=0.5)], bank)

    run(1)
    number, size = count_tensors()
    for seed in range(2, 5):
        run(seed)
    later, bytes_later = count_tensors()
    assert later <= 1.01 * number and bytes_later <= 1.01 * size


@pytest.mark.parametrize("how", ["cancel", "failure"])
def test_a_stopped_run_goes_on_exactly(studio, tmp_path, stop_at, stopped, how):
    whole = studio.learn(steps=6)["spot"]
    done = tmp_path / "concept_banks" / ".unfinished"
    for file in done.iterdir():
        file.unlink()
    steps = stop_at(3, how)
    with pytest.raises(stopped):
        studio.learn(steps=6)
    assert steps == [1, 2, 3]       # within one step
    assert len(list(done.glob("*.checkpoint"))) == 1
    stop_at(-1, how)
    steps.clear()
    resumed = studio.learn(steps=6)["spot"]
    assert steps == [4, 5, 6]
    assert all(torch.equal(whole.tokens.vectors[name], vectors)
               for name, vectors in resumed.tokens.vectors.items())
    for key, delta in whole.deltas.items():
        assert torch.equal(delta.up,
                           resumed.deltas[key].up) and torch.equal(delta.down, resumed.deltas[key].down)


def test_cancelling_during_a_preview_does_not_wait_for_its_end(studio, monkeypatch, stopped):
    """A preview has many steps of its own: the button is looked at in each."""
    import comfy.model_management as management

    unet, calls = studio.model.model.diffusion_model, []
    forward = type(unet).forward

    def counting(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:      # two steps of learning, then the preview
            management.interrupt_current_processing()
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(unet), "forward", counting)
    with pytest.raises(stopped):
        studio.learn(steps=6, preview_every=2)
    assert len(calls) == 4


def test_the_second_run_of_a_graph_keeps_what_was_learned(studio, stop_at):
    bank = studio.learn()
    steps = stop_at(-1, "cancel")
    again = studio.learn(bank=[bank])
    assert again is bank and steps == []
    replaced = studio.learn(bank=[bank], if_known="learn it again", seed=4)
    assert steps == [1, 2, 3] and replaced.names == ["spot"]


def test_an_old_concept_stays_bit_for_bit_what_it_was(studio):
    first = studio.learn()
    before = {key: (delta.up.clone(), delta.down.clone()) for key, delta in first["spot"].deltas.items()}
    second = studio.learn(name="tom", noun="cat", bank=[first])
    assert first.names == ["spot"] and second.names == ["spot", "tom"]
    assert all(torch.equal(up, second["spot"].deltas[key].up)
               and torch.equal(down, second["spot"].deltas[key].down)
               for key, (up, down) in before.items())


@pytest.mark.parametrize("method", ["cidm", "finetune"])
def test_both_hosts_learn_the_same(demo, reference, bank, teach, method):
    from continual_concepts.core.bank.bank import ConceptBank
    from continual_concepts.core.comfy.backbone import ComfyBackbone

    runs = []
    with torch.inference_mode(False):
        backbone = ComfyBackbone(*demo)
        for host in (backbone, reference):
            with backbone.training():
                first = teach(host, ConceptBank(host.layout), "rex", method, steps=5)
                second = teach(host, first.bank, "mimi", method, steps=5, noun="cat")
            runs.append((first, second))
    for ours, theirs in zip(*runs, strict=True):
        assert torch.allclose(torch.tensor(ours.losses), torch.tensor(theirs.losses), rtol=1e-4)
        for encoder, vectors in ours.concept.tokens.vectors.items():
            assert torch.allclose(vectors, theirs.concept.tokens.vectors[encoder], atol=2e-3)


def test_a_lora_on_the_model_counts_while_learning(studio, make_concept):
    """As for sampling: what is loaded before the learner belongs to the base."""
    from continual_concepts.core.comfy.apply import fold
    from continual_concepts.core.comfy.backbone import ComfyBackbone

    sites = ComfyBackbone(studio.model, studio.clip).sites
    with_lora = fold(studio.model, sites, make_concept(studio.bank.layout, size=0.3).deltas, False)
    before = [studio.ksampler(model, SCENE, "") for model in (studio.model, with_lora)]
    concepts = [studio.learn(model=model)["spot"] for model in (studio.model, with_lora, studio.model)]
    ups = [concept.deltas[0, "to_k"].up for concept in concepts]
    assert torch.equal(ups[0], ups[2]) and not torch.equal(ups[0], ups[1])
    assert concepts[0].info.provenance.base == concepts[1].info.provenance.base
    assert torch.equal(before[1], studio.ksampler(with_lora, SCENE, ""))
    assert torch.equal(before[0], studio.ksampler(studio.model, SCENE, ""))


def test_no_gradient_for_frozen_weights(comfyui, studio):
    """Also when the model was not loaded under inference mode."""
    from continual_concepts.core.comfy.demo import load_demo

    with torch.inference_mode(False):
        model, clip, vae = load_demo(name="embedded-64")
    studio.learn(model=model, clip=clip, vae=vae)
    for whole in (model.model, clip.cond_stage_model, vae.first_stage_model):
        assert all(weight.grad is None for weight in whole.parameters())


# What is said while it learns


@pytest.fixture
def judged(studio):
    """judged(...): all outputs of ConceptLearner with a CLIP_VISION that gives the next of these
    vectors' cosines."""
    def run(scores, **other):
        left = iter(scores)

        class Vision:
            def encode_image(self, image, crop=True):
                if image.shape[1] == 40:      # the photos
                    return {"image_embeds": torch.tensor([[1.0, 0.0]])}
                Vision.count = getattr(Vision, "count", 0) + 1
                if Vision.count % 4 == 1:      # an evaluation is four pictures
                    Vision.score = next(left)
                return {"image_embeds": torch.tensor([[Vision.score, (1 - Vision.score**2) ** 0.5]])}

        photos = torch.rand(2, 40, 40, 3, generator=torch.Generator().manual_seed(2))
        inputs = {"model": studio.model, "clip": studio.clip, "vae": studio.vae, "images": [photos],
                  "name": "spot", "class_noun": "dog", "kind": "object", "method": "bound", "steps": 12,
                  "lr": 1e-2, "token_lr": 1e-2, "resolution": studio.side, "batch_size": 1, "seed": 0,
                  "preview_every": 2, "if_known": "keep it", "clip_vision": Vision(), "stop_after": 2,
                  **other}
        listed = {key: value if isinstance(value, list) else [value] for key, value in inputs.items()}
        return studio.pack.ConceptLearner.execute(**listed)

    return run


def test_it_stops_when_live_samples_get_no_better(judged):
    bank, loss, previews, *_ = judged([0.1, 0.5, 0.4, 0.5])
    assert bank["spot"].info.provenance.steps == 8
    assert len(previews) == 4 and loss.shape[-1] == 3      # the last evaluation is not repeated


def test_showing_likeness_changes_nothing_that_is_learned(judged, studio):
    shown = judged([0.1, 0.2, 0.3, 0.2, 0.1, 0.3], stop_after=0)[0]
    plain = judged([], stop_after=0, clip_vision=None, preview_every=0)[0]
    for one, two in zip(shown["spot"].deltas.values(), plain["spot"].deltas.values(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.tensors(), two.tensors(), strict=True))


def test_l2dm_describes_pictures_with_the_clip_vision(judged):
    class Means:
        def encode_image(self, image, crop=True):
            return {"image_embeds": image.mean((1, 2))}

    settings = {"method": "l2dm", "steps": 1, "stop_after": 0, "preview_every": 0}
    described = judged([], clip_vision=Means(), **settings)[0].shared["l2dm"]["features"]
    plain = judged([], clip_vision=None, **settings)[0].shared["l2dm"]["features"]
    assert described.shape == (2, 3) and plain.shape[1] > 3


def test_the_encoder_for_photos_tells_when_to_stop_and_nothing_else(judged, monkeypatch):
    from continual_concepts.nodes import images

    shown = []

    def encode(pictures):
        shown.extend(pictures)
        return torch.nn.functional.normalize(torch.stack([p.mean((1, 2)) for p in pictures]), dim=1)

    monkeypatch.setattr(images, "photo_encode", lambda layout: encode)
    stopped = judged([], clip_vision=None, stop_after=1)[0]
    assert shown and stopped["spot"].info.provenance.steps <= 12
    described = judged([], clip_vision=None, method="l2dm", steps=1, stop_after=0, preview_every=0)[0]
    assert described.shared["l2dm"]["features"].shape[1] > 3      # learned the same as without it


@pytest.mark.parametrize("lacking", [{"clip_vision": None}, {"preview_every": 0}])
def test_stopping_needs_something_to_tell_when(judged, lacking):
    from continual_concepts.core.errors import ConceptError

    with pytest.raises(ConceptError, match="stop_after is 2 but"):
        judged([], **lacking)


def test_older_concepts_are_drawn_beside_their_thumbnails(judged, bank):
    strip = judged([], bank=bank, stop_after=0, clip_vision=None, preview_every=0, show_older=True)[3]
    none = judged([], stop_after=0, clip_vision=None, preview_every=0)[3]
    assert strip.shape[2] != none.shape[2] or strip.shape[1] != none.shape[1]


def test_the_line_below_the_node_says_what_people_ask(judged, monkeypatch):
    from comfy_execution.utils import CurrentNodeContext

    from continual_concepts.nodes import progress

    said = []
    for way in ("say", "_send"):      # during the run, and of the result
        monkeypatch.setattr(progress, way, lambda node, text, by="": said.append(text))
    with CurrentNodeContext("prompt", "7"):
        judged([0.1, 0.2, 0.3, 0.2, 0.1, 0.3], stop_after=0)
    assert said.pop(0).startswith("encoding ")
    assert said.pop().startswith("2 photos, ")      # at the end, the notes stand there
    assert len(said) == 12 and said[0].startswith("step 1 of 12, loss ") and "likeness 10.0" in said[2]
    assert said[6].splitlines()[0].endswith(" left")
    assert all("\nthere are only 2 photos" in line for line in said)      # a warning stays in sight
    assert [progress.duration(s) for s in (7, 61, 3700)] == ["7 s", "1 min 1 s", "1 h 1 min"]


@pytest.mark.parametrize("every", [0, 2])
def test_the_last_preview_is_on_the_node_at_the_end(studio, monkeypatch, every):
    """The page shows the newest preview, and not the picture that a node gives at its end."""
    import comfy.utils

    sent = []
    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute",
                        lambda bar, value, total, preview=None: sent.append((value, preview is not None)))
    studio.learn(steps=3, preview_every=every)
    shown = [value for value, has_preview in sent if has_preview]
    assert shown == ([2, 3] if every else []) and sent[-1][0] == 3

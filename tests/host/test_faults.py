"""What goes wrong in the host: memory runs out, a person cancels, something raises, models are unloaded,
libraries are missing.

It ends in one sentence or the host's own exception, the models are what they were, and the next run gives
what it gives without the fault.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from continual_concepts.core.errors import ConceptError
from continual_concepts.core.training import checkpoint

pytestmark = pytest.mark.usefixtures("as_in_comfyui", "own_folder")
OUT_OF_MEMORY = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)
SCENE = "a photo of a red dog on a beach"


@pytest.fixture(autouse=True)
def short_previews(pack, monkeypatch):
    """Of two steps."""
    from continual_concepts.nodes import learning

    settings = learning.SampleSettings
    monkeypatch.setattr(learning, "SampleSettings", lambda **given: settings(**given | {"steps": 2}))


def checkpoints(folder) -> list:
    return sorted((folder / "concept_banks" / ".unfinished").glob("*.checkpoint"))


@pytest.fixture
def interrupt(comfyui):
    from comfy.model_management import InterruptProcessingException

    return InterruptProcessingException


@pytest.fixture
def untouched(studio):
    """untouched(): fails when MODEL, CLIP or VAE are not what they were."""
    def state():
        wholes = (studio.model.model, studio.clip.cond_stage_model, studio.vae.first_stage_model)
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in m.__dict__)
                 for whole in wholes for m in whole.modules()]
        patches = (len(studio.model.patches), len(studio.clip.patcher.patches),
                   repr(studio.model.model_options))
        return [{name: tensor.clone() for name, tensor in whole.state_dict().items()}
                for whole in wholes], hooks, patches

    weights, *others = state()

    def check() -> None:
        now, *now_others = state()
        assert all(torch.equal(tensor, after[name]) for before, after in zip(weights, now, strict=True)
                   for name, tensor in before.items())
        assert now_others == others and torch.is_inference_mode_enabled()

    return check


def tensors_of(concept) -> list:
    return [*concept.tokens.vectors.values(),
            *(t for _, delta in sorted(concept.deltas.items()) for t in delta.tensors())]


def same(one, two) -> bool:
    if one.info.provenance.steps != two.info.provenance.steps:
        return False
    return all(map(torch.equal, tensors_of(one), tensors_of(two)))


@pytest.fixture
def at_call(monkeypatch):
    """at_call(owner, name, call, error): that call of `owner.name` raises instead; returns the calls seen so
    far."""
    def arrange(owner, name: str, call: int, error, only_once: bool = True) -> list:
        original, seen = getattr(owner, name), []

        def raising(*args, **kwargs):
            seen.append(1)
            if len(seen) == call or (len(seen) > call and not only_once):
                raise error
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, raising)
        return seen

    return arrange


@pytest.fixture
def unet(studio):
    return type(studio.model.model.diffusion_model)


# Memory


def test_memory_runs_out_while_learning(studio, whole_run, unet, at_call, monkeypatch, untouched):
    at_call(unet, "forward", 2, OUT_OF_MEMORY("no memory"), only_once=False)
    with pytest.raises(ConceptError,
                       match="memory ran out at step 2 of concept 'spot' .*batch_size; the bank is "
                             "unchanged") as caught:
        studio.learn(steps=4)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    untouched()
    assert same(studio.learn(steps=4)["spot"], whole_run)


def test_a_measure_that_helps_is_told_and_changes_nothing(studio, whole_run, unet, at_call, untouched):
    at_call(unet, "forward", 2, OUT_OF_MEMORY("no memory"))
    result = studio.learner(steps=4)
    assert same(result.args[0]["spot"], whole_run)
    assert "memory ran out at step 2; learning continues with gradient checkpointing" in result.ui["text"][0]
    untouched()


def test_memory_runs_out_with_more_pictures_at_once(studio, unet, monkeypatch, untouched):
    """If recomputed activations do not help, then half of them at a time. That rounds otherwise, no more."""
    original, seen = unet.forward, []

    def forward(self, x, *args, **kwargs):
        seen.append(len(x))
        if len(seen) > 1 and len(x) > 1:
            raise OUT_OF_MEMORY("no memory")
        return original(self, x, *args, **kwargs)

    monkeypatch.setattr(unet, "forward", forward)
    parts = studio.learn(batch_size=2)["spot"]
    assert seen == [2, 2, 2, 1, 1, 1, 1] and parts.info.provenance.steps == 3
    monkeypatch.undo()
    untouched()


@pytest.mark.parametrize("call", [2, pytest.param(1, marks=pytest.mark.slow),
                                  pytest.param(3, marks=pytest.mark.slow)])
def test_memory_runs_out_while_sampling_with_regions(studio, unet, at_call, monkeypatch, untouched, call):
    def run():
        regions = [studio.region("<rex>", right=0.5), studio.region("<mimi>", left=0.5)]
        return studio.regional("a photo in a meadow", regions, studio.bank, region_noise=True, solo=0.4)

    whole = run()
    at_call(unet, "forward", call, OUT_OF_MEMORY("no memory"))
    with pytest.raises(OUT_OF_MEMORY):
        run()
    monkeypatch.undo()
    untouched()
    assert torch.equal(run(), whole)


def test_memory_runs_out_in_a_preview(studio, whole_run, unet, at_call, monkeypatch, untouched):
    at_call(unet, "forward", 4, OUT_OF_MEMORY("no memory"))      # two steps, then the preview's second
    with pytest.raises(OUT_OF_MEMORY):
        studio.learn(steps=4, preview_every=2)
    monkeypatch.undo()
    untouched()
    assert same(studio.learn(steps=4, preview_every=2)["spot"], whole_run)


# Cancelling, and errors, at every stage of the learner


STAGES = {"photos": 0, "words": 0, "first step": 0, "backward": 1, "optimizer": 0, "between steps": 3,
          "preview": 2, "preview's picture": 2,
          # -> steps that are safe in a checkpoint then, 0 = there is none
          "last step": 3, "last preview": 4}
SLOW = [name for name in STAGES if name not in ("photos", "optimizer", "preview", "last step")]

@pytest.fixture
def fault_at(studio, unet, at_call, monkeypatch):
    """fault_at(stage, error): the next run of four steps with a preview every two, itself of two steps, has
    it there."""
    from continual_concepts.nodes import progress

    def arrange(stage: str, error) -> None:
        if stage == "photos":
            at_call(type(studio.vae), "encode", 1, error)
        elif stage == "words":
            at_call(type(studio.clip.cond_stage_model.clip_l), "forward", 1, error)
        elif stage == "backward":
            at_call(torch.Tensor, "backward", 2, error)
        elif stage == "optimizer":
            at_call(torch.optim.AdamW, "zero_grad", 3, error)
        elif stage == "between steps":
            at_call(progress.Reporter, "__call__", 3, error)
        elif stage == "preview's picture":
            at_call(type(studio.vae), "decode", 1, error)
        elif stage == "last preview":
            at_call(type(studio.vae), "decode", 2, error)
        else:
            at_call(unet, "forward", {"first step": 1, "preview": 4, "last step": 6}[stage], error)

    return arrange


@pytest.fixture(scope="module")
def whole_run(studio):
    """What a run of four steps learns; previews change nothing of it."""
    with torch.inference_mode():
        return studio.learn(steps=4, if_known="learn it again")["spot"]


@pytest.mark.parametrize("stage",
                         [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in STAGES])
@pytest.mark.parametrize("kind", ["cancel", pytest.param("failure", marks=pytest.mark.slow)])
def test_a_fault_at_any_stage(studio, whole_run, fault_at, monkeypatch, interrupt, untouched, own_folder,
                              stage, kind):
    error = interrupt() if kind == "cancel" else RuntimeError("somebody else's error")
    fault_at(stage, error)
    with pytest.raises(type(error)) as caught:
        studio.learn(steps=4, preview_every=2)
    assert caught.value is error
    assert [len(checkpoint.load(file)["losses"])
            for file in checkpoints(own_folder)] == [STAGES[stage]] * (STAGES[stage] > 0)
    monkeypatch.undo()
    untouched()
    assert same(studio.learn(steps=4, preview_every=2)["spot"], whole_run)


def test_the_button_itself(studio, whole_run, interrupt, untouched):
    """Pressed before a run begins: the host's exception, and no longer pressed for the next one."""
    import comfy.model_management as management

    management.interrupt_current_processing()
    with pytest.raises(interrupt):
        studio.learn(name="tom")
    assert not management.interrupt_processing
    untouched()
    assert same(studio.learn(steps=4)["spot"], whole_run)


# Models that go and come


@pytest.fixture
def unloading(monkeypatch, comfyui):
    """unloading(): from then on every model is unloaded after every step; returns how many were left each
    time."""
    import comfy.model_management as management

    from continual_concepts.nodes import progress

    before, seen = progress.Reporter.__call__, []

    def report(self, info):
        before(self, info)
        management.unload_all_models()
        management.free_memory(1e30, management.get_torch_device())      # where that is the processor, too
        # None: of clones that are gone
        seen.append(sum(one.model is not None for one in management.current_loaded_models))

    return lambda: monkeypatch.setattr(progress.Reporter, "__call__", report) or seen


@pytest.mark.parametrize(("method", "with_lora"), [
    ("cidm", True), ("finetune", True), pytest.param("finetune", False, marks=pytest.mark.slow)])
def test_models_unloaded_between_steps(studio, make_concept, unloading, untouched, method, with_lora):
    """Also those that carry a LoRA, which the host takes off the weights then; finetune learns on what is
    folded into them."""
    from continual_concepts.core.comfy.apply import fold
    from continual_concepts.core.comfy.backbone import ComfyBackbone

    sites, clip = ComfyBackbone(studio.model, studio.clip).sites, studio.clip.clone()
    model = fold(studio.model, sites, make_concept(studio.bank.layout, size=0.3).deltas,
                 False) if with_lora else studio.model
    key, weight = next(item for item in clip.patcher.model.state_dict().items()
                       if item[0].endswith("q_proj.weight"))
    clip.add_patches({key: ("diff", (torch.full(weight.shape, 0.05),))} if with_lora else {})
    first = studio.learn(model=model, clip=clip, name="tom", noun="cat", method=method, steps=2)
    whole = studio.learn(model=model, clip=clip, method=method, bank=[first])["spot"]
    assert same(whole, studio.learn(model=model, method=method, bank=[first])["spot"]) != with_lora
    for file in checkpoints(studio_output()):
        file.unlink()
    seen = unloading()
    again = studio.learn(model=model, clip=clip, method=method, bank=[first])["spot"]
    assert seen == [0, 0, 0] and same(again, whole)
    untouched()


def studio_output():
    from pathlib import Path

    import folder_paths

    return Path(folder_paths.get_output_directory())


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_model_that_is_loaded_in_part(studio, make_concept, untouched, share):
    """As on a small graphics card: some weights wait elsewhere, and a LoRA is put on them when they are
    used."""
    import comfy.model_management as management

    from continual_concepts.core.comfy.apply import fold
    from continual_concepts.core.comfy.backbone import ComfyBackbone

    sites = ComfyBackbone(studio.model, studio.clip).sites
    model = fold(studio.model, sites, make_concept(studio.bank.layout, size=0.3).deltas, False)
    whole, picture = studio.learn(model=model)["spot"], studio.ksampler(model, SCENE, "")
    for file in checkpoints(studio_output()):
        file.unlink()
    management.load_models_gpu([model])
    model.partially_unload(model.offload_device, (1 - share) * model.model_size())
    assert model.model.model_lowvram
    again = studio.learn(model=model)["spot"]
    assert same(again, whole) and torch.equal(studio.ksampler(model, SCENE, ""), picture)
    management.unload_all_models()
    untouched()


# Libraries that a ComfyUI may lack


OPTIONAL = ["peft", "bitsandbytes", "matplotlib", "accelerate", "xformers", "sageattention", "triton",
            "torchvision"]
LEARNING = """
import sys
for name in {missing!r}:
    sys.modules[name] = None
sys.path.insert(0, {comfyui!r})
from comfy.cli_args import args
args.cpu = True
import pytest
arguments = ["-q", "-x", "-p", "no:cacheprovider", {test!r}]
sys.exit(pytest.main([*arguments, "-k", "test_memory_runs_out_in_a_preview"]))
"""


@pytest.mark.slow
def test_without_optional_libraries(comfyui):
    """Nodes load, learn and draw. (tqdm and einops are ComfyUI's own needs.)"""
    code = LEARNING.format(missing=OPTIONAL, comfyui=str(comfyui), test=__file__)
    ran = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-2000:]


def test_an_optimiser_of_a_missing_library(studio, monkeypatch):
    for name in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConceptError, match="where bitsandbytes is installed"):
        studio.learn(training_settings=[{"optimizer": "AdamW8bit"}])

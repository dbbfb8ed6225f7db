"""Puts a real ComfyUI on the path: COMFYUI_PATH, else the ComfyUI whose custom_nodes this checkout lies in,
else ~/comfy/ComfyUI."""

from __future__ import annotations

import asyncio
import gc
import importlib
import importlib.util
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from .make_sdxl import Latents, tiny_xl_clip, tiny_xl_model

ROOT = Path(__file__).resolve().parents[2]
SMALL = "embedded-64"      # most tests run on the smaller base; test_embedded_bases.py has all


def find_comfyui() -> Path | None:
    named = os.environ.get("COMFYUI_PATH")
    around = [ROOT.parents[1]] if ROOT.parent.name == "custom_nodes" else []
    candidates = [Path(named)] if named else [*around, Path.home() / "comfy" / "ComfyUI"]
    return next((path for path in candidates if (path / "comfy" / "model_patcher.py").is_file()), None)


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """Its folder, importable and set to CPU; skips when there is none or when this Python lacks what it
    needs."""
    path = find_comfyui()
    if path is None:
        pytest.skip("no ComfyUI found: set COMFYUI_PATH to its folder")
    sys.path.insert(0, str(path))
    try:
        from comfy.cli_args import args

        args.cpu = True
        import comfy.sd  # noqa: F401
    except ImportError as error:
        pytest.skip(f"this Python cannot run the ComfyUI in {path}: {error}")
    if importlib.util.find_spec("comfyui_version") is not None:
        import comfyui_version

        print(f"ComfyUI {comfyui_version.__version__} in {path}")
    return path


@contextmanager
def _directory(kind: str, folder: Path):
    """ComfyUI's directory of this kind, `input` or `output`, is `folder` for a while."""
    import folder_paths

    get, put = (getattr(folder_paths, f"{verb}_{kind}_directory") for verb in ("get", "set"))
    before = get()
    put(str(folder))
    yield folder
    put(before)


@pytest.fixture
def own_folder(comfyui, tmp_path):
    """An output folder of this test's own: checkpoints, banks and exports of one test are no other test's."""
    with _directory("output", tmp_path) as folder:
        yield folder


@pytest.fixture
def own_inputs(comfyui, tmp_path):
    """An empty input folder of this test's own."""
    with _directory("input", tmp_path) as folder:
        yield folder


@pytest.fixture(scope="session")
def demo(comfyui):
    """MODEL, CLIP, VAE of the smaller embedded base, made under inference mode as ComfyUI's loaders do."""
    from continual_concepts.core.comfy.demo import load_demo

    with torch.inference_mode():
        return load_demo(name=SMALL)


@pytest.fixture(scope="session")
def reference():
    """The same base in the diffusers host."""
    from continual_concepts.core.demo.base import load_base
    from continual_concepts.core.demo.bases import file_of

    return load_base(file_of(SMALL))


@pytest.fixture(scope="session")
def bank(reference, make_concept):
    """Two layer-wise concepts and one with a single copy, of random numbers that change pictures visibly."""
    from continual_concepts.core.bank.bank import ConceptBank

    bank = ConceptBank(reference.layout)
    for i, (name, layerwise) in enumerate((("rex", True), ("mimi", True), ("blueprint", False))):
        bank = bank.add(make_concept(reference.layout, name, seed=i, layerwise=layerwise, size=0.3))
    return bank


@pytest.fixture(scope="session")
def pack(comfyui, tmp_path_factory):
    """Our node classes by their ids. What nodes write goes to folders of this run, `output` and `temp` below
    `pack.folder`."""
    import folder_paths

    folder = tmp_path_factory.mktemp("comfyui")
    folder_paths.models_dir = str(folder / "models")
    for name in ("output", "temp", "input"):
        (folder / name).mkdir()
        getattr(folder_paths, f"set_{name}_directory")(str(folder / name))
    extension = importlib.import_module("continual_concepts.nodes").Extension()
    classes = {cls.define_schema().node_id: cls for cls in asyncio.run(extension.get_node_list())}
    return SimpleNamespace(folder=folder, **classes)


@pytest.fixture
def as_in_comfyui():
    """ComfyUI runs nodes under inference mode; a module of node tests asks for it with `pytestmark`."""
    with torch.inference_mode():
        yield


class Studio:
    """The embedded base, ComfyUI's own nodes and ours, with short defaults: pictures are latents of 16 x 16
    cells, steps are few."""

    def __init__(self, pack, demo, bank) -> None:
        import nodes

        self.pack, self.bank, self.stock = pack, bank, nodes
        self.model, self.clip, self.vae = demo
        self.channels = getattr(self.vae, "latent_channels", 4)      # stand-ins of tests have four
        self.side = 8 * self.vae.downscale_ratio      # of the photos that `learn` takes

    @staticmethod
    def encode(clip, text: str):
        return clip.encode_from_tokens_scheduled(clip.tokenize(text))

    def noise(self, count: int = 1, height: int = 16, width: int = 16, seed: int = 9) -> torch.Tensor:
        shape = (count, self.channels, height, width)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def latent(self, count: int = 1, height: int = 16, width: int = 16, content: bool = False,
               **more) -> dict:
        noise = self.noise(count, height, width)
        return {"samples": noise if content else torch.zeros_like(noise), **more}

    def ksampler(self, model, positive, negative, latent=None, seed=1, steps=3, cfg=4.0, sampler="euler",
                 scheduler="normal", denoise=1.0):
        """ComfyUI's KSampler; prompts may be texts for the plain CLIP."""
        positive, negative = (self.encode(self.clip, p) if isinstance(p, str) else p
                              for p in (positive, negative))
        latent = self.latent() if latent is None else latent
        return self.stock.common_ksampler(model, seed, steps, cfg, sampler, scheduler, positive, negative,
                                          latent, denoise)[0]["samples"]

    def regional(self, scene, regions=(), bank=None, model=None, clip=None, latent=None, **other):
        """Our sampler; returns latents. `regions` from `region` below."""
        settings = {"negative_scene": "", "seed": 1, "steps": 3, "cfg": 4.0, "sampler_name": "euler",
                    "scheduler": "normal", "denoise": 1.0,
                    "strength": 1.0, "region_noise": False, "alpha": 0.1, "outside": "keep",
                    "solo": 0.0} | other
        latent = self.latent() if latent is None else latent
        node = self.pack.RegionalConceptSampler
        return node.execute(model=model or self.model, clip=clip or self.clip, latent_image=latent,
                            scene=scene, bank=bank,
                            regions=list(regions) or None, **settings)[0]["samples"]

    def region(self, prompt, left=0.0, top=0.0, right=1.0, bottom=1.0, strength=1.0, start=0.0, end=1.0,
               feather=0.0, **other):
        """One region of our region node."""
        return self.pack.ConceptRegion.execute(prompt, left, top, right, bottom, strength, start, end,
                                               feather, **other)[0][-1]

    def apply_regions(self, regions, positive, negative=None, model=None, clip=None, **other):
        """model, positive and negative of our node Apply Regions."""
        node = self.pack.ConceptRegionsApply
        return node.execute(model or self.model, clip or self.clip, positive, list(regions), negative,
                            **other).args[:3]

    def aggregate(self, prompt, bank=None, mode="sharp", strength=1.0, model=None, clip=None, concept=""):
        """model, clip and conditioning of ElasticWeightAggregate."""
        node = self.pack.ElasticWeightAggregate
        return node.execute(model or self.model, clip or self.clip, prompt, mode, strength, concept,
                            bank).args[:3]

    def photos(self, count: int = 2, size: int | None = None):
        """An IMAGE of random photos."""
        side = size or self.side
        return torch.rand(count, side, side, 3, generator=torch.Generator().manual_seed(3))

    def learn(self, *given, **named):
        """The bank that `learner` gives."""
        return self.learner(*given, **named)[0]

    def learner(self, images=None, name="spot", noun="dog", model=None, clip=None, vae=None, kind="object",
                method="cidm", **other):
        """What ConceptLearner gives; it takes lists."""
        settings = {"steps": 3, "lr": 1e-2, "token_lr": 1e-2, "resolution": self.side, "batch_size": 1,
                    "seed": 0,
                    "preview_every": 0,
                    "if_known": "keep it"} | other
        inputs = {"model": model or self.model, "clip": clip or self.clip, "vae": vae or self.vae,
                  "name": name, "class_noun": noun,
                  "images": self.photos() if images is None else images, "kind": kind, "method": method,
                  **settings}
        listed = {key: value if isinstance(value, list) else [value] for key, value in inputs.items()}
        return self.pack.ConceptLearner.execute(**listed)


    def check_loaded_in_part(self, bank, prompt: str, share: float) -> None:
        """A small graphics card holds a share of the weights; the others are fetched, with patches, when they
        are used. Pictures, and learning `<spot>` of `bank` again, stay the same."""
        import comfy.model_management as management

        model, clip, positive = self.aggregate(prompt, bank)
        negative = self.encode(clip, "")
        whole = self.ksampler(model, positive, negative)
        management.load_models_gpu([model])
        model.partially_unload(model.offload_device, (1 - share) * model.model_size())
        assert model.model.model_lowvram
        assert torch.equal(self.ksampler(model, positive, negative), whole)
        again = self.learn(method="slots", steps=2)["spot"]
        for place, delta in bank["spot"].deltas.items():
            assert all(torch.equal(*pair) for pair in zip(delta.tensors(), again.deltas[place].tensors(),
                                                          strict=True))
        management.unload_all_models()


@pytest.fixture(scope="session")
def studio(pack, demo, bank):
    return Studio(pack, demo, bank)


@pytest.fixture(scope="session")
def carrying(studio, mixed):
    """MODEL and CLIP with the concepts of `mixed`."""
    with torch.inference_mode():
        return studio.aggregate("", mixed)[:2]


@pytest.fixture(scope="session")
def draw(studio, carrying):
    """draw(positive): KSampler's latents of a prompt or CONDITIONING."""
    def drawn(positive, model=None, negative="", clip=None):
        positive, negative = (studio.encode(clip or carrying[1], each) if isinstance(each, str) else each
                              for each in (positive, negative))
        return studio.ksampler(model or carrying[0], positive, negative, steps=2)

    return drawn


@pytest.fixture(scope="session")
def contents(mixed):
    """contents(conditioning): its layers, words and strengths, as a Context."""
    from continual_concepts.core.comfy.apply import context_of

    return lambda conditioning: context_of(conditioning, mixed.layout.copies, tuple(mixed.names))


@pytest.fixture(scope="session")
def tiny_xl(comfyui, tiny_sdxl):
    """The core tests' SDXL with random weights as MODEL, CLIP and VAE."""
    with torch.inference_mode():
        return tiny_xl_model(tiny_sdxl.unet), tiny_xl_clip(tiny_sdxl.text), Latents()


@pytest.fixture
def count_tensors():
    """count_tensors(): how many tensors there are, and how many bytes they hold."""
    def count() -> tuple[int, int]:
        gc.collect()
        storages = {}
        tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
        for tensor in tensors:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return len(tensors), sum(storages.values())

    return count


@pytest.fixture(scope="session")
def has_patches(comfyui):
    from continual_concepts.core.comfy.families import flux

    if not flux.HAS_PATCHES:
        pytest.skip("this ComfyUI has no attention patches in Flux")


@pytest.fixture(scope="session")
def has_krea2(comfyui):
    pytest.importorskip("comfy.ldm.krea2.model", reason="this ComfyUI has no Krea 2")


@pytest.fixture
def short_previews(pack, monkeypatch):
    """Previews of the learner take two steps."""
    from continual_concepts.nodes import learning

    settings = learning.SampleSettings
    monkeypatch.setattr(learning, "SampleSettings", lambda **given: settings(**given | {"steps": 2}))

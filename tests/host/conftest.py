"""Puts a real ComfyUI on the path: COMFYUI_PATH, else the ComfyUI whose custom_nodes this checkout lies in,
else ~/comfy/ComfyUI."""

from __future__ import annotations

import asyncio
import gc
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

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


@pytest.fixture
def own_folder(comfyui, tmp_path):
    """An output folder of this test's own: checkpoints, banks and exports of one test are no other test's."""
    import folder_paths

    before = folder_paths.get_output_directory()
    folder_paths.set_output_directory(str(tmp_path))
    yield tmp_path
    folder_paths.set_output_directory(before)


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
        return _model(tiny_sdxl.unet), _clip(tiny_sdxl.text), _Latents()


class _Latents:
    """A VAE whose latents are coarse pictures."""

    downscale_ratio = 4

    def encode(self, pixels):
        x = torch.nn.functional.avg_pool2d(pixels[..., :3].permute(0, 3, 1, 2), 4)
        return torch.cat([x, x[:, :1]], 1)

    def decode(self, latents):
        return torch.nn.functional.interpolate(latents[:, :3], scale_factor=4.0).permute(0, 2, 3, 1)

    first_stage_model = torch.nn.Identity()


def _model(unet):
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models
    import comfy.utils

    channels = unet.config.in_channels
    kind = comfy.supported_models.SDXL_instructpix2pix if channels == 8 else comfy.supported_models.SDXL

    class Config(kind):
        unet_extra_config: dict = {}

    config = Config({
        "image_size": 8, "in_channels": channels, "out_channels": 4, "model_channels": 32,
        "channel_mult": [1, 2], "num_res_blocks": [1, 1],
        "transformer_depth": [3, 3], "transformer_depth_output": [3, 3, 3, 3], "transformer_depth_middle": 3,
        "num_heads": 2,
        "num_head_channels": -1, "context_dim": 56, "use_spatial_transformer": True,
        "use_linear_in_transformer": False, "legacy": False,
        "adm_in_channels": 24 + 6 * 8, "num_classes": "sequential", "use_temporal_attention": False,
        "dtype": torch.float32})
    device = torch.device("cpu")
    model = config.get_model({}, device=device)
    model.embedder = comfy.model_base.Timestep(8)
    names, own = comfy.utils.unet_to_diffusers(config.unet_config), unet.state_dict()
    renamed = {names[name]: weight for name, weight in own.items()}
    missing, unexpected = model.diffusion_model.load_state_dict(renamed, strict=False)
    assert not missing and not unexpected
    return comfy.model_patcher.ModelPatcher(model, device, device)


def _clip(encoders):
    import comfy.sd
    import comfy.sd1_clip
    import comfy.sdxl_clip
    import comfy.supported_models_base

    from continual_concepts.core.demo import base

    widths = {encoder.name: encoder.width for encoder in encoders}

    def one(encoder):
        config, tokens = encoder.model.config, encoder.tokenizer
        clip = comfy.sd1_clip.SDClipModel(
            max_length=encoder.length, layer="hidden", layer_idx=0, layer_norm_hidden_state=False,
            dtype=torch.float32,
            textmodel_json_config=config.to_dict() | {"eos_token_id": tokens.eos_token_id},
            return_projected_pooled=encoder.name == "clip_g",
            special_tokens={"start": tokens.bos_token_id, "end": tokens.eos_token_id,
                            "pad": tokens.pad_token_id})
        embedding = clip.operations.Embedding(len(tokens), encoder.width, dtype=torch.float32)
        clip.transformer.set_input_embeddings(embedding)
        weights = {name if name.startswith(("text_model.", "text_projection"))
                   else f"text_model.{name}": weight
                   for name, weight in encoder.model.state_dict().items()
                   if not name.endswith("position_ids")}
        weights.setdefault("text_projection.weight", torch.eye(encoder.width))
        clip.transformer.load_state_dict(weights)
        return clip

    class Text(comfy.sdxl_clip.SDXLClipModel):
        def __init__(self, device="cpu", dtype=None, model_options=None) -> None:
            torch.nn.Module.__init__(self)
            self.clip_l, self.clip_g = (one(encoder) for encoder in encoders)
            self.dtypes = {torch.float32}

    class Tokenizer(comfy.sdxl_clip.SDXLTokenizer):
        def __init__(self, embedding_directory=None, tokenizer_data=None) -> None:
            for name, width in widths.items():
                setattr(self, name, comfy.sd1_clip.SDTokenizer(
                    str(base.TOKENIZER), max_length=encoders[0].length,
                    embedding_directory=embedding_directory, embedding_size=width,
                    embedding_key=name, tokenizer_data={}))

    return comfy.sd.CLIP(comfy.supported_models_base.ClipTarget(Tokenizer, Text), embedding_directory=None)


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

    if not flux._HAS_PATCHES:
        pytest.skip("this ComfyUI has no attention patches in Flux")

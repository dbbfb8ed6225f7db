"""Makes this checkout importable as `continual_concepts`, without putting its root on sys.path."""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def _load_package() -> None:
    """Imports the root `__init__.py` under the package's name, unless an editable install does that."""
    # `python -m pytest` puts the current directory there, and our nodes/ would then hide ComfyUI's nodes.py
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]
    init = ROOT / "__init__.py"
    found = importlib.util.find_spec("continual_concepts")
    if found is not None and found.origin is not None and Path(found.origin).resolve() == init:
        return
    if "continual_concepts" in sys.modules:
        raise RuntimeError("another copy of continual_concepts was imported before these tests")
    spec = importlib.util.spec_from_file_location("continual_concepts", init,
                                                  submodule_search_locations=[str(ROOT)])
    module = importlib.util.module_from_spec(spec)
    sys.modules["continual_concepts"] = module
    spec.loader.exec_module(module)


_load_package()
pytest_plugins = [f"continual_concepts.tests.{name}" for name in ("saved_models", "host_banks", "quick")]


def pytest_configure() -> None:
    """Random tests do not fail on a machine that is slow because it does other work, too."""
    if importlib.util.find_spec("hypothesis") is None:      # some environments of host tests have none
        return
    from hypothesis import HealthCheck, settings

    settings.register_profile("patient", settings.default, deadline=None,
                              suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("patient")


@pytest.hookimpl(hookwrapper=True)
def pytest_collection():
    """What is imported and collected stays, so the garbage collector need not look at it."""
    gc.disable()
    yield
    gc.enable()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what lies below tests/host and tests/live, before -m chooses."""
    for item in items:
        family = item.path.relative_to(ROOT / "tests").parts[0]
        if family in ("host", "live"):
            item.add_marker(family)


@pytest.fixture(scope="session")
def fixtures_dir() -> Path:
    """The committed reference data; its README says where each file comes from."""
    return ROOT / "tests" / "fixtures"


@pytest.fixture(scope="session")
def benchmark_photos() -> Path:
    """The folder with the photos of the CIFC benchmark, which are not part of the repository."""
    folder = Path(os.environ.get("CONTINUAL_CONCEPTS_SHARED") or ROOT.parent / "shared") / "data" / "cifc"
    if not folder.is_dir():
        pytest.skip("no benchmark photos: set CONTINUAL_CONCEPTS_SHARED to a folder that holds data/cifc")
    return folder


@pytest.fixture(scope="session")
def draw_photos():
    """draw_photos(folder, noun, count, side): JPEG files of one individual with captions; none is square."""
    import random

    from PIL import Image

    from continual_concepts.core.demo.render import render
    from continual_concepts.core.demo.scenes import random_scene, random_thing

    def draw(folder: Path, noun: str, count: int, side: int) -> Path:
        rng = random.Random(noun)
        folder.mkdir(parents=True)
        individual = random_thing(rng, noun)
        for i in range(count):
            picture = Image.fromarray(render(random_scene(rng, (individual,), "photo"), side))
            crop = (0, 0, side, side * 7 // 8) if i % 2 else (0, 0, side * 3 // 4, side)
            picture.crop(crop).save(folder / f"{i:02}.jpg", quality=90)
            (folder / f"{i:02}.txt").write_text(f"{noun} in picture {i}\n")
        return folder

    return draw


# The imports of the package stand inside the fixtures: the hygiene tests run without torch's friends.


def _seeded(build, seed: int):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def _unet(text_width: int, **other):
    from diffusers import UNet2DConditionModel

    shape = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (32, 64),
             "layers_per_block": 1,
        "attention_head_dim": 2, "cross_attention_dim": text_width, "norm_num_groups": 32,
        "down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    }
    return UNet2DConditionModel(**(shape | other))


def _vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(block_out_channels=(32, 32, 32), layers_per_block=1, norm_num_groups=32,
                         latent_channels=4, scaling_factor=0.5, down_block_types=("DownEncoderBlock2D",) * 3,
                         up_block_types=("UpDecoderBlock2D",) * 3)


def _text(name: str, seed: int, width: int = 32, length: int = 16, projected: bool = False,
          penultimate: bool = False):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from continual_concepts.core.demo import vocabulary
    from continual_concepts.core.hosts.diffusers import ClipText

    tokenizer = vocabulary.load(ROOT / "core" / "demo" / "assets" / "tokenizer")
    config = CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width,
                            num_hidden_layers=2,
                            num_attention_heads=2, max_position_embeddings=length, projection_dim=width,
                            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                            pad_token_id=tokenizer.pad_token_id)
    model = _seeded(lambda: (CLIPTextModelWithProjection if projected else CLIPTextModel)(config), seed)
    return ClipText(name, model, tokenizer, length, penultimate)


def _backbone(prediction: str, unet=None, text=None):
    from continual_concepts.core.hosts.diffusers import DiffusersBackbone
    from continual_concepts.core.model.schedule import NoiseSchedule

    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    schedule = NoiseSchedule(torch.cumprod(1 - betas, 0).float(), prediction)
    unet = _seeded(lambda: _unet(32), 1) if unet is None else unet
    return DiffusersBackbone(unet, _seeded(_vae, 2), text or (_text("clip_l", 3),), schedule)


@pytest.fixture(scope="session")
def tiny_backbone():
    """Stable Diffusion 1's structure with random weights: 7 sites, latents of 8 for 32 pixels, 14 tokens."""
    return _backbone("epsilon")


@pytest.fixture(scope="session")
def slim_backbone():
    """The same with one level and no middle, for tests that learn often: 3 sites."""
    one = {"block_out_channels": (32,), "down_block_types": ("CrossAttnDownBlock2D",),
           "up_block_types": ("CrossAttnUpBlock2D",), "mid_block_type": None}
    return _backbone("epsilon", _seeded(lambda: _unet(32, **one), 1))


@pytest.fixture(scope="session")
def tiny_backbone_v():
    """The same for v prediction."""
    return _backbone("v_prediction")


@pytest.fixture(scope="session")
def tiny_sdxl():
    """SDXL's structure: two text encoders, pooled text and sizes, several blocks per group; 21 sites."""
    unet = _seeded(lambda: _unet(56, transformer_layers_per_block=3, addition_embed_type="text_time",
                                 addition_time_embed_dim=8,
                                 projection_class_embeddings_input_dim=24 + 6 * 8), 4)
    return _backbone("epsilon", unet, (_text("clip_l", 5, penultimate=True),
                                       _text("clip_g", 6, 24, projected=True, penultimate=True)))


@pytest.fixture(scope="session")
def tiny_transformer():
    """The embedded transformer's structure with random weights: 3 sites, latents of 8 for 32 pixels, 14
    tokens."""
    from continual_concepts.core.demo.transformer import DiffusionTransformer
    from continual_concepts.core.hosts.transformer import TransformerBackbone
    from continual_concepts.core.model.flow import FlowSchedule

    def build():
        transformer = DiffusionTransformer(in_channels=4, model_channels=48, num_blocks=3, num_heads=2,
                                           crossattn_emb_channels=32, adaln_lora_dim=8, rope_ratio=0.0125)
        for parameter in transformer.parameters():      # some of them start at zero, norms at one
            parameter.data += 0.1 * torch.randn_like(parameter)
        return transformer

    return TransformerBackbone(_seeded(build, 11), _seeded(_vae, 2), _text("clip_l", 3),
                               FlowSchedule.shifted(3.0),
                               picture_size=32)


@pytest.fixture(scope="session")
def teach_two(teach):
    """teach_two(backbone, method): a bank with a dog <rex> and a cat <mimi>, learned in three steps each."""
    from continual_concepts.core.bank.bank import ConceptBank

    def run(backbone, method):
        bank = ConceptBank(backbone.layout)
        for name, noun in (("rex", "dog"), ("mimi", "cat")):
            bank = teach(backbone, bank, name, method, {"lr": 0.1}, noun=noun, steps=3).bank
        return bank

    return run


@pytest.fixture(scope="session")
def tiny_joint():
    """A transformer with joint attention and random weights: two double blocks and one single block."""
    from continual_concepts.core.demo.joint_transformer import JointTransformer
    from continual_concepts.core.hosts.joint import JointBackbone
    from continual_concepts.core.model.flow import FlowSchedule

    def build():
        transformer = JointTransformer(in_channels=4, hidden_size=32, depth=2, depth_single_blocks=1,
                                       num_heads=2, context_in_dim=32, mlp_ratio=2.0, theta=50.0)
        for parameter in transformer.parameters():      # some of them start at zero, norms at one
            parameter.data += 0.1 * torch.randn_like(parameter)
        return transformer

    return JointBackbone(_seeded(build, 13), _seeded(_vae, 2), _text("clip_l", 3), FlowSchedule.shifted(3.0),
                         picture_size=32)


@pytest.fixture(params=["epsilon", "v_prediction"])
def any_backbone(request, tiny_backbone, tiny_backbone_v):
    return tiny_backbone if request.param == "epsilon" else tiny_backbone_v


@pytest.fixture(scope="session")
def layout():
    """Three sites of different widths, two text encoders: enough for everything about banks."""
    from continual_concepts.core.model.sites import Site, SiteLayout

    sites = tuple(Site(i, f"down_blocks.{i}.attn2", i, 2, width, 5) for i, width in enumerate((4, 6, 8)))
    return SiteLayout(sites, (("clip_l", 3), ("clip_g", 2)))


@pytest.fixture(scope="session")
def make_concept():
    """make_concept(layout, name, seed, ...): a concept of random numbers that fits."""
    from continual_concepts.core.bank.concepts import Concept, ConceptInfo, Provenance
    from continual_concepts.core.bank.tokens import TokenGroup, default_words
    from continual_concepts.core.model.deltas import LowRankDelta
    from continual_concepts.core.model.sites import PROJECTIONS

    def make(layout, name="rex", seed=0, words=2, layerwise=True, method="cidm", rank=2, size=1.0,
             dtype=torch.float32, thumbnail=b"", composition=None):
        g = torch.Generator().manual_seed(seed)

        def random(*shape):
            return (torch.randn(*shape, generator=g) * size).to(dtype)

        names = default_words(name, words)
        vectors = {encoder: random(layout.copies if layerwise else 1, words, width)
                   for encoder, width in layout.text_widths}
        shapes = {(site.index, p): site.shape(p) for site in layout.sites for p in PROJECTIONS}
        deltas = {key: LowRankDelta(random(a, rank), random(rank, b), 0.5) for key, (a, b) in shapes.items()}
        origin = Provenance("", ("11", "22"), {"method": {"rank": rank}}, {"torch": "2"},
                            "2025-01-01T00:00:00+00:00", 3, 1.5)
        info = ConceptInfo(name, "dog", method, names, provenance=origin, composition=composition)
        return Concept(info, TokenGroup(names, vectors), deltas, thumbnail)

    return make


@pytest.fixture(scope="session")
def teach():
    """teach(backbone, bank, name, method, settings, ...): learns a concept from three random pictures.

    Keywords are TrainingConfig's.
    """
    from continual_concepts.core.data.framing import Framing, Picture
    from continual_concepts.core.data.training_set import prepare
    from continual_concepts.core.methods import Task, make
    from continual_concepts.core.training.config import TrainingConfig
    from continual_concepts.core.training.loop import learn

    def run(backbone, bank, name="rex", method="cidm", settings=None, callback=None, checkpoint_file=None,
            pictures=None, noun="dog", kind="object", say=None, **training):
        if pictures is None:
            g = torch.Generator().manual_seed(len(name))
            pictures = [Picture(torch.rand(3, 32, 32, generator=g) * 2 - 1, "", digest=f"{i}")
                        for i in range(3)]
        config = TrainingConfig(**({"steps": 3, "batch_size": 2, "resolution": 32, "flip": False} | training))
        data = prepare(backbone, pictures, name, noun,
                       Framing(config.resolution, config.framing, config.flip))
        chosen = make(method, {"lr": 1e-2, "token_lr": 1e-2, "stored": "float32"} | (settings or {}))
        return learn(Task(name, noun, backbone, bank, kind), chosen, data, config, callback, checkpoint_file,
                     say=say)

    return run


@pytest.fixture(scope="session")
def trials():
    """trials(few, many): how often a test that throws dice does so; many with `make verify`."""
    return lambda few, many: many if os.environ.get("CONTINUAL_CONCEPTS_VERIFY") else few


@pytest.fixture(scope="session")
def installed():
    """Skips where other processes could not import the package."""
    try:
        importlib.metadata.version("continual-concepts")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package is not installed here: pip install -e .")


@pytest.fixture(scope="session")
def script():
    """script(path): a Python file as a module; the tests' folders are no packages."""
    def load(path: Path):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load

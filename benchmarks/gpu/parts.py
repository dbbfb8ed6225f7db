"""The parts of the benchmark `gpu`. Import after `cost.standalone.start`."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.util import find_spec

import comfy.model_management
import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.bank.bank import ConceptBank
from ...core.bank.prompts import Vocabulary
from ...core.conditioning.encoding import encode_prompts
from ...core.methods import DEFAULT
from ...core.methods.base import Task, make
from ...core.model.processor import AttentionProcessor
from ...core.model.sites import PROJECTIONS
from ...core.training.planning import activation_bytes, concept_bytes
from ...core.training.trainer import Trainer
from ..cost.comfy_training import ComfyHost
from ..cost.rivals import RANK
from ..cost.synthetic import peak_gb, seconds
from ..cost.training import NEW, NOUN, Setup, random_set
from ..regional.boxes import boxes_of
from ..regional.comfy_cost import ComfyCost

# heads, their width, positions of picture and of text of a site: SD1.5 at 512, SDXL at 1024, Anima at 1024
HEADS = {"sd15": (8, 40, 4096, 77), "sdxl": (10, 64, 4096, 77), "anima": (16, 128, 4096, 512)}
WIDER = (0, 4, 8, 16)      # one, two or four word-bound concepts of rank 4 make a head wider


def _free() -> None:
    comfy.model_management.unload_all_models()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _timed(step: Callable[[], object], steps: int) -> dict:
    """Steps per second without the first one, and the peak of all."""
    marks: list[float] = []

    def run() -> None:
        for _ in range(steps + 1):
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            marks.append(time.perf_counter())

    peak = peak_gb(run)
    times = [later - earlier for earlier, later in zip(marks, marks[1:], strict=False)]
    return {"steps_per_second": 1 / statistics.median(times), "peak_gb": peak}


def learning(setup: Setup, steps: int) -> dict:
    """A step of the default method, with the plan of its memory, and of PEFT's LoRA in the same model."""
    host = ComfyHost(setup)
    backbone, data = host.backbone, random_set(host.backbone, setup.side)
    with torch.inference_mode(False), host.training():
        trainer = Trainer(Task(NEW, NOUN, backbone, ConceptBank(backbone.layout)), make(DEFAULT), data,
                          setup.training(steps + 1))
        with trainer.session():
            needed = activation_bytes(trainer)(trainer.measures) + concept_bytes(trainer)
            ours = _timed(trainer.step, steps)
    ours["planned_gb"] = (host.weights + needed) / 2**30
    del trainer
    row = {**asdict(setup), DEFAULT: ours, "peft": None}
    if find_spec("peft"):
        row["peft"] = _peft(host, data.latents[:1], steps)
    del host, backbone
    _free()
    return row


def _peft(host: ComfyHost, latents: Tensor, steps: int) -> dict:
    """A LoRA of PEFT on all projections of the sites, with the text encoded in advance. It changes the host's
    model."""
    from peft import LoraConfig, inject_adapter_in_model

    backbone, setup = host.backbone, host.setup
    names = [backbone.sites.path(site, name) for site in backbone.layout.sites for name in PROJECTIONS]
    generator = torch.Generator().manual_seed(1)
    with torch.inference_mode(False), host.training(), torch.enable_grad():
        prompts = Vocabulary([]).parse_all([f"a photo of a {NOUN}"])
        with torch.no_grad():
            context = encode_prompts(backbone, prompts, {})
        inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names), backbone.unet)
        weights = [weight for name, weight in backbone.unet.named_parameters() if "lora_" in name]
        for weight in weights:      # PEFT gives them the type of the base, which may have 8 bits
            weight.data = weight.data.float().to(backbone.device).normal_(std=0.01)
            weight.requires_grad_(True)
        optimizer = torch.optim.AdamW(weights, lr=1e-4)
        config, schedule = setup.training(steps), backbone.schedule

        def step() -> None:
            noise = torch.randn(latents.shape, generator=generator).to(latents)
            t = torch.randint(len(schedule), (1,), generator=generator).to(latents.device)
            is_mixed = config.precision == "bfloat16"
            with torch.autocast(latents.device.type, torch.bfloat16, enabled=is_mixed):
                output = backbone.predict(schedule.add_noise(latents, noise, t), t, context,
                                          AttentionProcessor())
            F.mse_loss(output.float(), schedule.target(latents, noise, t)).backward()
            optimizer.step()
            optimizer.zero_grad()

        return _timed(step, steps)


def regions(pixels: int, small: bool, steps: int, rounds: int) -> dict:
    """Four regions with a word-bound concept each, over a plain picture, on SD1.5's shape."""
    cost, pairs = ComfyCost(pixels, steps, small), []
    with torch.inference_mode():
        cost.regions(boxes_of(4))      # warms up
        for _ in range(rounds):
            both = cost.plain(), cost.regions(boxes_of(4))
            pairs.append(tuple(min(measured["seconds"]) for measured in both))
    del cost
    _free()
    return {"shape": "sd15", "pixels": pixels, "small": small, "regions": 4,
            "plain_seconds": min(plain for plain, _ in pairs),
            "over_plain": statistics.median(apart / plain for plain, apart in pairs)}


@torch.inference_mode()
def heads(rounds: int, small: bool) -> dict:
    """Attention with heads that word-bound concepts make wider, over plain heads, and whether PyTorch's flash
    kernel takes them."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    device = comfy.model_management.get_torch_device()
    dtype, rows = torch.float32 if device.type == "cpu" else torch.float16, {}
    for shape, (count, width, positions, text) in HEADS.items():
        positions = 64 if small else positions
        times = {}
        for more in WIDER:
            query = torch.randn(2, count, positions, width + more, device=device, dtype=dtype)
            key = torch.randn(2, count, text, width + more, device=device, dtype=dtype)

            def attend(query: Tensor = query, key: Tensor = key) -> Tensor:
                return F.scaled_dot_product_attention(query, key, key)

            attend()
            try:
                with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                    attend()
                is_flash = True
            except RuntimeError:
                is_flash = False
            times[more] = {"seconds": seconds(lambda: [attend() for _ in range(20)], rounds) / 20,
                           "flash": is_flash}
        rows[shape] = {str(more): {**row, "over_plain": row["seconds"] / times[0]["seconds"]}
                       for more, row in times.items()}
    return rows


def setups(small: bool) -> dict[str, Setup]:
    """Name of a part -> what learns there. small: narrow models and small pictures, for a rehearsal."""
    found = {"sd15": Setup("sd15", 512, base="float16", precision="bfloat16"),
             "sdxl": Setup("sdxl", 1024, base="float16", precision="bfloat16"),
             "anima, bfloat16": Setup("anima", 1024, base="bfloat16"),
             "anima, float8": Setup("anima", 1024, base="float8_e4m3fn")}
    if not small:
        return found
    return {name: replace(setup, pixels=64, base="float8_e4m3fn" if "float8" in name else "float32",
                          precision="float32", small=True) for name, setup in found.items()}

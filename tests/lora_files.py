"""Small LoRA files as other programs write them, each with the change that it stands for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from continual_concepts.core.model.sites import PROJECTIONS, SiteLayout

Weight = Callable[[int, str], Tensor]      # (site, projection) -> the base's weight
Sides = dict[str, Tensor]


class Writer:
    """Random tensors of one generator. Every method returns tensors by the end of their name, and the change
    `[a, b]` of the weight.
    """

    def __init__(self, seed: int = 0, size: float = 0.3) -> None:
        self.generator, self.size = torch.Generator().manual_seed(seed), size

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def lora(self, weight: Tensor) -> tuple[Sides, Tensor]:
        (a, b), rank, alpha = weight.shape, 3, 2.0
        up, down = self.size * self.random(a, rank), self.random(rank, b) / b**0.5
        sides = {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(alpha)}
        return sides, alpha / rank * up @ down

    def loha(self, weight: Tensor, rank: int = 2) -> tuple[Sides, Tensor]:
        (a, b), alpha = weight.shape, 1.5
        sides = {"hada_w1_a": self.random(a, rank), "hada_w1_b": self.random(rank, b) / b**0.5,
                 "hada_w2_a": self.size * self.random(a, rank), "hada_w2_b": self.random(rank, b)}
        one, other = sides["hada_w1_a"] @ sides["hada_w1_b"], sides["hada_w2_a"] @ sides["hada_w2_b"]
        return {**sides, "alpha": torch.tensor(alpha)}, alpha / rank * one * other

    def loha_of_full_rank(self, weight: Tensor) -> tuple[Sides, Tensor]:
        return self.loha(weight, rank=12)

    def lokr(self, weight: Tensor) -> tuple[Sides, Tensor]:
        """Both sides are whole matrices; alpha has no meaning then."""
        a, b = weight.shape
        w1, w2 = self.random(4, 4), self.size * self.random(a // 4, b // 4) / b**0.5
        return {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(1.0)}, torch.kron(w1, w2)

    def lokr_of_factors(self, weight: Tensor) -> tuple[Sides, Tensor]:
        (a, b), rank, alpha = weight.shape, 2, 3.0
        w1 = self.random(2, 4)
        left, right = self.random(a // 2, rank), self.size * self.random(rank, b // 4) / b**0.5
        sides = {"lokr_w1": w1, "lokr_w2_a": left, "lokr_w2_b": right, "alpha": torch.tensor(alpha)}
        return sides, alpha / rank * torch.kron(w1, left @ right)

    def lokr_of_two_products(self, weight: Tensor) -> tuple[Sides, Tensor]:
        """LyCORIS divides alpha by the rank of the second product."""
        (a, b), alpha = weight.shape, 3.0
        parts = {"lokr_w1_a": self.size * self.random(4, 1), "lokr_w1_b": self.random(1, 2),
                 "lokr_w2_a": self.random(a // 4, 3), "lokr_w2_b": self.random(3, b // 2) / b**0.5}
        one, other = parts["lokr_w1_a"] @ parts["lokr_w1_b"], parts["lokr_w2_a"] @ parts["lokr_w2_b"]
        return {**parts, "alpha": torch.tensor(alpha)}, alpha / 3 * torch.kron(one, other)

    def diff(self, weight: Tensor) -> tuple[Sides, Tensor]:
        change = self.size * self.random(*weight.shape) / weight.shape[1]**0.5
        return {"diff": change}, change

    def dora_of_columns(self, weight: Tensor) -> tuple[Sides, Tensor]:
        """Magnitudes `[1, b]`, as the first versions of LyCORIS."""
        sides, change = self.lora(weight)
        changed = weight + change
        magnitude = weight.norm(dim=0, keepdim=True) * (1 + 0.3 * self.random(1, weight.shape[1]))
        sides["dora_scale"] = magnitude
        return sides, changed / changed.norm(dim=0, keepdim=True) * magnitude - weight

    def dora_of_rows(self, weight: Tensor) -> tuple[Sides, Tensor]:
        """Magnitudes `[a, 1]`. ComfyUI's loader divides by the norms of the unchanged rows."""
        sides, change = self.lora(weight)
        norm = weight.norm(dim=1, keepdim=True)
        sides["dora_scale"] = norm * (1 + 0.3 * self.random(weight.shape[0], 1))
        return sides, (weight + change) * sides["dora_scale"] / norm - weight

    def dora_of_peft(self, weight: Tensor) -> tuple[Sides, Tensor]:
        """Magnitudes `[a]`; PEFT divides by the norms of the changed rows."""
        sides, _ = self.lora(weight)
        up, down = sides["lora_up.weight"], sides["lora_down.weight"]
        changed = weight + up @ down
        magnitude = weight.norm(dim=1) * (1 + 0.3 * self.random(weight.shape[0]))
        sides = {"lora_B.weight": up, "lora_A.weight": down, "lora_magnitude_vector": magnitude}
        return sides, changed * (magnitude / changed.norm(dim=1)).unsqueeze(1) - weight

    def lokr_with_dora(self, weight: Tensor) -> tuple[Sides, Tensor]:
        sides, change = self.lokr_of_factors(weight)
        changed = weight + change
        sides["dora_scale"] = weight.norm(dim=0, keepdim=True) * (1 + 0.3 * self.random(1, weight.shape[1]))
        return sides, changed / changed.norm(dim=0, keepdim=True) * sides["dora_scale"] - weight


# of the forms that ComfyUI's loader reads too
COMFYUI_FORMS = ("lora", "loha", "loha_of_full_rank", "lokr", "lokr_of_factors", "lokr_of_two_products",
                 "diff", "dora_of_columns", "dora_of_rows", "lokr_with_dora")
FORMS = (*COMFYUI_FORMS, "dora_of_peft")


def module_names(layout: SiteLayout, prefix: str = "lora_unet_") -> dict[tuple[int, str], str]:
    """Site and projection -> kohya's name of the layer."""
    return {(site.index, projection):
            prefix + f"{site.name}.{projection}{'.0' * (projection == 'to_out')}".replace(".", "_")
            for site in layout.sites for projection in PROJECTIONS}


def written(form: str, layout: SiteLayout, weight: Weight, prefix: str = "lora_unet_",
            seed: int = 0) -> tuple[Sides, dict[tuple[int, str], Tensor]]:
    """A file in one form, and its changes by site and projection."""
    write, state, changes = getattr(Writer(seed), form), {}, {}
    for key, name in module_names(layout, prefix).items():
        sides, changes[key] = write(weight(*key))
        state |= {f"{name}.{side}": tensor.contiguous() for side, tensor in sides.items()}
    return state, changes


def peft(layout: SiteLayout, weight: Weight, prefix: str = "base_model.model.", adapter: str = "",
         seed: int = 0) -> tuple[Sides, dict[tuple[int, str], Tensor]]:
    """PEFT's names with rank 2; the changes at scale 1."""
    writer, state, changes = Writer(seed), {}, {}
    for site, projection in module_names(layout):
        a, b = weight(site, projection).shape
        path = f"{prefix}{layout.sites[site].name}.{projection}{'.0' * (projection == 'to_out')}"
        up, down = writer.random(a, 2), 0.1 * writer.random(2, b)
        state |= {f"{path}.lora_B{adapter}.weight": up, f"{path}.lora_A{adapter}.weight": down}
        changes[site, projection] = up @ down
    return state, changes


def custom_diffusion(layout: SiteLayout, weight: Weight) -> tuple[Sides, dict[tuple[int, str], Tensor]]:
    """diffusers' file of Custom Diffusion: whole weights of to_k and to_v."""
    state, changes = {}, {}
    for site in layout.sites:
        for projection in ("to_k", "to_v"):
            _, changes[site.index, projection] = Writer(site.index).diff(weight(site.index, projection))
            whole = weight(site.index, projection) + changes[site.index, projection]
            state[f"{site.name}.processor.{projection}_custom_diffusion.weight"] = whole
    return state, changes


def factors(module: str, a: int = 8, b: int = 8, rank: int = 2, seed: int = 0) -> Sides:
    """A plain LoRA of one layer."""
    writer = Writer(seed)
    up, down = writer.random(a, rank), writer.random(rank, b)
    return {f"{module}.lora_up.weight": up, f"{module}.lora_down.weight": down}

"""Methods by name. Adding one: a file here, its name in the list below, a test file."""

from . import (  # noqa: F401 - importing registers them
    bound,
    ccdm,
    cidm,
    clora,
    cns,
    custom_diffusion,
    ewc,
    finetune,
    l2dm,
    lora,
    lora_merge,
    lwf,
    mix_of_show,
    orthogonal_adaptation,
    scns,
    slots,
    stamina,
    tara,
    textual_inversion,
    tova,
)
from .base import METHODS, Method, Task, get, make

DEFAULT = "slots"      # what is offered first

__all__ = ["DEFAULT", "METHODS", "Method", "Task", "get", "make"]

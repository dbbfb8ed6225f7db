"""What compares pictures with photos while a concept is learned: for early stopping, and for kept states."""

from __future__ import annotations

import math
import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..data.framing import Framing, frame
from ..data.pictures import Picture
from ..demo.judges import SceneEncoder
from ..errors import ConceptError
from ..evaluation.clip import ClipEncoder
from ..evaluation.photo_encoder import INSTALL, PhotoEncoder, is_installed
from ..evaluation.previews import Previews, concept_prompt, similarity_to
from ..evaluation.protocol import Encoder
from ..evaluation.states import Judging, judge_states, proposed, states_picture, thumbnailed
from ..methods.base import Task, get
from ..model.backbone import Backbone
from ..sampling.settings import SampleSettings
from ..training.config import TrainingConfig
from ..training.record import Learned
from . import backbones
from .sheets import check_sheet, write_picture


def judging_of(options: Namespace) -> Judging | None:
    """What the options keep and compare; None if no states are kept.

    Raises:
        ConceptError: A value is wrong, an option needs `--keep-states`, or nothing can compare pictures.
            Prompts are not checked yet.
    """
    if options.keep_states is None:
        for flag, value in (("--sample-prompt", options.sample_prompts), ("--samples", options.samples),
                            ("--states-picture", options.states_picture)):
            if value:
                raise ConceptError(f"{flag} belongs to --keep-states; give --keep-states, too, such as 4")
        return None
    if options.encoder is None and not backbones.is_embedded(options) and not is_installed():
        raise ConceptError("--keep-states compares pictures with the photos; with this base it needs "
                           f"--encoder, the folder of a CLIP model, or the encoder for photos: {INSTALL}")
    if options.states_picture is not None:
        check_sheet(options.states_picture, (options.images, options.captions, options.masks, options.prior),
                    "picture of states")
        sheet = options.contact_sheet
        if sheet is not None and os.path.realpath(sheet) == os.path.realpath(options.states_picture):
            raise ConceptError(f"--contact-sheet and --states-picture are both '{sheet}'; give two different "
                               "files")
    return Judging(options.keep_states, tuple(options.sample_prompts), options.samples or Judging.samples)


def judge_of(options: Namespace, encoder: Encoder | None) -> Encoder:
    """What compares pictures: the encoder that was given, else the base's own or the encoder for photos."""
    return encoder or (SceneEncoder() if backbones.is_embedded(options) else PhotoEncoder())


def previews_of(options: Namespace, training: TrainingConfig, backbone: Backbone, photos: list[Picture],
              encoder: Encoder | None) -> Previews | None:
    """What early stopping compares with the photos; None without early stopping."""
    if not training.patience:
        return None
    size = (training.resolution, training.resolution)
    judge = judge_of(options, encoder)

    def encode(pictures: Sequence[Tensor]) -> Tensor:
        return torch.cat([judge.features(picture.unsqueeze(0), options.kind) for picture in pictures])

    shown = [frame(photo, Framing(training.resolution)).pixels for photo in photos]
    settings = SampleSettings(steps=15, cfg=backbones.guidance_of(options), size=size)
    return Previews(backbone, concept_prompt(options.name, options.kind), settings, training.seed,
                    similarity_to(shown, encode))


def encoder_of(options: Namespace, training: TrainingConfig) -> Encoder | None:
    """The encoder that was given. Raises ConceptError if early stopping needs one."""
    is_used = training.patience or options.keep_states or get(options.method).method.describes_pictures
    if options.encoder is not None and not is_used:
        raise ConceptError("--encoder compares pictures with the photos for early stopping or kept states; "
                           "give --patience and --look-every, or --keep-states, too")
    if (training.patience and options.encoder is None and not backbones.is_embedded(options)
            and not is_installed()):
        raise ConceptError(f"setting 'patience' is {training.patience}; with this base it needs --encoder, "
                           "the folder of a CLIP model that compares pictures with the photos, or the "
                           f"encoder for photos: {INSTALL}")
    return None if options.encoder is None else ClipEncoder.load(options.encoder, device=options.device)


def with_proposed(options: Namespace, judging: Judging, learned: Learned, task: Task,
                  training: TrainingConfig, photos: Sequence[Picture], encoder: Encoder | None
                  ) -> tuple[Learned, list[dict], list[str]]:
    """What was learned with the proposed state in place of the last one; facts and lines of all states. A
    failure says how to go on, because everything is learned by now."""
    try:
        return _with_proposed(options, judging, learned, task, training, photos, encoder)
    except ConceptError as error:
        raise ConceptError(f"{error}; what was learned is kept: the same command continues from there, and "
                           "without --keep-states it stores the last state") from error


def _with_proposed(options: Namespace, judging: Judging, learned: Learned, task: Task,
                   training: TrainingConfig, photos: Sequence[Picture], encoder: Encoder | None
                   ) -> tuple[Learned, list[dict], list[str]]:
    judge = judge_of(options, encoder)

    def encode(pictures: Sequence[Tensor]) -> Tensor:
        return torch.cat([judge.features(picture.unsqueeze(0), options.kind) for picture in pictures])

    def describe(pictures: Sequence[Tensor]) -> Tensor:
        return torch.cat([judge.image_text_features(picture.unsqueeze(0)) for picture in pictures])

    shown = [frame(photo, Framing(training.resolution)).pixels for photo in photos]
    size = (training.resolution, training.resolution)
    settings = SampleSettings(steps=15, cfg=backbones.guidance_of(options), size=size)
    prompts = judging.prompts_for(task.name, task.kind, [photo.caption for photo in photos])
    states = judge_states(task, learned.kept, prompts, shown, encode, settings, training.seed,
                          judging.samples, describe)
    chosen = proposed(states)
    if options.states_picture is not None:
        write_picture(options.states_picture, states_picture(states))
    concept = thumbnailed(states[chosen])
    facts = [{"step": state.step, **{name: None if math.isnan(value := getattr(state, name)) else value
                                     for name in ("likeness", "spread", "fidelity")},
              "proposed": i == chosen} for i, state in enumerate(states)]
    lines = [f"{state.describe()}{', proposed and stored' if i == chosen else ''}"
             for i, state in enumerate(states)]
    grown = task.grown(concept, learned.bank.shared)
    lines.append(f"sample prompts: {'; '.join(prompts)}")
    return replace(learned, concept=concept, bank=grown), facts, lines

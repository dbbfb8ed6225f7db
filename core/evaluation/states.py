"""Compares kept states of a concept, and proposes one of them.

Likeness is the mean cosine of drawn pictures with the photos. Prompt fidelity tells whether a prompt still
changes the picture as it changes a picture of the class noun: the cosine of both changes of the features,
`cos(E(concept, prompt) - E(concept, plain), E(noun, prompt) - E(noun, plain))`. This is the directional
similarity of StyleGAN-NADA (Gal et al., 2022, equation 3) with pictures of the frozen base in place of texts,
because ComfyUI's vision models have no text encoder. A concept that is learned for too long draws its photos
whatever the prompt says; likeness still grows then, and fidelity falls.

Proposed is the state of best fidelity among those whose likeness is at most one standard error below the best
one. Differences below that are noise of the few pictures (the rule of Breiman et al., Classification and
Regression Trees, 1984, section 3.4.3, with fidelity in place of a tree's size).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from ..bank.bank import ConceptBank
from ..bank.concepts import Concept, ConceptInfo
from ..bank.prompts import Vocabulary
from ..charts import thumbnails_picture
from ..errors import ConceptError
from ..images import thumbnail_of
from ..methods.base import Task
from ..sampling.sampling import sample
from ..sampling.settings import SampleSettings
from .bankcheck import Encode
from .metrics import standard_error
from .previews import concept_prompt

# Scenes that most bases know. The first one that no caption mentions is drawn.
PLACES = ("in the snow", "on a beach", "in a meadow", "at night", "in a room")
SUBJECTS = ("a car", "a dog", "a cat", "a fish", "a robot")
MOST_STATES, MOST_SAMPLES, MOST_PROMPTS = 12, 16, 8


@dataclass(frozen=True)
class Judging:
    """What is kept and compared.

    Attributes:
        states: Number of states that are kept, evenly spaced; the last one is the end of the run.
        prompts: Prompts that name the concept; empty = one with a place or subject that no caption mentions.
        samples: Pictures of each prompt, always from the same seeds.
    """

    states: int = 4
    prompts: tuple[str, ...] = ()
    samples: int = 4

    def __post_init__(self) -> None:
        for name, value, most in (("kept states", self.states, MOST_STATES),
                                  ("samples", self.samples, MOST_SAMPLES)):
            if not 1 <= value <= most:
                raise ConceptError(f"{name} is {value}; allowed: 1 to {most}")
        if len(self.prompts) > MOST_PROMPTS:
            raise ConceptError(f"there are {len(self.prompts)} sample prompts; allowed: up to {MOST_PROMPTS}")

    def steps(self, total: int) -> tuple[int, ...]:
        """The steps after which a state is kept; the last one is the end."""
        return tuple(sorted({max(1, round(total * i / self.states)) for i in range(1, self.states + 1)}))

    def check_prompts(self, info: ConceptInfo, infos: Iterable[ConceptInfo]) -> None:
        """Checks the prompts before anything is learned.

        Args:
            info: The concept that will be learned.
            infos: All concepts of the bank.

        Raises:
            ConceptError: A prompt does not name the concept, names a single word of it, or one that is
                unknown.
        """
        vocabulary = Vocabulary([info, *(other for other in infos if other.name != info.name)])
        for prompt in self.prompts:
            what = f"the sample prompt {prompt!r}"
            if info.placeholder not in prompt:
                raise ConceptError(f"{what} does not name the concept; write {info.placeholder} where it "
                                   "should be")
            parsed = vocabulary.parse(prompt.replace(info.placeholder, "it"), what)
            if info.name in parsed.concepts:      # pictures of the class noun take the place of all words
                raise ConceptError(f"{what} names the concept in another form, too; allowed: "
                                   f"{info.placeholder}")

    def prompts_for(self, name: str, kind: str, captions: Sequence[str]) -> tuple[str, ...]:
        """The prompts of a concept."""
        return self.prompts or (unseen_prompt(name, kind, captions),)


def unseen_prompt(name: str, kind: str, captions: Sequence[str]) -> str:
    """A prompt with a place (for an object) or a subject (for a style) that no caption mentions."""
    text = " ".join(captions).casefold()
    choices = PLACES if kind == "object" else SUBJECTS
    chosen = next((choice for choice in choices if choice.split()[-1] not in text), choices[0])
    return f"{concept_prompt(name, kind)} {chosen}" if kind == "object" else f"<{name}> of {chosen}"


@dataclass(frozen=True)
class State:
    """A kept state.

    Attributes:
        step: Steps that it has learned.
        concept: What it has learned.
        likeness, spread: Mean cosine with the photos, and its standard error over the pictures; NaN for a
            single picture, whose error is unknown.
        fidelity: Mean prompt fidelity, see above; NaN if no prompt adds anything.
        pictures: The first picture of every prompt, `[P, 3, H, W]` in -1..1.
    """

    step: int
    concept: Concept
    likeness: float
    spread: float
    fidelity: float
    pictures: Tensor

    def describe(self) -> str:
        """`step 200: likeness 71.2 ± 0.8, fidelity 34.0`."""
        if math.isnan(self.likeness):
            return f"step {self.step}: no likeness, because a picture holds NaN"
        text = f"step {self.step}: likeness {100 * self.likeness:.1f}"
        text = text if math.isnan(self.spread) else f"{text} ± {100 * self.spread:.1f}"
        return text if math.isnan(self.fidelity) else f"{text}, fidelity {100 * self.fidelity:.1f}"


def proposed(states: Sequence[State]) -> int:
    """Index of the proposed state, see the module; the earlier one if two are equal. A state whose pictures
    hold NaN has no likeness and is not proposed; if no state has one, the last is."""
    judged = [i for i, state in enumerate(states) if not math.isnan(state.likeness)]
    if not judged:
        return len(states) - 1
    best = max(judged, key=lambda i: states[i].likeness)
    spread = 0.0 if math.isnan(states[best].spread) else states[best].spread
    near = [i for i in judged if states[i].likeness >= states[best].likeness - spread
            and not math.isnan(states[i].fidelity)]
    return max(near, key=lambda i: states[i].fidelity) if near else best


@dataclass(frozen=True)
class _Drawn:
    """Draws prompts of one bank: the plain one first, `[1 + P, n, 3, H, W]`."""

    task: Task
    settings: SampleSettings
    seeds: Sequence[int]
    before_each: Callable[[], None]

    def __call__(self, bank: ConceptBank, prompts: Sequence[str]) -> list[Tensor]:
        rows = []
        for prompt in prompts:
            self.before_each()
            rows.append(sample(self.task.backbone, bank, [prompt] * len(self.seeds), self.seeds,
                               self.settings).float().cpu())
        return rows


def judge_states(task: Task, kept: Mapping[int, Concept], prompts: Sequence[str], photos: Sequence[Tensor],
                 encode: Encode, settings: SampleSettings, seed: int, samples: int,
                 describe: Encode | None = None, before_each: Callable[[], None] = lambda: None
                 ) -> list[State]:
    """Draws and scores every kept state, in the order of steps.

    Args:
        task: The finished task; its bank lacks the concept.
        kept: Step -> state.
        prompts: Prompts that name the concept.
        photos: `[3, H, W]` in -1..1 of any sizes.
        encode: Encodes pictures to unit vectors `[n, D]`, for the likeness.
        settings: Of the sampler.
        seed, samples: Every prompt is drawn from the seeds `seed` to `seed + samples - 1`.
        describe: Encodes pictures for the fidelity; None = `encode`.
        before_each: Called before each prompt is drawn; it may raise to cancel.
    """
    describe = describe or encode
    draw = _Drawn(task, settings, range(seed, seed + samples), before_each)
    plain, name = concept_prompt(task.name, task.kind), f"<{task.name}>"
    asked = [plain, *(prompt for prompt in prompts if prompt != plain)]
    references = encode(list(photos))
    of_noun = draw(task.bank, [prompt.replace(name, task.class_noun) for prompt in asked])
    usual = [describe(list(row)) for row in of_noun]
    states = []
    for step, concept in sorted(kept.items()):
        rows = draw(_with(task, concept), asked)
        likeness = (encode([picture for row in rows for picture in row]) @ references.T).mean(1)
        features = [describe(list(row)) for row in rows]
        changes = [torch.nn.functional.cosine_similarity(own - features[0], noun - usual[0], dim=-1).mean()
                   for own, noun in zip(features[1:], usual[1:], strict=True)]
        fidelity = float(torch.stack(changes).mean()) if changes else math.nan
        pictures = torch.stack([row[0] for row in rows])
        spread = standard_error(likeness) if len(likeness) > 1 else math.nan
        states.append(State(step, concept, float(likeness.mean()), spread, fidelity, pictures))
    return states


def _with(task: Task, concept: Concept) -> ConceptBank:
    bank = task.bank if task.name not in task.bank else task.bank.remove(task.name)
    return bank.add(concept)


def thumbnailed(state: State) -> Concept:
    """The concept of a state, with its plain picture as the thumbnail."""
    return replace(state.concept, thumbnail=thumbnail_of(state.pictures[0]))


def states_picture(states: Sequence[State], side: int = 220) -> Image.Image:
    """All states side by side: a row per state, with the plain prompt first; the proposed one is marked."""
    chosen, rows = proposed(states), []
    for i, state in enumerate(states):
        words = state.describe().split(", ")
        captions = [f"{'proposed: ' if i == chosen else ''}{words[0]}", *words[1:]]
        rows += [(captions[j] if j < len(captions) else "", thumbnail_of(picture))
                 for j, picture in enumerate(state.pictures)]
    return thumbnails_picture(rows, side, len(states[0].pictures))

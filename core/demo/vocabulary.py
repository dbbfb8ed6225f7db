"""The embedded base's tokenizer: byte-level BPE in CLIP's file layout, trained on scene captions.

Both hosts read CLIP's layout (vocab.json, merges.txt, end-of-word `</w>`). Unknown text splits into bytes, so
every caption can be tokenized.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from . import scenes

# the longest scene caption has 39 tokens; CLIP's length of 77 would waste computation on padding
CONTEXT_LENGTH = 48
START, END = "<|startoftext|>", "<|endoftext|>"
# Words from prompts and photo captions are whole tokens, although most do not occur in pretraining.
EXTRA_WORDS = (
    "picture painting drawing style image portrait close up view of the with and in on at to from near "
    "under over by is are sitting standing lying playing running sleeping wearing holding next floor "
    "grass sand sea sky mountain forest city street house table chair bed sofa garden park river lake "
    "tree flower sun moon cloud rain winter summer little large old new cute beautiful face eyes head toy "
    "bear teddy duck girl boy man woman person people animal gray grey gold silver background water color "
    "colour light dark "
)


def _corpus() -> list[str]:
    rng = random.Random(0)
    captions = [scenes.caption(scenes.random_scene(rng), rng) for _ in range(4000)]
    return captions + [EXTRA_WORDS] * 20


def build(folder: Path) -> None:
    """Writes vocab.json, merges.txt and tokenizer_config.json.

    Needs the `tokenizers` package; only pretraining calls it.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False)])
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=2,
        end_of_word_suffix="</w>",
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    state = json.loads(tokenizer.to_str())["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in state["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(letter + "</w>" for letter in alphabet), *(m.replace(" ", "") for m in merges),
             START, END]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": CONTEXT_LENGTH,
        "do_lower_case": True,
        "unk_token": END,
        "bos_token": START,
        "eos_token": END,
        "pad_token": END,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load(folder: Path):
    """Loads transformers' CLIPTokenizer from the files of `build`."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(str(folder))

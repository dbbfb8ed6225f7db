"""PEFT's configurations: the scales that they give, and what they may not say."""

from __future__ import annotations

import json

import pytest

from continual_concepts.core.errors import ConceptError
from continual_concepts.core.interop.peft_config import FILE, HEADER, LARGEST, RAW, in_folder, in_header

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


def read(folder, config):
    (folder / FILE).write_text(config if isinstance(config, str) else json.dumps(config))
    return in_folder(folder)[RAW]


def test_scales(tmp_path):
    patterns = {"alpha_pattern": {"to_k": 2, "^mid.to_v": 16}, "rank_pattern": {"b.to_q": 16}}
    config = read(tmp_path, CONFIG | patterns)
    assert config.scale("a.to_out", 4) == 2 and config.scale("a.to_k", 4) == 0.5
    assert config.scale("ato_k", 4) == 2 and config.scale("to_k", 4) == 0.5      # whole names only
    assert config.scale("mid.to_v", 4) == 4 and config.scale("a.mid.to_v", 4) == 2
    assert config.scale("a.b.to_q", 16) == 0.5 and config.scale("a.b.to_q", None) == 0.5
    assert read(tmp_path, CONFIG | {"use_rslora": True}).scale("a", 4) == 4
    assert read(tmp_path, {"peft_type": "LOHA", "r": 4, "alpha": 2}).scale("a", 4) == 0.5
    assert read(tmp_path, {"r": 4}).scale("a", 4) == 1      # no alpha
    assert in_folder(tmp_path / "nowhere") == {} and in_header(None) == in_header({}) == {}


def test_headers():
    both = {"unet.r": 4, "unet.lora_alpha": 8, "unet.x": None, "text.r": 2, "text.lora_alpha": 1}
    found = in_header({HEADER: json.dumps(both)})
    assert {prefix: config.scale("a", None) for prefix, config in found.items()} == {"unet.": 2, "text.": 0.5}
    assert in_header({HEADER: json.dumps(CONFIG)})[""].scale("a", 4) == 2


@pytest.mark.parametrize(("config", "sentence"), [
    (CONFIG | {"init_lora_weights": "pissa_niter_4"}, "also changes the base's weights"),
    (CONFIG | {"peft_type": "OFT"}, "peft_type 'OFT'; allowed: LORA, LOHA, LOKR"),
    (CONFIG | {"alpha_pattern": {"(a+)+$": 4}}, "no regular expressions"),
    (CONFIG | {"alpha_pattern": {"to_k": "much"}}, "alpha_pattern 'much'; allowed: a number"),
    (CONFIG | {"alpha_pattern": [4]}, "allowed: layer names with numbers"),
    (CONFIG | {"rank_pattern": {"to_k": 0}}, "rank_pattern 0 for to_k; allowed: above 0"),
    (CONFIG | {"lora_alpha": float("nan")}, "lora_alpha 'nan'; allowed: a number"),
    (CONFIG | {"lora_alpha": 10**400}, "lora_alpha '1000.*; allowed: a number"),
    (CONFIG | {"lora_alpha": True}, "lora_alpha 'True'; allowed: a number"),
    (CONFIG | {"r": 0}, "r 0; allowed: whole numbers"),
    (CONFIG | {"r": 2.5}, "r 2.5; allowed: whole numbers"),
    ({"lora_alpha": 8}, "r 'None'; allowed: a number"),
    ([CONFIG], "holds no JSON object"),
    ("{", "is not readable JSON"),
    ("[" * 100_000, "is not readable JSON"),
    (" " * (LARGEST + 1), "is larger than 1 MB"),
])
def test_bad_configurations_get_one_sentence(tmp_path, config, sentence):
    with pytest.raises(ConceptError, match=sentence):
        read(tmp_path, config)
    if not isinstance(config, (list, str)):
        flat = {f"unet.{key}": value for key, value in ({"r": None} | config).items()}
        with pytest.raises(ConceptError, match=f"the header's lora_adapter_metadata .*{sentence}"):
            in_header({HEADER: json.dumps(flat)})


def test_a_byte_order_mark_is_no_damage(tmp_path):
    """Windows' editor writes one when a person corrects the file."""
    assert read(tmp_path, "\ufeff" + json.dumps(CONFIG)).scale("a.to_k", 4) == 2


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / FILE).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConceptError, match="cannot be read"):
        in_folder(tmp_path)

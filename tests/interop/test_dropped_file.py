"""The page's part of a dropped bank that needs no page: what its file says of itself. Runs in Node where
there is one."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.format import METADATA_KEY, save_bank
from continual_concepts.core.interop.sharing import share

WEB = Path(__file__).resolve().parents[2] / "nodes" / "web"
NODE = shutil.which("node")
SCRIPT = """
import { bankIn, checkFile, described } from './banks_file.mjs';
import { readFileSync } from 'node:fs';
const answers = [];
for (const [path, name, size] of JSON.parse(readFileSync(0, 'utf8'))) {
    const file = new File([readFileSync(path)], name);
    if (size) Object.defineProperty(file, 'size', { value: size });
    const bank = await bankIn(file);
    try {
        answers.push(bank ? [checkFile(file, bank), described(bank)] : null);
    } catch (error) {
        answers.push(error.message);
    }
}
console.log(JSON.stringify(answers));
"""


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """read((path, name on the page, pretended size), ...) -> for each [name to store, description], the
    sentence of a refusal, or None for files that are no bank."""
    if NODE is None:
        pytest.skip("these tests run the page's code in Node, and there is no program 'node' here")
    folder = tmp_path_factory.mktemp("web")
    shutil.copy(WEB / "banks_file.js", folder / "banks_file.mjs")
    (folder / "run.mjs").write_text(SCRIPT)

    def run(*files) -> list:
        given = json.dumps([[str(path), name, size] for path, name, size in files])
        done = subprocess.run([NODE, str(folder / "run.mjs")], input=given, capture_output=True, text=True,
                              check=True)
        return json.loads(done.stdout)

    return run


@pytest.fixture
def shared(layout, make_concept, tmp_path) -> Path:
    bank = ConceptBank(layout)
    for name in ("rex", "mimi", "año", "chalk", "bus"):
        bank = bank.add(make_concept(layout, name))
    save_bank(bank, tmp_path / "bank.safetensors")
    share(bank, "rex", tmp_path / "rex.safetensors", "CC BY 4.0", "Ann")
    return tmp_path / "rex.safetensors"


def with_header(folder: Path, text: str, name: str = "odd.safetensors", **further: str) -> Path:
    save_file({"a": torch.zeros(2)}, folder / name, {METADATA_KEY: text, **further})
    return folder / name


def test_a_share_file_and_a_bank_are_described(read, shared):
    max_ = json.dumps({"concepts": [{"info": {"name": "max"}}]})
    old = with_header(shared.parent, max_, **{"modelspec.license": "\u202eMIT\n"})
    bank = shared.with_name("bank.safetensors")
    files = (shared, "rex (1).SAFETENSORS", 0), (bank, "b.safetensors", 0), (old, "año.safetensors", 0)
    assert read(*files) == [
        ["rex (1).safetensors", "<rex>, licence CC BY 4.0, by Ann"],
        ["b.safetensors", "<rex>, <mimi>, <año>, 2 more"],
        ["año.safetensors", "<max>, licence MIT"]]


def test_other_files_are_left_to_comfyui(read, shared, tmp_path):
    lora = tmp_path / "lora.safetensors"
    save_file({"a": torch.zeros(2)}, lora, {"modelspec.title": "x"})
    empty, huge, text = (tmp_path / f"{name}.safetensors" for name in ("empty", "huge", "text"))
    empty.write_bytes(b"")
    huge.write_bytes(b"\xff" * 64)      # a header of 2^64 bytes
    text.write_bytes((20).to_bytes(8, "little") + b"no JSON here, at all")
    assert read(*((file, file.name, 0) for file in (lora, empty, huge, text)),
                (shared, "rex.json", 0)) == [None] * 5


@pytest.mark.parametrize("stem", ["../rex", "a/b", ".rex", "CON", "a\\b", "<b>", "x" * 110])
def test_names_that_are_paths_or_no_files_are_refused(read, shared, stem):
    assert " is not allowed; rename the file: " in read((shared, f"{stem}.safetensors", 0))[0]


def test_a_file_that_is_no_whole_bank_is_refused_in_one_sentence(read, shared, tmp_path):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(shared.read_bytes()[:-10])
    files = [with_header(tmp_path, text, f"{i}.safetensors") for i, text in enumerate(
        ("{", "{}", '{"concepts": []}', '{"concepts": [{"info": {"name": "<img src=x>"}}]}'))]
    answers = read((cut, "cut.safetensors", 0), (shared, "big.safetensors", 200_000_000),
                   *((file, file.name, 0) for file in files))
    damaged = "its list of concepts is damaged;"
    reasons = ("because it is incomplete;", "has 200 MB, and the page takes 100;",
               "its description is damaged;", damaged, "it holds no concept;", damaged)
    for answer, reason in zip(answers, reasons, strict=True):
        assert reason in answer and "\n" not in answer

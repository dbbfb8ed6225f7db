"""File names of exports."""

from __future__ import annotations

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.interop.export import export_concept


def test_names_that_differ_only_by_case_get_files_of_their_own_on_any_disk(layout, make_concept, tmp_path):
    """Where case is ignored, `embedding:Rex` would load the words of <rex>."""
    bank = ConceptBank(layout).add(make_concept(layout))
    both = bank.add(bank.rename("rex", "Rex")["Rex"])
    files = [file for name in ("rex", "Rex") for file in export_concept(both, name, tmp_path).files]
    assert len({file.name.casefold() for file in files}) == 4
    assert [file.name for file in files[2:]] == ["Rex_lora_00002.safetensors", "Rex_00002.safetensors"]

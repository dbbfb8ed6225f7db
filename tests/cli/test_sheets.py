"""The contact sheet replaces nothing but another contact sheet, and is never read as a photo."""

from __future__ import annotations

import pytest
from PIL import Image

from continual_concepts.core.cli.sheets import check_sheet, write_sheet
from continual_concepts.core.data.folder import read_folder
from continual_concepts.core.errors import ConceptError


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (40, 40), "red").save(folder / "a.png")
    return folder


def test_a_sheet_replaces_only_a_sheet(photos, tmp_path):
    sheet, report = tmp_path / "new" / "sheet.PNG", read_folder(photos).report
    for _ in range(2):
        check_sheet(sheet, [photos, None])
        write_sheet(sheet, report)


@pytest.mark.parametrize("name", ["bank.safetensors", "sheet.jpg", "sheet"])
def test_a_sheet_is_a_png_file(photos, tmp_path, name):
    with pytest.raises(ConceptError, match=f"{name}' does not end in .png"):
        check_sheet(tmp_path / name, [photos])


def test_photos_banks_and_damaged_files_stay(photos, tmp_path):
    (tmp_path / "bank.png").write_bytes(b"a bank")
    (tmp_path / "link.png").symlink_to(photos / "a.png")
    for path in (photos / "a.png", tmp_path / "bank.png", tmp_path / "link.png"):
        with pytest.raises(ConceptError, match="would replace a file that is no contact sheet"):
            check_sheet(path, [])


def test_a_sheet_among_the_photos_would_be_a_photo_of_the_next_run(photos, tmp_path):
    (tmp_path / "link").symlink_to(photos)
    for folder in (photos, photos / "masks", tmp_path / "link"):
        with pytest.raises(ConceptError, match="would be taken for a photo"):
            check_sheet(folder / "sheet.png", [None, photos])
    check_sheet(photos / "sheet.png", [photos / "a.png"])      # only this photo is read

"""Photos as people bring them: each is taken, or named with the reason."""

from __future__ import annotations

import gc
import json
import resource
import threading
from argparse import Namespace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from continual_concepts.core.bank.concepts import ConceptInfo
from continual_concepts.core.cli.parser import build_parser
from continual_concepts.core.cli.photos import read_photos
from continual_concepts.core.data import reading
from continual_concepts.core.data.folder import DEFERRED, read_folder
from continual_concepts.core.data.framing import Framing, frame
from continual_concepts.core.data.report import no_drawings
from continual_concepts.core.data.training_set import TrainingSet, prepare
from continual_concepts.core.demo.judges import assignment
from continual_concepts.core.demo.scenes import CONCEPTS
from continual_concepts.core.images import to_pil
from continual_concepts.core.methods import make
from continual_concepts.core.training.config import TrainingConfig
from continual_concepts.tests.practice.photo_files import kinds, photo, refusal, skipped
from continual_concepts.tests.quick import thinned

# A1


def test_a1_formats_are_read_or_named(tmp_path):
    photo(tmp_path / "a.jpg")
    photo(tmp_path / "d.jfif", format="JPEG")
    for name in ("c.heic", "e.jxl"):
        (tmp_path / name).write_bytes(b"no matter")
    reads_avif = ".avif" in Image.registered_extensions()
    photo(tmp_path / "b.avif", format="AVIF" if reads_avif else "PNG")
    photos = read_folder(tmp_path)
    avif = ["b.avif"] if reads_avif else []
    assert [facts.name for facts in photos.report.photos] == ["a.jpg", *avif, "d.jfif"]
    reasons = skipped(photos.report)
    assert "pillow-heif" in reasons["c.heic"] and "pillow-jxl-plugin" in reasons["e.jxl"]


def test_a1_an_avif_that_pillow_cannot_read_is_named(tmp_path, monkeypatch):
    photo(tmp_path / "a.jpg")
    (tmp_path / "b.avif").write_bytes(b"no matter")
    monkeypatch.setattr(reading, "_is_registered", lambda suffix: False)
    assert "pillow-avif-plugin" in skipped(read_folder(tmp_path).report)["b.avif"]


def test_a1_sibling_a_registered_plugin_reads_heic(tmp_path, monkeypatch):
    """Once Pillow has an opener for it, HEIC is a picture like others."""
    photo(tmp_path / "c.heic", format="PNG")
    monkeypatch.setattr(reading, "OPTIONAL_FORMATS", ("HEIF",))
    Image.init()
    monkeypatch.setitem(Image.OPEN, "HEIF", Image.OPEN["PNG"])
    monkeypatch.setitem(Image.EXTENSION, ".heic", "HEIF")
    assert [facts.name for facts in read_folder(tmp_path).report.photos] == ["c.heic"]


def test_a1_sibling_a_folder_of_heic_alone_says_why(tmp_path):
    (tmp_path / "c.heic").write_bytes(b"")
    text = refusal(lambda: read_folder(tmp_path))
    assert "c.heic" in text and "pillow-heif" in text


@pytest.mark.parametrize(("start", "package"), [
    (b"\0\0\0\x18ftypheic", "pillow-heif"), (b"\xff\x0a\x7a\x1f", "pillow-jxl-plugin")])
def test_a1_sibling_heic_that_is_named_jpg(tmp_path, monkeypatch, start, package):
    """As phones and messengers send it."""
    monkeypatch.setattr(reading, "_is_registered", lambda suffix: False)
    (tmp_path / "a.jpg").write_bytes(start + bytes(64))
    assert "a.jpg" in (said := refusal(lambda: read_folder(tmp_path))) and package in said


def test_a1_sibling_raw_photos_and_other_files_are_named(tmp_path):
    photo(tmp_path / "a.png")
    for name in ("b.cr2", "notes.md", ".hidden.png", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"x")
    reasons = skipped(read_folder(tmp_path).report)
    assert set(reasons) == {"b.cr2", "notes.md", ".hidden.png", "Thumbs.db"}
    assert "save it as PNG" in reasons["b.cr2"] and reasons[".hidden.png"] == "a hidden file"


def test_a1_sibling_what_a_photo_loses_is_told(tmp_path):
    """Transparency and the other pictures of an animation."""
    frames = [Image.new("RGB", (48, 32), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    Image.new("RGBA", (48, 32), (255, 0, 0, 9)).save(tmp_path / "b.png")
    Image.new("RGBA", (48, 32), (255, 0, 0, 255)).save(tmp_path / "c.png")
    notes = [facts.note for facts in read_folder(tmp_path).report.photos]
    assert notes == ["the first picture of several", "transparent areas are white", ""]


# A4


def test_a4_subfolders_are_named(tmp_path, learn):
    photo(tmp_path / "photos" / "10_dog" / "a.png")
    photo(tmp_path / "photos" / "1_cat" / "b.png")
    said = learn(tmp_path / "photos").sentence
    assert "'10_dog' (1 picture)" in said and "'1_cat'" in said and "--subfolders" in said


def test_a4_subfolders_with_repeats(tmp_path):
    photo(tmp_path / "10_dog" / "a.png")
    photo(tmp_path / "20_dog" / "b.png")
    (tmp_path / "20_dog" / "b.txt").write_text("a dog")
    photo(tmp_path / "c.png")
    photos = read_folder(tmp_path, subfolders=True)
    assert [(p.name, p.repeats) for p in photos.report.photos] == [("10_dog/a.png", 10), ("20_dog/b.png", 20)]
    assert photos.pictures[1].caption == "a dog" and "c.png" in skipped(photos.report)


@pytest.mark.parametrize("place", ["prior/a.png", "prior/1_dog/a.png"])
def test_a4_sibling_prior_pictures_with_and_without_subfolders(tmp_path, place):
    photo(tmp_path / "photos" / "10_dog" / "a.png")
    photo(tmp_path / place)
    options = Namespace(images=tmp_path / "photos", captions=None, masks=None, subfolders=True, noun="dog",
                        find_subject=False, caption_templates=False,
                        prior=tmp_path / "prior")
    assert [picture.is_prior for picture in read_photos(options, 64).pictures] == [False, True]


def test_a4_sibling_subfolders_with_other_captions_are_refused(tmp_path):
    photo(tmp_path / "10_dog" / "a.png")
    assert "subfolders" in refusal(lambda: read_folder(tmp_path, captions=tmp_path, subfolders=True))


def test_a4_sibling_repeats_are_how_often_a_photo_is_drawn():
    plain = TrainingSet(torch.zeros(3, 1, 1, 1), torch.ones(3, 1, 1, 1), ("a", "b", "c"),
                        torch.tensor([False, False, True]), ())
    repeated = TrainingSet(plain.latents, plain.masks, plain.captions, plain.is_prior, (), (1, 3, 1))
    drawn = repeated.draw(8, 0, torch.Generator().manual_seed(0)).prompts
    assert drawn.count("a") == 2 and drawn.count("b") == 6


def test_a4_sibling_subfolders_beside_photos_are_told(tmp_path):
    photo(tmp_path / "a.png")
    photo(tmp_path / "more" / "b.png")
    (tmp_path / "empty").mkdir()
    reasons = skipped(read_folder(tmp_path).report)
    assert "1 picture" in reasons["more"] and "0 pictures" in reasons["empty"]


def test_a4_a_single_photo(tmp_path):
    photo(tmp_path / "a.png")
    photo(tmp_path / "b.png")
    (tmp_path / "a.txt").write_text("a dog")
    (picture,) = read_folder(tmp_path / "a.png").pictures
    assert picture.caption == "a dog"
    assert "neither a folder nor a readable picture" in refusal(lambda: read_folder(tmp_path / "a.txt"))


# A12


def test_a12_large_photos_are_not_held(tmp_path):
    side = int(DEFERRED**0.5) + 20
    photo(tmp_path / "a.png", (side, side))
    Image.new("L", (side, side), 255).save(tmp_path / "a_mask.png")
    (picture,) = read_folder(tmp_path).pictures
    assert not isinstance(picture.source, torch.Tensor) and not isinstance(picture.mask, torch.Tensor)
    whole = torch.nn.functional.interpolate(picture.pixels[None], (64, 64), mode="bicubic", antialias=True,
                                            align_corners=False)[0].clamp(-1, 1)
    framed = frame(picture, Framing(64))
    assert torch.equal(framed.pixels, whole) and framed.mask.min() == 1


def test_a12_sibling_small_photos_are_held_as_8_bits(photos):
    for picture in read_folder(photos).pictures:
        assert picture.source.dtype == torch.uint8 and picture.pixels.dtype == torch.float32


def resident() -> int:
    """Memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_a12_sibling_reading_and_framing_large_photos_takes_little_memory(tmp_path, tiny_backbone):
    """Four photos of 6 megapixels are 72 MB as 8 bits and 288 MB as float32.

    The limit lies between the two. What else the process allocates or frees meanwhile must not decide.
    """
    for i in range(4):
        photo(tmp_path / f"{i}.jpg", (3000, 2000))
    gc.collect()
    stopped, peak, before = threading.Event(), [0], resident()

    def watch():
        while not stopped.wait(0.002):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    prepare(tiny_backbone, read_folder(tmp_path).pictures, "rex", "dog", Framing(64))
    stopped.set()
    watcher.join()
    assert peak[0] - before < 200e6


# A13


def test_a13_a_report_on_the_photos(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(noise).resize((600, 600), Image.BICUBIC).save(tmp_path / "blurred.png")
    Image.fromarray(noise).resize((500, 500), Image.BICUBIC).save(tmp_path / "alike.png")
    photo(tmp_path / "a.png", (600, 600))
    photo(tmp_path / "copy.png", (600, 600), seed=sum(map(ord, "a.png")))
    photo(tmp_path / "small.png")
    Image.new("RGB", (600, 600), "red").save(tmp_path / "flat.png")
    report = read_folder(tmp_path).report.checked(512)
    assert kinds(report) == {"blurred", "alike", "duplicate", "small", "flat"}
    about = {warning.kind: [report.photos[i].name for i in warning.photos] for warning in report.warnings}
    assert about == {"blurred": ["alike.png", "blurred.png"], "alike": ["alike.png", "blurred.png"],
                     "duplicate": ["a.png", "copy.png"], "small": ["small.png"], "flat": ["flat.png"]}


def test_a13_few_photos_and_photos_of_the_bank(tmp_path):
    photo(tmp_path / "a.png", (600, 600))
    photos = read_folder(tmp_path)
    info = ConceptInfo("spot", "dog", "bound", ("spot-1",))
    digests = (photos.pictures[0].digest,)
    known = {"spot": ConceptInfo("spot", "dog", "bound", info.words,
                                 provenance=type(info.provenance)(images=digests))}
    report = photos.report.checked(512, infos=known)
    assert kinds(report) == {"few", "bank"} and "<spot>" in report.warnings[-1].text
    assert kinds(photos.report.checked(512, infos=known, but="spot")) == {"few"}


def test_a13_sibling_good_photos_raise_no_warning(photos):
    assert read_folder(photos, resolution=64).report.checked(64).warnings == ()


@pytest.mark.parametrize("side", [64, 128])
def test_photos_are_told_from_drawings_where_a_base_knows_only_drawings(tmp_path, side):
    """Drawn scenes, also enlarged and as JPEG, and pictures with the structure of photos."""
    drawn, real = tmp_path / "drawn", tmp_path / "real"
    drawn.mkdir(), real.mkdir()
    for i, (picture, _) in enumerate(CONCEPTS["mimi"].pictures(3, 7, side)):
        Image.fromarray(picture).resize((4 * side, 4 * side)).save(drawn / f"{i}.jpg", quality=95)
        rough = np.random.default_rng(i).normal(size=(32, 32, 3)).cumsum(0).cumsum(1)
        rough = (255 * (rough - rough.min()) / (rough.max() - rough.min())).astype(np.uint8)
        Image.fromarray(rough).resize((600, 600), Image.BICUBIC).save(real / f"{i}.png")
    drawings, photos = (read_folder(folder, resolution=side).report for folder in (drawn, real))
    assert "photos" not in kinds(drawings.checked(side, drawing_base="embedded-64"))
    assert "photos" in kinds(photos.checked(side, drawing_base="embedded-64"))
    assert "photos" not in kinds(photos.checked(side))
    options = build_parser().parse_args(["learn", str(drawn), "--prior", str(real), "--name", "mimi",
                                         "--noun", "cat", "--base", "embedded-64", "--kind", "object",
                                         "--bank", str(tmp_path / "b.safetensors")])
    read = read_photos(options, side).checked(options, TrainingConfig(), None, make("slots"))
    assert "photos" in kinds(read.prior.report) and "photos" not in kinds(read.photos.report)


@pytest.mark.parametrize(("name", "side"), thinned(product(["fido", "bolt", "blueprint"], [64, 128]),
                                                  lambda place: place in (0, 3, 4)))
def test_drawings_are_no_photos_after_jpeg_noise_and_without_colours(tmp_path, side, name):
    rng = np.random.default_rng(0)
    for i, picture in enumerate(to_pil(drawn) for drawn in assignment(name, size=side).references):
        picture.convert("L" if i % 2 else "RGB").save(tmp_path / f"{i}.jpg", quality=75)
        noise = rng.integers(-2, 3, (side, side, 3))
        noisy = (np.asarray(picture).astype(int) + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(tmp_path / f"noisy {i}.png")
    report = read_folder(tmp_path, resolution=side).report
    assert "photos" not in kinds(report.checked(side, drawing_base="embedded"))


@pytest.mark.parametrize("resolution", [64, 128, 512])
def test_photos_are_told_at_any_resolution_and_in_grey(benchmark_photos, tmp_path, resolution):
    """Also where they are prior pictures."""
    for concept in sorted(folder for folder in (benchmark_photos / "images").iterdir() if folder.is_dir()):
        report = read_folder(concept, resolution=resolution).report
        assert "photos" in kinds(report.checked(resolution, drawing_base="embedded")), concept.name
    for file in sorted((benchmark_photos / "images" / "cat").iterdir()):
        Image.open(file).convert("L").save(tmp_path / file.name)
    grey = read_folder(tmp_path, is_prior=True, class_noun="cat", resolution=resolution).report
    assert "the prior pictures look like photos" in no_drawings(grey, "embedded")[0].text


def test_a13_sibling_small_photos_are_not_enlarged_in_buckets(tmp_path):
    for name in "abc":
        photo(tmp_path / f"{name}.png")
    report = read_folder(tmp_path).report
    assert kinds(report.checked(512)) == {"small"} and not kinds(report.checked(512, enlarges=False))


# The report as such


def test_everything_in_a_folder_is_taken_or_named(tmp_path):
    """Each reader: photos, captions, tables, masks, hidden files, folders."""
    photo(tmp_path / "a.jpg")
    photo(tmp_path / "B.JPEG")
    photo(tmp_path / "masks" / "a.png")
    photo(tmp_path / "captions" / "B.txt.png")
    photo(tmp_path / "more" / "c.jpg")
    for name in ("a.txt", "a.caption", "z.txt", "x.heic", "y.psd", "notes.md", ".DS_Store", "thumbs.db",
                 "n.json", "metadata.jsonl", "no_suffix", "masks/b.txt", "captions/B.txt", "captions/a.txt",
                 "captions/.keep"):
        (tmp_path / name).write_text("")
    (tmp_path / "a-mask.png").write_bytes((tmp_path / "masks" / "a.png").read_bytes())
    (tmp_path / "broken.jpg.lnk").symlink_to(tmp_path / "gone")
    report = read_folder(tmp_path).report
    told = {photo.name for photo in report.photos} | {photo.mask_from for photo in report.photos}
    told |= {photo.caption_from for photo in report.photos} | set(skipped(report))
    there = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert there - told == {"masks", "captions", "more/c.jpg"}      # named with the folder `more`


def test_learn_says_what_it_took(photos, learn):
    (photos / "0.txt").write_text("a dog")
    (photos / "x.heic").write_bytes(b"")
    out = learn(photos).out
    assert "3 photos, 1 with captions; 1 file skipped" in out and "0.png: 64x64, caption from 0.txt" in out
    assert "not used: x.heic: .heic pictures need the Python package pillow-heif" in out


def test_json_holds_the_same(photos, run, tmp_path):
    (photos / "x.heic").write_bytes(b"")
    outcome = run("--json", "learn", photos, "--bank", tmp_path / "b.safetensors", "--name", "rex",
                  "--noun", "dog", "--steps", 1)
    told = json.loads(outcome.out)["photos"]
    assert [facts["file"] for facts in told["taken"]] == ["0.png", "1.png", "2.png"]
    assert told["skipped"][0]["file"] == "x.heic"
    assert [warning["kind"] for warning in told["warnings"]] == ["small"]

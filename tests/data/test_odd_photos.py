"""Photos and captions as people have them, and worse: each is read as what it shows, or named in one
sentence."""

from __future__ import annotations

import re
import struct
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, features

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.conditioning.encoding import encode_prompts
from continual_concepts.core.data.captions import LONGEST_CAPTION, bytes_of
from continual_concepts.core.data.folder import read_folder
from continual_concepts.core.data.framing import Framing, Picture, frame
from continual_concepts.core.data.reading import MOST_PIXELS
from continual_concepts.core.data.training_set import prepare
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.sampling.sampling import sample
from continual_concepts.core.sampling.settings import SampleSettings

RED, BLUE = (255, 0, 0), (0, 0, 255)


def sentence(call) -> str:
    with pytest.raises(ConceptError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and 10 < len(text) < 500, text
    return text


@pytest.fixture
def photo(tmp_path):
    """The file that the tests below fill, the only one of its folder."""
    return tmp_path / "photos" / "a.png"


@pytest.fixture(autouse=True)
def made(photo):
    photo.parent.mkdir()


def only(photo) -> torch.Tensor:
    (picture,) = read_folder(photo.parent).pictures
    return picture.pixels


def colour_at(pixels: torch.Tensor, y: int = 2, x: int = 2) -> tuple[int, ...]:
    return tuple(((pixels[:, y, x] + 1) * 127.5).round().int().tolist())


def near(found: tuple, wanted: tuple, off: int = 6) -> bool:
    return all(abs(a - b) <= off for a, b in zip(found, wanted, strict=True))


# What is read


@pytest.mark.parametrize(("suffix", "format"), [(".gif", "GIF"), (".webp", "WEBP"), (".png", "PNG")])
def test_of_an_animation_the_first_frame(photo, suffix, format):
    if format == "WEBP" and not features.check("webp"):
        pytest.skip("this PIL has no WebP")
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, BLUE, BLUE)]
    frames[0].save(photo.with_suffix(suffix), format, save_all=True, append_images=frames[1:], duration=50)
    assert near(colour_at(only(photo)), RED)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_way_to_hold_a_camera(photo, orientation):
    """A corner of the scene is red; it ends up where the scene has it."""
    scene = Image.new("RGB", (32, 16), BLUE)
    scene.paste(RED, (0, 0, 16, 8))
    undo = {1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
            4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_270}
    exif = Image.Exif()
    exif[0x0112] = orientation
    (scene if undo[orientation] is None
     else scene.transpose(undo[orientation])).save(photo.with_suffix(".jpg"), quality=95, exif=exif)
    pixels = only(photo)
    assert pixels.shape == (3, 16, 32) and near(colour_at(pixels, 3, 6), RED, 20)
    assert near(colour_at(pixels, 12, 24), BLUE, 20)


def sixteen_bits(path, colour: int) -> None:
    """A PNG of 16 bits per value in three colours, which PIL does not write."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + struct.pack(">HHH", colour, 0, 65535) * 8 for _ in range(8))
    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def test_sixteen_bits_in_colour(photo):
    sixteen_bits(photo, 128 * 257)
    assert near(colour_at(only(photo)), (128, 0, 255), 1)


def as_array(dtype, value):
    return Image.fromarray(np.full((8, 8), value, dtype))


@pytest.mark.parametrize(("make", "suffix", "wanted"), [
    (lambda: as_array(np.uint16, 200), ".png", (1, 1, 1)),      # nearly black in 16 bits, not nearly white
    (lambda: as_array(np.uint16, 51400), ".png", (200,) * 3),
    (lambda: as_array(np.float32, 0.5), ".tif", (127,) * 3),
    (lambda: as_array(np.float32, 200.0), ".tif", (200,) * 3),
    (lambda: as_array(np.float32, 32768.0), ".tif", (127,) * 3),
    (lambda: Image.new("CMYK", (8, 8), (0, 255, 255, 0)), ".jpg", RED),
    (lambda: Image.new("RGBA", (8, 8), (255, 0, 0, 0)), ".png", (255,) * 3),
    (lambda: Image.new("RGBA", (8, 8), (255, 0, 0, 255)), ".webp", RED),
    (lambda: Image.new("LA", (8, 8), (0, 128)), ".png", (127,) * 3),
    (lambda: Image.new("RGB", (8, 8), RED).convert("P"), ".gif", RED),
    (lambda: Image.new("1", (8, 8), 1), ".bmp", (255,) * 3),
])
def test_what_is_seen_is_what_is_read(photo, make, suffix, wanted):
    make().save(photo.with_suffix(suffix), **({"lossless": True} if suffix == ".webp" else {}))
    assert near(colour_at(only(photo)), wanted)


# What is refused


def bomb(path, side: int) -> None:
    """A white PNG of that side in a few kilobytes."""
    Image.new("1", (side, side), 1).save(path)


@pytest.mark.parametrize(("side", "says"), [(9000, "9000x9000"), (14000, "too many pixels")])
def test_a_decompression_bomb_is_not_decompressed(photo, side, says):
    bomb(photo, side)
    tracemalloc.start()
    text = sentence(lambda: read_folder(photo.parent))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert says in text and "a.png" in text and f"up to {MOST_PIXELS // 10**6} million" in text
    assert peak < 8 << 20


@pytest.mark.parametrize("content", [
    b"", b"a text", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n",
    b"P6 4 4 255\n" + bytes(48), b"\0" * 4096,
    b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"\x89PNG\r\n\x1a\n"])
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.gif"])
def test_what_is_no_picture_whatever_its_name(photo, content, name):
    photo.with_name(name).write_bytes(content)
    text = sentence(lambda: read_folder(photo.parent))
    assert name in text and ("PNG, JPEG" in text or "cannot be read" in text)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".gif", ".bmp", ".webp", ".tif"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_truncated_files_are_named(photo, suffix, share):
    file = photo.with_suffix(suffix)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 48, 3), np.uint8)).save(file)
    file.write_bytes(file.read_bytes()[:int(share * file.stat().st_size)])
    assert file.name in sentence(lambda: read_folder(photo.parent))


def test_all_pictures_that_cannot_be_read_are_named(photo):
    """One message per run would mean a run for each."""
    Image.new("RGB", (20, 20)).save(photo)
    for name, content in (("b.jpg", b""), ("c.png", b"no picture"), ("d.jpg", b"\xff\xd8\xff\xe0 cut off")):
        (photo.parent / name).write_bytes(content)
    text = sentence(lambda: read_folder(photo.parent))
    assert text.startswith(f"the picture '{photo.parent / 'b.jpg'}' is not a readable picture")
    assert text.endswith("; 2 more pictures cannot be used: c.png and d.jpg")
    (photo.parent / "d.jpg").unlink()
    assert sentence(lambda: read_folder(photo.parent)).endswith("; 1 more picture cannot be used: c.png")


def test_a_picture_of_nan_is_named(photo):
    as_array(np.float32, np.nan).save(photo.with_suffix(".tif"))
    assert "a.tif" in (text := sentence(lambda: read_folder(photo.parent))) and "NaN" in text


def test_a_caption_of_a_book_is_named(photo):
    Image.new("RGB", (8, 8)).save(photo)
    photo.with_suffix(".txt").write_text("a photo of <rex> " * 1000)
    assert "a.txt" in (text := sentence(lambda: read_folder(photo.parent))) and str(LONGEST_CAPTION) in text


# Through `prepare` and learning


def one(height: int, width: int, value: float = 0.3, caption: str = "", mask=None, **other) -> Picture:
    return Picture(torch.full((3, height, width), value), caption, mask, digest=f"{height}x{width}", **other)


@pytest.mark.parametrize(("picture", "says"), [
    (one(1, 1), "picture 2 is 1x1 pixels; with resolution 64 both sides must be at least 4"),
    (one(2, 20000), "picture 2 is 20000x2 pixels"),
    (one(64, 64, float("nan")), "picture 2 .*NaN"), (one(64, 64, mask=torch.zeros(1, 64, 64)),
                                                     "mask of picture 2 leaves nothing"),
    (one(64, 64, caption="word " * 1001), "caption of picture 2 has 5005 characters"),
    (one(1, 9, is_prior=True), "prior picture 1 is 9x1"),
])
def test_what_there_is_nothing_to_learn_from(tiny_backbone, picture, says):
    assert re.search(says,
                     sentence(lambda: prepare(tiny_backbone, [one(64, 64), picture], "rex", "dog",
                                              Framing(64))))


def test_a_mask_outside_the_square(tiny_backbone):
    mask = torch.zeros(1, 32, 96)
    mask[..., :20] = 1
    assert "framing crop" in sentence(lambda: prepare(tiny_backbone, [one(32, 96, mask=mask)], "rex", "dog",
                                                      Framing(32)))
    for mode in ("pad", "buckets"):
        side = 32 if mode == "pad" else 64
        assert prepare(tiny_backbone, [one(32, 96, mask=mask)], "rex", "dog",
                       Framing(side, mode)).masks.max() > 0


def test_an_autoencoder_that_fails_is_told(tiny_backbone, monkeypatch):
    def fail(images):
        return torch.full((len(images), 4, 8, 8), float("nan"))

    monkeypatch.setattr(tiny_backbone, "encode_images", fail)
    assert "autoencoder" in sentence(lambda: prepare(tiny_backbone, [one(32, 32)], "rex", "dog", Framing(32)))


@pytest.mark.parametrize("size", [(40, 20000), (20000, 40)])
@pytest.mark.parametrize("mode", ["crop", "pad", "buckets"])
def test_long_strips_take_little_memory(tiny_backbone, size, mode):
    """Enlarged as a whole to 512 pixels this one would be 1.5 GB."""
    framed = frame(one(*size), Framing(512, mode), (512, 512))
    assert framed.pixels.shape == (3, 512, 512) and framed.pixels.untyped_storage().nbytes() < 64 << 20
    assert torch.allclose(framed.pixels[:, framed.mask[0] > 0.99], torch.full((), 0.3), atol=1e-3)


@pytest.mark.parametrize("ratio", [0.3, 1.0, 1.5, 3.9])
def test_usual_shapes_are_framed_as_ever(ratio):
    """The ends of a strip are cut off first, of nothing else."""
    g = torch.Generator().manual_seed(0)
    picture = Picture(torch.rand(3, 40, int(40 * ratio), generator=g),
                      mask=torch.rand(1, 40, int(40 * ratio), generator=g))
    height, width = picture.pixels.shape[1:]
    grown = max(16 / height, 16 / width)
    size = (max(1, round(height * grown)), max(1, round(width * grown)))
    whole = torch.nn.functional.interpolate(picture.pixels[None], size, mode="bicubic", antialias=True,
                                            align_corners=False)[0].clamp(-1, 1)
    top, left = (whole.shape[1] - 16) // 2, (whole.shape[2] - 16) // 2
    assert torch.equal(frame(picture, Framing(16)).pixels, whole[:, top:top + 16, left:left + 16])


@pytest.fixture
def empty(tiny_backbone):
    return ConceptBank(tiny_backbone.layout)


def moved(learned) -> bool:
    """Whether learning changed the deltas, which begin at zero."""
    return all(delta.up.any() and torch.isfinite(delta.up).all() for delta in learned.concept.deltas.values())


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
def test_photos_of_one_colour_are_learned(tiny_backbone, empty, teach, value):
    """Their latents are noised like any others, so that the loss of an untrained model is about the noise's
    variance."""
    learned = teach(tiny_backbone, empty, pictures=[one(32, 32, value)], steps=2)
    assert all(0.3 < loss < 3 for loss in learned.losses) and moved(learned)


def test_the_same_photo_twice_counts_twice(tiny_backbone):
    data = prepare(tiny_backbone, [one(32, 32, 0.1), one(32, 32, 0.1), one(32, 32, 0.9)], "rex", "dog",
                   Framing(32, flip=False))
    assert len(data) == 3 == len(data.digests) and torch.equal(data.latents[0], data.latents[1])


@pytest.mark.parametrize("caption", ["", "   ", "a dog on a beach " * 60, "<rex> " * 300, "<rex>" * 300,
                                     "dog", "🐕 <rex> " + "犬" * 200,
                                     "\u200b"])
def test_captions_of_any_length_are_learned(tiny_backbone, empty, teach, caption):
    """The text encoder here takes 14 tokens at a time."""
    learned = teach(tiny_backbone, empty, pictures=[one(32, 32, caption=caption), one(32, 32, 0.5)], steps=1)
    assert 0.3 < learned.losses[0] < 3 and moved(learned)


def test_a_prompt_that_names_three_hundred_concepts(tiny_backbone, empty, make_concept):
    bank = empty
    for i in range(300):
        bank = bank.add(make_concept(empty.layout, f"c{i}", i, size=0.01))
    prompt = " ".join(f"<{name}>" for name in bank.names)
    context = encode_prompts(tiny_backbone, bank.vocabulary.parse_all([prompt]),
                             {name: bank[name].tokens for name in bank.names})
    # every concept's two words are there
    assert [len(places) for places in context.words[0].values()] == [2] * 300
    assert len({place for places in context.words[0].values() for place in places}) == 600
    picture, base = (sample(tiny_backbone, held, [text], [0], SampleSettings(steps=1, size=(32, 32)))
                     for held, text in ((bank, prompt), (empty, "a dog")))
    assert picture.abs().max() <= 1 and not torch.allclose(picture, base, atol=1e-3)


def test_warnings_are_no_surprise(photo):
    """PIL warns of pictures that are read here without harm."""
    Image.new("P", (8, 8)).save(photo, transparency=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert only(photo).shape == (3, 8, 8)


def test_a_table_of_captions_loses_no_text(photo):
    """A comma without quotes would cut a caption, and of two columns of a name one would be lost."""
    Image.new("RGB", (8, 8), RED).save(photo)
    table = photo.with_name("metadata.csv")
    for text, reason in (("file_name,text\na.png,a dog, on grass\n", "line 2 has no column for 'on grass'"),
                         ("file_name,text,Text\na.png,a dog,a cat\n", "the column 'text' is there twice")):
        table.write_text(text, encoding="utf-8")
        assert reason in sentence(lambda: read_folder(photo.parent))
    table.write_text("file_name;text;\r\na.png;a dog, on grass;\r\n", encoding="utf-8", newline="")
    assert read_folder(photo.parent).pictures[0].caption == "a dog, on grass"


def test_a_caption_file_that_cannot_be_read_is_named(tmp_path):
    assert "cannot be read: Is a directory" in sentence(lambda: bytes_of(tmp_path, "caption", 10))

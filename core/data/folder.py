"""Reads the photos of a folder, with captions and masks. Every file is either taken or named in the
report."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NoReturn

from torch import Tensor

from ..errors import ConceptError
from .captions import TABLES, Caption, Found, find_captions, is_caption_file
from .listing import (
    CAPTIONS,
    MASKS,
    entries,
    is_hidden,
    pictures_in,
    repeats_of,
    subfolders_with_pictures,
    visible_files,
)
from .masks import find_masks, masks_among, read_mask
from .pictures import Deferred, Picture, photo_digest, prior_caption
from .quality import measure
from .reading import SUFFIXES, Photo, Shape, is_picture, read_photo, why_unreadable
from .report import FOUND, PhotoFacts, PhotoWarning, Report, Skipped, counted, listed, small_mask
from .saliency import subject_mask
from .templates import template_of

DEFERRED = 2_000_000      # photos of more pixels are read again when they are framed, to save memory


@dataclass(frozen=True)
class Photos:
    """Pictures to learn from, and the report on them."""

    pictures: list[Picture]
    report: Report


def read_folder(folder: Path | str, captions: Path | str | None = None, masks: Path | str | None = None,
                is_prior: bool = False, class_noun: str = "", subfolders: bool = False,
                resolution: int | None = None, find_subject: bool = False, templates: str = "") -> Photos:
    """Reads all photos of a folder, sorted by name.

    Args:
        folder: A folder, or a single photo.
        captions: Folder of captions, or a table of them; None = beside the photos, and in a subfolder
            "captions". See `captions.find_captions`.
        masks: Folder of masks; None = beside the photos (`a-masklabel.png`), and in a subfolder "masks".
            Photos without a mask are used whole.
        is_prior: Whether these are prior-preservation pictures.
        class_noun: For the captions of prior pictures that have none.
        subfolders: Read the subfolders instead. Their names may give repeats: `10_dog`.
        resolution: Of the training pictures, at which sharpness is measured.
        find_subject: Make a mask for each photo that has none, see `saliency.subject_mask`.
        templates: Kind of the concept (object or style) whose caption templates are given to photos without a
            caption, see `templates`; "" = none.

    Raises:
        ConceptError: A folder is missing, has no pictures, or has no captions or masks of these photos; or a
            file cannot be read.
    """
    folder = Path(folder).expanduser()
    if folder.is_file():
        photos = [folder]
    elif folder.is_dir():
        if subfolders:
            if captions is not None or masks is not None:
                raise ConceptError("captions and masks of subfolders are read from the subfolders; give no "
                                   "other folder for them")
            return _read_subfolders(folder, is_prior, class_noun, resolution, find_subject, templates)
        photos = pictures_in(folder)
    else:
        raise ConceptError(f"the picture folder '{folder}' does not exist")
    return _Reader(folder, photos, captions, masks, is_prior, class_noun, resolution,
                   find_subject=find_subject, templates=templates).read()


def _read_subfolders(folder: Path, is_prior: bool, class_noun: str, resolution: int | None,
                     find_subject: bool, templates: str) -> Photos:
    """The photos of all subfolders. The folder's own photos are not read."""
    parts = subfolders_with_pictures(folder)
    if not parts:
        raise ConceptError(f"the folder '{folder}' has no subfolders with pictures")
    pictures: list[Picture] = []
    facts: list[PhotoFacts] = []
    skipped = [Skipped(path.name, "a subfolder without pictures" if path.is_dir() else "not in a subfolder")
               for path in entries(folder) if path not in parts]
    warnings: list[PhotoWarning] = []
    for part in parts:
        read = _Reader(part, pictures_in(part), None, None, is_prior, class_noun, resolution,
                       repeats_of(part), find_subject, templates, len(pictures)).read()
        first = len(pictures)
        pictures += read.pictures
        facts += [replace(photo, name=f"{part.name}/{photo.name}") for photo in read.report.photos]
        skipped += [replace(file, name=f"{part.name}/{file.name}") for file in read.report.skipped]
        warnings += [replace(warning, photos=tuple(first + i for i in warning.photos))
                     for warning in read.report.warnings]
    what = "prior picture" if is_prior else "photo"
    return Photos(pictures, Report(tuple(facts), tuple(skipped), tuple(warnings), what))


class _Reader:
    """One folder, or one photo, and everything that is found for it."""

    def __init__(self, folder: Path, photos: list[Path], captions: Path | str | None,
                 masks: Path | str | None, is_prior: bool, class_noun: str, resolution: int | None,
                 repeats: int = 1, find_subject: bool = False, templates: str = "",
                 number: int = 0) -> None:      # number: of the first photo
        self.is_single = folder.is_file()
        self.folder = folder.parent if self.is_single else folder
        self.given = folder
        self.photos, self.is_prior, self.class_noun = photos, is_prior, class_noun
        self.resolution, self.repeats, self.find_subject = resolution, repeats, find_subject
        self.templates, self.number = templates, number
        self.entries = [path for path in entries(self.folder) if path not in photos]
        self.files = [path for path in self.entries if path.is_file() and not is_hidden(path)]
        self.side_folders: list[Path] = []      # of captions and masks
        self._check_photos()
        self.captions = self._find_captions(captions)
        self.masks = self._find_masks(masks)

    def _check_photos(self) -> None:
        """Raises ConceptError if there is no readable photo."""
        if self.is_single and not is_picture(self.given.name):
            reason = why_unreadable(self.given.name) or f"readable are {', '.join(SUFFIXES)}"
            raise ConceptError(f"'{self.given}' is neither a folder nor a readable picture; {reason}")
        if self.photos:
            return
        subfolders = [f"'{path.name}' ({counted(len(pictures_in(path)), 'picture')})"
                      for path in subfolders_with_pictures(self.folder)]
        unreadable = [f"'{path.name}' ({why})" for path in self.entries if (why := why_unreadable(path.name))]
        if subfolders:
            raise ConceptError(f"the folder '{self.folder}' holds no pictures itself; its subfolders do: "
                               f"{listed(subfolders)}; choose one of them, or all with --subfolders (10_dog "
                               "then counts 10 times)")
        raise ConceptError(f"the folder '{self.folder}' holds no pictures that can be read; "
                           + (listed(unreadable) if unreadable else f"readable are {', '.join(SUFFIXES)}"))

    def _side_folder(self, given: Path | str | None, name: str, what: str) -> Path | None:
        """The folder of captions or masks: the given one, or the subfolder of that name if there is one."""
        if given is None:
            found = next((path for path in self.entries if path.is_dir() and path.name.lower() == name), None)
        else:
            found = Path(given).expanduser()
            is_table = what == "caption" and found.is_file() and found.suffix.lower() in TABLES
            if not found.is_dir() and not is_table:
                problem = "is not a folder" if found.exists() else "does not exist"
                raise ConceptError(f"the {what} folder '{found}' {problem}")
        if found is not None and found.is_dir():
            self.side_folders.append(found)
        return found

    def _find_captions(self, given: Path | str | None) -> Found:
        where = self._side_folder(given, CAPTIONS, "caption")
        beside = [path for path in self.files if is_caption_file(path)]
        files = [] if where is None else [path for path in visible_files(where) if is_caption_file(path)]
        return self._chosen(partial(find_captions, self.photos), beside, files, where, given, "caption",
                            ".txt")

    def _find_masks(self, given: Path | str | None) -> Found:
        where = self._side_folder(given, MASKS, "mask")
        beside = masks_among([*self.photos, *(path for path in self.files if is_picture(path.name))])
        files = [] if where is None else [path for path in visible_files(where) if is_picture(path.name)]
        return self._chosen(partial(find_masks, self.photos), beside, files, where, given, "mask", ".png")

    def _chosen(self, find: Callable[[Iterable[Path]], Found], beside: list[Path], inside: list[Path],
                where: Path | None, given: Path | str | None, what: str, suffix: str) -> Found:
        """Captions or masks: of a given folder alone; else first those beside the photos, then those of the
        subfolder."""
        if given is None:
            found, more = find(beside), find(inside)
            if inside and not found.of and not more.of:
                self._refuse(where, what, suffix)
            found.unused |= more.unused
            for photo, caption in more.of.items():
                if found.of.setdefault(photo, caption) is not caption:
                    file = caption.file if isinstance(caption, Caption) else caption
                    found.unused.setdefault(file, f"'{photo.name}' has a {what} beside it")
            return found
        found = find([path for path in inside if path not in self.photos])
        if not found.of:
            self._refuse(where, what, suffix)
        reason = f"{what}s are read from '{where}'"
        found.unused |= {path: reason for path in beside if path not in inside}
        return found

    def _refuse(self, where: Path | None, what: str, suffix: str) -> NoReturn:
        photo = self.photos[0]
        raise ConceptError(f"no {what} in '{where}' belongs to a picture in '{self.folder}'; the {what} of "
                           f"'{photo.name}' is '{photo.stem}{suffix}'")

    def read(self) -> Photos:
        read, refused = [], {}
        for number, path in enumerate(self.photos, start=self.number):
            try:
                read.append(self._read(path, number))
            except ConceptError as error:
                refused[path.name] = error
        if refused:
            (first, *others), further = refused, ""
            if others:
                further = f"; {counted(len(others), 'more picture')} cannot be used: {listed(others)}"
            raise ConceptError(f"{refused[first]}{further}") from refused[first]
        what = "prior picture" if self.is_prior else "photo"
        report = Report(tuple(facts for _, facts in read), tuple(self._skipped()),
                        tuple(self._warnings()), what)
        return Photos([picture for picture, _ in read], report)

    def _read(self, path: Path, number: int) -> tuple[Picture, PhotoFacts]:
        """One photo with its caption and mask. number: chooses the template of one without a caption."""
        photo = read_photo(path)
        levels, notes = photo.levels, [photo.note]
        width, height = photo.shape.size
        is_large = height * width > DEFERRED
        source = Deferred((height, width), partial(_levels_of, path)) if is_large else levels
        mask: Tensor | Deferred | None
        mask, mask_from, note = self._mask(path, photo)
        notes.append(note)
        mask_shown = small_mask(mask)
        if is_large and mask is not None:
            file = self.masks.of.get(path)
            again = partial(_subject_of, path) if file is None else partial(_mask_of, file, photo.shape)
            mask = Deferred((height, width), again)
        caption: Caption | None = self.captions.of.get(path)
        text = caption.text if caption is not None else ""
        learned_text = text
        if self.is_prior and not text:
            learned_text = prior_caption(self.class_noun)
        elif self.templates and not text:
            learned_text = template_of(self.templates, number)
        if learned_text != text:
            notes.append(f"learned as '{learned_text.replace('{}', '<name>')}'")
        digest, quality = photo_digest(levels), measure(levels, self.resolution)
        facts = PhotoFacts(path.name, width, height, digest, quality, text,
                           self._named(caption.file) if caption is not None and text else "",
                           mask_from, self.repeats,
                           ", ".join(filter(None, notes)), mask_shown)
        return Picture(source, learned_text, mask, self.is_prior, digest, f"the picture '{path}'",
                       caption.named(path) if caption is not None else "", self.repeats), facts

    def _mask(self, path: Path, photo: Photo) -> tuple[Tensor | None, str, str]:
        """A photo's mask, where it is from, and a note for the report."""
        file = self.masks.of.get(path)
        if file is not None:
            mask, note = read_mask(file, photo.shape)
            return mask, self._named(file), note
        if not self.find_subject:
            return None, "", ""
        found = subject_mask(photo.levels)
        return (None, "", "no subject found, learned whole") if found is None else (found, FOUND, "")

    def _named(self, file: Path) -> str:
        """A file's name for the report: relative to the folder of the photos if it is inside."""
        return file.relative_to(self.folder).as_posix() if file.is_relative_to(self.folder) else str(file)

    def _skipped(self) -> list[Skipped]:
        """All files that were not used, with reasons. Beside a single photo, only its own."""
        used = {caption.file for caption in self.captions.of.values()} | set(self.masks.of.values())
        unused = {caption.file: "the caption is empty" for caption in self.captions.of.values()
                  if not caption.text}
        if not self.is_single:
            unused |= {**self.captions.unused, **self.masks.unused}
            others = [*self.entries, *(path for folder in self.side_folders for path in entries(folder))]
            unused |= {path: self._reason(path) for path in others
                       if path not in used and path not in unused and path not in self.photos}
        return [Skipped(self._named(path), reason) for path, reason in sorted(unused.items()) if reason]

    def _reason(self, path: Path) -> str:
        if is_hidden(path):
            return "a hidden file" if path.name.startswith(".") else "a file of the system"
        if path.is_dir():
            if path in self.side_folders:
                return ""      # its files are named one by one
            count = len(pictures_in(path))
            return f"a subfolder with {counted(count, 'picture')}; subfolders are not read"
        if not path.is_file():
            return "not a file"
        return why_unreadable(path.name) or "neither a picture nor a caption"

    def _warnings(self) -> Iterable[PhotoWarning]:
        """Photos without captions or masks where others have some."""
        for kind, found, text in (("caption", self.captions, "no caption; the others do"),
                                  ("mask", self.masks, "no mask and will be learned whole")):
            bare = tuple(i for i, photo in enumerate(self.photos) if photo not in found.of)
            is_made = self.find_subject if kind == "mask" else bool(self.templates)
            if found.of and bare and not is_made:
                names = listed(self.photos[i].name for i in bare)
                yield PhotoWarning(kind, f"{names} {'has' if len(bare) == 1 else 'have'} {text}", bare)


def _levels_of(path: Path) -> Tensor:
    return read_photo(path).levels


def _subject_of(path: Path) -> Tensor:
    mask = subject_mask(read_photo(path).levels)
    assert mask is not None
    return mask


def _mask_of(file: Path, photo: Shape) -> Tensor:
    return read_mask(file, photo)[0]

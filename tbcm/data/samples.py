"""Images that lie beside their captions, as `0001.png` and `0001.txt`, in a folder or in the shards of a WebDataset."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from tbcm.data.bad import Bad, SampleError
from tbcm.data.files import HEAD_BYTES, shown, what_it_is
from tbcm.data.prompts import texts_of
from tbcm.data.tables import parse_json, value_of
from tbcm.data.texts import encoding_of, nul
from tbcm.errors import UserError

logger = logging.getLogger(__name__)

IMAGES = "jpg", "jpeg", "png", "webp"
CAPTIONS = "txt", "json"

File = TypeVar("File")


class Samples(Generic[File]):
    """Files of one folder or shard, sorted into samples.

    A sample is the files with the same key: one image of `IMAGES`, a .json and a .txt, either of which may be missing.
    Whatever else there is is passed over and counted in `others`, by ending.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self.others: Counter[str] = Counter()
        self.first_of: dict[str, str] = {}
        self._samples: dict[str, dict[str, File]] = {}
        self._twice: dict[str, str] = {}
        self._dotted: dict[str, list[str]] = defaultdict(list)

    def add(self, name: str, key: str, ending: str, file: File) -> None:
        """`name` is `key`.`ending`. One that has dots itself belongs to another kind of file, such as .seg.png."""
        if ending not in (*IMAGES, *CAPTIONS):
            if "." in ending and ending.rpartition(".")[2] in IMAGES:
                self._dotted[key].append(name)
            self.pass_over(name, f".{ending.rpartition('.')[2]}"[:20] if ending else "no ending")
            return
        members = self._samples.setdefault(key, {})
        if ending in members:
            self._twice[key] = name
        members[ending] = file

    def pass_over(self, name: str, kind: str) -> None:
        self.others[kind] += 1
        self.first_of.setdefault(kind, f"{self.where}: {name}")

    def __iter__(self) -> Iterator[tuple[str, File, dict[str, File]] | SampleError]:
        """Key, image and caption files of each sample that has an image, and what is wrong with others."""
        for key, members in self._samples.items():
            images = [ending for ending in IMAGES if ending in members]
            where = f"{self.where}: {shown_name(key)}"
            if key in self._twice:
                name = shown_name(self._twice[key])
                yield SampleError(f"{self.where}: {name}: is there twice; give each sample its own name", "there twice")
            elif len(images) != 1:
                found = " and ".join(f".{e}" for e in images) or "no image"
                kind = "several images" if images else "no image"
                yield SampleError(f"{where}: has {found}; a sample has one .{', .'.join(IMAGES)}", kind)
            else:
                yield key, members[images[0]], members
        for key, names in self._dotted.items():
            if not any(image in self._samples.get(key, ()) for image in IMAGES):
                for name in names:
                    yield SampleError(
                        f"{self.where}: {shown_name(name)}: has dots before its ending, but a sample's name ends at the"
                        " first dot; replace them by _, in its caption's name too",
                        "dots in the name",
                    )


def caption_of(members: dict[str, Any], column: str, read: Callable[[Any], bytes], where: str) -> tuple[list[str], str]:
    """The texts of a sample's caption, and the ending of the file they are from: of the .json, where that has `column`,
    else of the .txt. ("json.prompt" is the column "prompt" of the .json.)

    Raises SampleError where there are none.
    """
    other = ""
    if "json" in members:
        inside = f"{where}.json"
        row = _json(decoded_text(read(members["json"]), inside), inside)
        for name in dict.fromkeys([column, column.removeprefix("json.")]):
            try:
                value = value_of(row, name, inside)
            except UserError:
                continue
            return given(value, f"{inside}: {name}"), "json"
        other = f"; .json has {', '.join(map(shown, list(row)[:20])) or 'nothing'}"
    if "txt" not in members:
        raise SampleError(f"{where}: has no caption; give it a .txt, or a .json with {column!r}{other}", "no caption")
    text = decoded_text(read(members["txt"]), f"{where}.txt")
    return given(text, f"{where}.txt"), "txt"


def decoded_text(content: bytes, where: str) -> str:
    """Raises SampleError where `content` is not text."""
    kind = what_it_is(content[:HEAD_BYTES])
    try:
        text = content.decode(encoding_of(content[:4]))
    except UnicodeError as error:
        place = f" (byte {error.start})" if isinstance(error, UnicodeDecodeError) else ""
        kind = kind or f"not UTF-8{place}; save it as UTF-8"
    if kind is None and "\0" in text:
        raise SampleError(f"{where}: {nul(text)}", "caption that is no text")
    if kind is not None:
        raise SampleError(f"{where}: is {kind}", "caption that is no text")
    return text


def report(name: str, groups: Sequence[Samples[Any]], bad: Bad, among: int) -> None:
    """Logs what was passed over and skipped. Raises UserError where too much was, or nothing is left."""
    others: Counter[str] = Counter()
    for group in groups:
        others.update(group.others)
    firsts = {kind: first for group in reversed(groups) for kind, first in group.first_of.items()}
    told = ", ".join(f"{count:,} {kind} (first {firsts[kind]})" for kind, count in others.most_common(8))
    bad.report(among)
    if among == bad.count:
        raise UserError(
            f"{name}: holds no samples; give each image (.{', .'.join(IMAGES)}) a .txt or .json"
            + f"; passed over: {told}" * bool(told)
        )
    if told:
        logger.info("%s: passed over: %s%s", name, told, ", ..." * (len(others) > 8))


def shown_name(name: str) -> str:
    """A file's name in a message: any bytes may be in it."""
    return name.encode(errors="backslashreplace").decode()


def _json(text: str, where: str) -> dict[str, Any]:
    try:
        row = parse_json(text, where)
    except UserError as error:
        raise SampleError(str(error), "damaged .json") from None
    if not isinstance(row, dict):
        raise SampleError(f"{where}: give an object such as {{'text': ...}}", "damaged .json")
    return row


def given(value: Any, what: str) -> list[str]:
    """The texts of a caption. Raises SampleError where it has none."""
    try:
        texts = texts_of(value, what)
    except UserError as error:
        raise SampleError(str(error), "caption that is no text") from None
    if not texts:
        raise SampleError(f"{what} is {shown(value)}; give text or take it out", "no caption")
    return texts

"""Everything that a check can find, as one table: stable id, severity, wording, repair.

Ids never change and are never used again for something else; the wording may change. A check names an id and its place
(``findings.Finding``); what it means, and whether and how it is repaired, stands here alone.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Severity(enum.StrEnum):
    """How bad a problem is."""

    NOTE = "note"
    """Normal after a crash, or harmless: the next open deals with it. Not counted as a problem by the exit code."""
    DEGRADED = "degraded"
    """No block is lost, but something derived is wrong or missing: blocks may be missed, or opening takes longer."""
    DAMAGE = "damage"
    """Bytes that were durable are gone or unreadable; the blocks in question are misses."""
    FATAL = "fatal"
    """The store cannot be opened as it is."""


class Repair(enum.StrEnum):
    """What a repair does; each is carried out by ``repair``. Nothing is ever unlinked."""

    NONE = "nothing"
    REWRITE_SUPERBLOCK = "write the superblock anew from the segments"
    REWRITE_HEADER = "write the segment's header anew from its records"
    RESEAL = "seal the segment anew behind its last good record, listing its good records"
    SET_ASIDE = "move the file into quarantine, with a note"
    DROP_ENTRIES = "drop the index entries"
    ADD_ENTRIES = "add the records to the index"
    REBUILD_INDEX = "set the index aside and derive it from the segments"


@dataclass(frozen=True, slots=True)
class Problem:
    """One row of the table. ``template`` is filled with the finding's ``facts``."""

    id: str
    severity: Severity
    repair: Repair
    lossless: bool
    """Whether the repair gives up nothing that could still be read before it."""
    template: str
    explanation: str
    """For ``--explain`` and the documentation: what it means, how it comes about, what repair does."""


_N, _D, _X, _F = Severity.NOTE, Severity.DEGRADED, Severity.DAMAGE, Severity.FATAL
_LOSSLESS, _LOSSY = True, False

# fmt: off
_SUPERBLOCK = (
    Problem(
        "SB-MISSING", _F, Repair.REWRITE_SUPERBLOCK, _LOSSLESS,
        "{path} is missing; the segments ({segments} of them) name the store {store_uuid}",
        "The superblock is gone, so the store cannot be opened. Everything in it but the time of creation is repeated in every "
        "segment. The repair writes it anew with the uuid that most segments name.",
    ),
    Problem(
        "SB-CRC", _F, Repair.REWRITE_SUPERBLOCK, _LOSSLESS,
        "{path} is damaged: {error}",
        "The superblock fails its checksum or its rules. The repair keeps its bytes in quarantine and writes it anew with the "
        "uuid that most segments name.",
    ),
    Problem(
        "SB-VERSION", _F, Repair.NONE, _LOSSLESS,
        "{path} cannot be interpreted: {error}",
        "The superblock is intact and of a newer version, or the file belongs to something else. Nothing is damaged and nothing "
        "is touched: use a newer kvlode, or check the path.",
    ),
    Problem(
        "SB-LEFTOVER", _N, Repair.NONE, _LOSSLESS,
        "{path} is left over from a creation that was cut short",
        "A power cut came between writing the superblock and renaming it. The next creation replaces the file.",
    ),
)
_SEGMENTS = (
    Problem(
        "SEG-NAME", _D, Repair.SET_ASIDE, _LOSSLESS,
        "{path} is not the name of a segment",
        "A file in segments/ that the store did not make. It takes space and is read by nobody. The repair moves it to "
        "quarantine.",
    ),
    Problem(
        "SEG-SPARE", _N, Repair.NONE, _LOSSLESS,
        "{path} is a prepared segment that was never used",
        "A writer keeps the next segment ready; a crash leaves it behind. The next opening for writing removes it.",
    ),
    Problem(
        "SEG-FREED", _N, Repair.NONE, _LOSSLESS,
        "{path} was freed; its removal was undone (segments begin at {first_live:016x})",
        "Reclaim had removed this segment and a power cut brought the file back. Readers ignore it, the next opening for "
        "writing removes it.",
    ),
    Problem(
        "SEG-EMPTY", _N, Repair.SET_ASIDE, _LOSSLESS,
        "{path} holds no record in {size} bytes",
        "A segment that was made and not written before the writer ended. The next opening for writing removes it; the repair "
        "moves it to quarantine.",
    ),
    Problem(
        "SEG-BLANK", _X, Repair.SET_ASIDE, _LOSSLESS,
        "{path} holds no record in {size} bytes, though later segments were finished",
        "Segments are finished one after the other, so this one had records once: the file was emptied or overwritten with zeros. "
        "Its blocks are lost. The repair moves the file to quarantine.",
    ),
    Problem(
        "SEG-HDR-CRC", _D, Repair.REWRITE_HEADER, _LOSSLESS,
        "{path} at {offset}: the segment's header is damaged: {error}",
        "The first page of a segment is damaged while its records are those of this store and place. No block is lost; what it "
        "said of earlier segments is. The repair writes the page anew from the records.",
    ),
    Problem(
        "SEG-HDR-PLACE", _D, Repair.SET_ASIDE, _LOSSLESS,
        "{path} belongs elsewhere: expected {expected}, found {actual}",
        "A segment of another store, or one under the name of another id; none of its records is accepted here. The repair "
        "moves it to quarantine unchanged.",
    ),
    Problem(
        "SEG-ALIEN", _X, Repair.SET_ASIDE, _LOSSY,
        "{path}: nothing in {size} bytes can be read as a record of this place: {error}",
        "The file has content, but neither its header nor any record in it is one of this store. If it ever held blocks they "
        "are lost. The lossy repair moves it to quarantine.",
    ),
    Problem(
        "SEG-UNSEALED", _N, Repair.RESEAL, _LOSSLESS,
        "{path} is not sealed; its log ends at {offset}",
        "The segment a writer was filling when it ended. The next opening for writing seals it, and so does the repair.",
    ),
    Problem(
        "SEG-SEAL-MISSING", _D, Repair.RESEAL, _LOSSLESS,
        "{path} is not sealed, though later segments were finished; its log ends at {offset}",
        "Segments are sealed in order, so this one had a seal: it was damaged, or the file was copied while it was being "
        "written. Its records are found by walking. The repair seals it anew.",
    ),
    Problem(
        "SEG-TAIL-TORN", _N, Repair.RESEAL, _LOSSLESS,
        "{path} at {offset}: the log ends in bytes that were never acknowledged: {error}",
        "A crash cut a write short. Nothing that was reported as durable is lost. The next opening for writing seals the "
        "segment in front of these bytes, and so does the repair.",
    ),
    Problem(
        "SEG-SEAL-CRC", _D, Repair.RESEAL, _LOSSLESS,
        "{path} at {offset}: {part} is damaged: {error}",
        "Seal record, table of contents or trailer of a sealed segment. The records do not need them, but opening takes longer "
        "and tombstones lose a second witness. The repair seals the segment anew from its records.",
    ),
    Problem(
        "SEG-SEAL-MISMATCH", _D, Repair.RESEAL, _LOSSLESS,
        "{path} at {offset}: the table of contents says {what} {expected}, the record says {actual}",
        "A record is intact and differs from the row that lists it. Records are right, tables are derived. "
        "The repair seals the segment anew from its records.",
    ),
    Problem(
        "SEG-CUT", _X, Repair.RESEAL, _LOSSLESS,
        "{path} ends at {size}; expected {expected}",
        "The file is shorter than what had been sealed or synced: it was truncated or copied in part. Records behind the cut "
        "are lost. The repair seals what is left.",
    ),
)
_RECORDS = (
    Problem(
        "REC-HDR-CRC", _X, Repair.RESEAL, _LOSSY,
        "{path} at {offset}: the header of a listed {type} is damaged: {error}",
        "The table of contents lists a record whose header page fails its checks. A block is lost; a tombstone or namespace "
        "drop is kept by the table of contents. The lossy repair keeps the page's bytes in quarantine, writes deletes anew from "
        "their rows, and seals the segment without the damaged blocks.",
    ),
    Problem(
        "REC-GAP", _X, Repair.RESEAL, _LOSSY,
        "{path} at {offset}: {length} bytes that were durable hold no record: {error}",
        "Damage where no table of contents tells what was there. The blocks in this range are lost, and deletes in it too. The "
        "lossy repair keeps the bytes in quarantine and seals the segment without them.",
    ),
    Problem(
        "REC-UNKNOWN", _F, Repair.NONE, _LOSSLESS,
        "{path} at {offset}: an intact structure that this version does not know: {error}",
        "Written by a newer kvlode. Nothing is damaged and nothing is touched: use a newer version.",
    ),
    Problem(
        "REC-NS-MISSING", _N, Repair.NONE, _LOSSLESS,
        "{path} at {offset}: blocks of namespace {namespace}, which this segment does not describe: {count}",
        "The blocks can be read by whoever knows their namespace; tools cannot say which model they belong to unless another "
        "segment describes it. This is what is left after a damaged namespace record was cut out.",
    ),
    Problem(
        "REC-NS-DAMAGED", _D, Repair.RESEAL, _LOSSY,
        "{path} at {offset}: the descriptor of namespace {namespace} is damaged: {error}",
        "The record that describes a namespace fails its checksum, is no descriptor, or has another digest. Its blocks stay "
        "readable by whoever knows the namespace. The lossy repair keeps its bytes in quarantine and seals the segment without "
        "the record.",
    ),
)
_PAYLOADS = (
    Problem(
        "PAY-CRC", _X, Repair.RESEAL, _LOSSY,
        "{path} at {offset}: stripe {stripe} of block {key} fails its checksum: {error}",
        "Bytes of a block changed on the drive. A get reports the block as corrupt and then as a miss. Other stripes of it may "
        "be readable. The lossy repair keeps the block's bytes in quarantine and seals the segment without it.",
    ),
    Problem(
        "PAY-DECODE", _X, Repair.RESEAL, _LOSSY,
        "{path} at {offset}: stripe {stripe} of block {key} cannot be decoded: {error}",
        "The bytes are those that were written, but they are no valid encoding: memory or software failed while the block was "
        "written. The lossy repair seals the segment without the block.",
    ),
    Problem(
        "PAY-RAW", _X, Repair.RESEAL, _LOSSY,
        "{path} at {offset}: block {key} decodes to other bytes than were put: {error}",
        "Every stripe is intact and decodes, but the checksum of the raw bytes, taken when the block was put, differs: memory "
        "failed between put and encoding. The lossy repair seals the segment without the block.",
    ),
    Problem(
        "PAY-PAD", _N, Repair.NONE, _LOSSLESS,
        "{path} at {offset}: bytes of padding that are not zero: {count}",
        "Padding is covered by no checksum and ignored by readers, so nothing is lost. Writers lay zeros there: something else "
        "changed these bytes, which says that the drive or the memory of this machine is not to be trusted.",
    ),
)
_INDEX = (
    Problem(
        "IDX-MISSING", _D, Repair.REBUILD_INDEX, _LOSSLESS,
        "{path}: the store has no index",
        "The index is derived data. The next opening for writing rebuilds it from the segments, and so does the repair.",
    ),
    Problem(
        "IDX-UNREADABLE", _D, Repair.REBUILD_INDEX, _LOSSLESS,
        "{path} cannot be read: {error}",
        "The index is derived data. The next opening for writing may notice and rebuild it; the repair sets it aside and "
        "rebuilds it now.",
    ),
    Problem(
        "IDX-FOREIGN", _D, Repair.REBUILD_INDEX, _LOSSLESS,
        "{path} was built for the store {actual}, this is {expected}",
        "The index of another store was copied here. The repair sets it aside and rebuilds it from the segments.",
    ),
    Problem(
        "IDX-CHECKPOINT", _D, Repair.REBUILD_INDEX, _LOSSLESS,
        "{path}: its checkpoint {actual} lies behind the end of the log at {expected}",
        "The index claims to know records that the segments do not hold: segments were lost, or the index is from another "
        "moment. Records written from now on could be taken for known ones. The repair rebuilds the index from the segments.",
    ),
    Problem(
        "IDX-VALUE", _D, Repair.REBUILD_INDEX, _LOSSLESS,
        "{path}: entries of an unknown layout: {count}, the first for {key}",
        "Written by another version, or damaged. Their blocks count as misses. The repair rebuilds the index from the segments.",
    ),
    Problem(
        "IDX-DANGLING", _D, Repair.DROP_ENTRIES, _LOSSLESS,
        "{path}: the entry of {key} points to segment {segment_id:016x} at {offset}, where {error}",
        "The record that the entry names is not there. The key counts as present until it is read. The repair drops the entry.",
    ),
    Problem(
        "IDX-DELETED", _D, Repair.DROP_ENTRIES, _LOSSLESS,
        "{path}: the entry of {key} points to a deleted block in segment {segment_id:016x} at {offset}",
        "A tombstone or namespace drop of the log has killed this block, and still it would be served. The repair drops the "
        "entry.",
    ),
    Problem(
        "IDX-STALE", _D, Repair.REBUILD_INDEX, _LOSSLESS,
        "{path}: the entry of {key} says {what} {actual}, the log says {expected}",
        "The entry disagrees with the record that it points to, or points to an older copy than the log holds. Reading it "
        "reports the block as corrupt, or gives an older version. The repair rebuilds the index from the segments.",
    ),
    Problem(
        "IDX-ORPHAN", _D, Repair.ADD_ENTRIES, _LOSSLESS,
        "{path}: no entry for the live block {key} in segment {segment_id:016x} at {offset}",
        "A valid block that nothing has deleted, and that cannot be found: its entry was lost. The repair adds it.",
    ),
    Problem(
        "IDX-FREEING", _N, Repair.NONE, _LOSSLESS,
        "{path}: live blocks without an entry in segment {segment_id:016x}, which was being freed: {count}",
        "Reclaim takes the entries of the oldest segment out of the index before it removes the file; it was cut short in "
        "between. The segment is the next to be freed.",
    ),
    Problem(
        "IDX-BEHIND", _N, Repair.NONE, _LOSSLESS,
        "{path}: records behind its checkpoint: {count}",
        "The index lags behind the log, as after a crash. The next opening for writing adds them.",
    ),
)
_SPACE = (
    Problem(
        "SPC-STRANGE", _N, Repair.NONE, _LOSSLESS,
        "{path} does not belong to the store",
        "Something that the store did not make lies in its folder. It is left alone: move it elsewhere, since a store wants a "
        "folder of its own.",
    ),
    Problem(
        "QUA-NOTE", _N, Repair.NONE, _LOSSLESS,
        "{path} lies in quarantine without a note",
        "Every file that a repair sets aside has a note beside it (<name>.json) that says where it came from and why. This one "
        "has none: somebody else put it there, or removed the note.",
    ),
    Problem(
        "QUA-SIZE", _N, Repair.NONE, _LOSSLESS,
        "{path} takes {actual} bytes, over {expected} (5 % of the store)",
        "What repairs have set aside counts against the store's capacity. Look at the notes, copy away what may still be of "
        "use, and delete the files by hand: kvlode never does.",
    ),
)
# fmt: on

_TABLE: tuple[Problem, ...] = (*_SUPERBLOCK, *_SEGMENTS, *_RECORDS, *_PAYLOADS, *_INDEX, *_SPACE)

PROBLEMS: dict[str, Problem] = {problem.id: problem for problem in _TABLE}
"""By id, in the order of the passes."""

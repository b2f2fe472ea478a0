"""What each bad input gets. A test says by `@pytest.mark.row(number)` which rows of this table it is about.

Every refusal has the code given here and an ErrorInfo with a stable reason; while it happens, a neighbour's tokens are
what they are without it, and afterwards nothing is left of it: no page, no pin, no staged file, no task.
"""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

TESTS = Path(__file__).parent
ROWS = {
    # An adapter's content: refused before anything is visible.
    1: "a weights file that is empty or ends in its header's length: INVALID_ARGUMENT",
    2: "a header length of 2^63 or past the end: INVALID_ARGUMENT, nothing is allocated",
    3: "a header over its cap, too many tensors or dimensions: INVALID_ARGUMENT, the size before it is parsed",
    4: "a header or configuration that is no UTF-8, no JSON, nested deep, or has a key twice: INVALID_ARGUMENT",
    5: "data offsets that overlap, leave holes, are negative or past the end; bytes left over: INVALID_ARGUMENT",
    6: "a shape that is not its bytes, or overflows: INVALID_ARGUMENT",
    7: "millions of tensors of no size: INVALID_ARGUMENT, unread",
    8: "weights that are NaN, infinite, or too large for the dtype: INVALID_ARGUMENT, the tensor named",
    9: "r that is no integer from 1 on, lora_alpha that is NaN or huge: INVALID_ARGUMENT",
    10: "a rank over the maximum, by a pattern too: FAILED_PRECONDITION with the limit",
    11: "A without B, or B without A: INVALID_ARGUMENT",
    12: "shapes that do not fit, or a version of another base model: FAILED_PRECONDITION",
    13: "target modules that the base model has not: FAILED_PRECONDITION, all named",
    14: "features that are not served exactly: FAILED_PRECONDITION, named",
    15: "paths or remote code in the configuration: INVALID_ARGUMENT, never followed",
    16: "a pickle, by name or in disguise: INVALID_ARGUMENT",
    17: "an archive: INVALID_ARGUMENT",
    18: "tensor names with NUL, ../ or bidi marks: INVALID_ARGUMENT",
    19: "an adapter of zeros: accepted, and the output is the base model's",
    # Uploads and the registry.
    20: "bytes that are not what was announced: INVALID_ARGUMENT; with another digest the file begins again",
    21: "a write elsewhere than at the committed offset: OUT_OF_RANGE, with that offset",
    22: "a stream that breaks off: goes on at the committed offset until the upload expires, then nothing is left",
    23: "two writers of one file: the newest has it, the older one gets ABORTED",
    24: "a request_id sent again: the first result",
    25: "the same content again: OK, stored once",
    26: "a name that is taken, a stale etag, a version with a tag: ALREADY_EXISTS, ABORTED, FAILED_PRECONDITION",
    27: "an id that is none: INVALID_ARGUMENT",
    28: "what another tenant has: the same answer as for what is not there",
    29: "a quota passed on the way: RESOURCE_EXHAUSTED at once",
    30: "a full disk: RESOURCE_EXHAUSTED, the space is given back",
    31: "SIGKILL at any step of publishing: the whole version or nothing",
    32: "stored bytes that are damaged or missing: DATA_LOSS for their adapter alone, which is quarantined",
    33: "a catalogue that is locked or damaged: UNAVAILABLE, or the server does not start",
    34: "a deletion while the version is read: the reader keeps it",
    35: "page tokens that are forged or another list's, negative page sizes: INVALID_ARGUMENT",
    36: "imports from anywhere but the tenant's own folder: PERMISSION_DENIED",
    # Generations.
    37: "bytes that are no message, strings that are no UTF-8: INVALID_ARGUMENT with a fixed text",
    38: "messages and metadata over their caps: RESOURCE_EXHAUSTED",
    39: "no prompt, an empty one, no adapter: INVALID_ARGUMENT",
    40: "token ids outside the vocabulary: INVALID_ARGUMENT",
    41: "more than the context or the pool can hold: INVALID_ARGUMENT with the limits",
    42: "max_tokens 0, min_tokens above it: INVALID_ARGUMENT",
    43: "temperature and top_p out of range or NaN: INVALID_ARGUMENT",
    44: "lists and texts of any length: INVALID_ARGUMENT, each has a cap",
    45: "a stop string in pieces: found, and nothing behind it is sent",
    46: "an adapter, version or tag that is not there: NOT_FOUND, and the disk is not asked",
    47: "a generation_id that is running: ALREADY_EXISTS",
    48: "no valid key, or one without the role: UNAUTHENTICATED, PERMISSION_DENIED, before all else",
    49: "a client that vanishes: its generation ends and its pages are free",
    # What happens while generations run.
    50: "a deadline that passes in the queue or while decoding: DEADLINE_EXCEEDED, and nothing is begun behind it",
    51: "a reader that stalls: what is kept for it is bounded, then RESOURCE_EXHAUSTED",
    52: "a tenant that floods: RESOURCE_EXHAUSTED and when to try again, for it alone",
    53: "a thousand cold adapters at once: they queue, then RESOURCE_EXHAUSTED; all that queue end",
    54: "outputs that outgrow the pool: preempted, and the same tokens",
    55: "an adapter that finds everything pinned waits; one that can never fit: RESOURCE_EXHAUSTED",
    56: "a tag moved, a version or adapter deleted: streams end on the version that Started named",
    57: "an adapter whose read hangs or fails: UNAVAILABLE for its own requests, the hanging one's in time",
}


def claims() -> Iterator[tuple[int, str]]:
    """Row and test."""
    for path in sorted(TESTS.glob("test_*.py")):
        if "mark.row(" not in path.read_text():
            continue
        for name, found in vars(import_module(path.stem)).items():
            for mark in getattr(found, "pytestmark", ()) if name.startswith("test_") else ():
                if mark.name == "row":
                    yield from ((number, f"{path.name}::{name}") for number in mark.args)


def test_every_row_has_a_test() -> None:
    tests: dict[int, list[str]] = {}
    for row, test in claims():
        tests.setdefault(row, []).append(test)
    assert {row: text for row, text in ROWS.items() if row not in tests} == {}
    assert {row: names for row, names in tests.items() if row not in ROWS} == {}

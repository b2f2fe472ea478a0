"""Adapters that are refused: what is wrong with each, and what is to be said of it."""

import json
import struct
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np

from adapter_files import safetensors_bytes, with_header
from fake_engine import BASE_MODEL
from lorasrv.model.base_shapes import base_shapes

Code = grpc.StatusCode
BASE = base_shapes(BASE_MODEL, "float32")
QUERY = next(module for module in BASE.modules if module.path == "self_attn.q_proj")


def config(**changes: Any) -> bytes:
    fields = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    return json.dumps({**fields, **changes}).encode()


def arrays(rank: int = 4, fill: float | None = None) -> dict[str, Any]:
    """A and B of q_proj in all layers; random, or all `fill`."""
    random = np.random.default_rng(0)
    found: dict[str, Any] = {}
    for layer in range(BASE.num_layers):
        prefix = f"base_model.model.{BASE.layer_prefix}.{layer}.self_attn.q_proj"
        for side, shape in (("A", (rank, QUERY.in_features)), ("B", (QUERY.out_features, rank))):
            values = random.standard_normal(shape) if fill is None else np.full(shape, fill)
            found[f"{prefix}.lora_{side}.weight"] = values.astype(np.float32)
    return found


FIRST, SECOND, *_ = arrays()


def changed(change: Callable[[dict[str, Any]], object]) -> bytes:
    tensors = arrays()
    change(tensors)
    return safetensors_bytes(tensors)


def edited_header(edit: Callable[[dict[str, Any]], object], extra: bytes = b"") -> bytes:
    whole = safetensors_bytes(arrays())
    (size,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + size])
    edit(header)
    return with_header(json.dumps(header).encode(), whole[8 + size :] + extra)


def shifted(by: int, name: str = "") -> Callable[[dict[str, Any]], None]:
    def edit(header: dict[str, Any]) -> None:
        entry = header[name or FIRST]
        entry["data_offsets"] = [offset + by for offset in entry["data_offsets"]]

    return edit


def of_no_size(num_tensors: int) -> bytes:
    nothing = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    return with_header(json.dumps({f"t{index}": nothing for index in range(num_tensors)}).encode())


def value(number: float, dtype: Any = np.float32) -> bytes:
    def change(tensors: dict[str, Any]) -> None:
        array = tensors[FIRST].astype(dtype)
        array[0, 0] = number
        tensors[FIRST] = array if dtype is np.float32 else ("F64", array.shape, array.tobytes())

    return changed(change)


GOOD = safetensors_bytes(arrays())
MALFORMED, INVALID = (Code.INVALID_ARGUMENT, "MALFORMED_FILE"), (Code.INVALID_ARGUMENT, "INVALID_ADAPTER")
RANK, MISMATCH, UNSUPPORTED = (
    (Code.FAILED_PRECONDITION, reason) for reason in ("RANK_TOO_LARGE", "BASE_MISMATCH", "UNSUPPORTED_FEATURE")
)
# Row of the table of bad inputs, what it is, configuration, weights, code and reason, and what is said of it.
CONTENT = [
    (1, "no bytes", config(), b"", MALFORMED, "file of 0 bytes is shorter than"),
    (1, "half a header length", config(), b"\x08\0\0\0", MALFORMED, "file of 4 bytes is shorter than"),
    (
        2,
        "header length 2^63",
        config(),
        struct.pack("<Q", 1 << 63) + b"{}",
        MALFORMED,
        f"length {1 << 63} is past the end",
    ),
    (
        2,
        "header past the end",
        config(),
        struct.pack("<Q", 1 << 20) + b"{}",
        MALFORMED,
        f"length {1 << 20} is past the end",
    ),
    (
        3,
        "header over its cap",
        config(),
        with_header(b"{" + b" " * (1 << 20) + b"}"),
        MALFORMED,
        f"length {(1 << 20) + 2} is over the limit of {1 << 20}",
    ),
    (
        3,
        "too many tensors",
        config(),
        edited_header(lambda h: h.update({f"t{i}": h[FIRST] for i in range(8200 - len(h))})),
        MALFORMED,
        "8200 tensors are over the limit of 8192",
    ),
    (
        3,
        "three dimensions",
        config(),
        changed(lambda t: t.update({FIRST: t[FIRST][None]})),
        MALFORMED,
        f"{FIRST} has 3 dimensions; the limit is 2",
    ),
    (4, "not UTF-8", config(), with_header(b'{"\xff": 1}'), MALFORMED, "not UTF-8 at byte 2"),
    (4, "not JSON", config(), with_header(b"{nope}"), MALFORMED, "not JSON"),
    (4, "nested", config(), with_header(b'{"a":' * 20000 + b"1" + b"}" * 20000), MALFORMED, "nested too deep"),
    (4, "a key twice", config(), with_header(b'{"a": {}, "a": {}}'), MALFORMED, "key 'a' occurs twice"),
    (4, "a leading space", config(), with_header(b" " + json.dumps({}).encode()), MALFORMED, "does not start with '{'"),
    (4, "configuration not JSON", b"{nope}", GOOD, MALFORMED, "adapter_config.json: not JSON"),
    (
        4,
        "configuration not UTF-8",
        config(revision="\xff").replace(b"\\u00ff", b"\xff"),
        GOOD,
        MALFORMED,
        "adapter_config.json: not UTF-8",
    ),
    (
        4,
        "configuration nested",
        b'{"r":' + b"[" * 100_000,
        GOOD,
        MALFORMED,
        "adapter_config.json: JSON nested too deep",
    ),
    (4, "a key twice in the configuration", config()[:-1] + b', "r": 4}', GOOD, MALFORMED, "key 'r' occurs twice"),
    (5, "overlapping", config(), edited_header(shifted(-4, SECOND)), MALFORMED, f"{SECOND} at byte 3068 overlaps"),
    (5, "a hole", config(), edited_header(shifted(4)), MALFORMED, f"{FIRST} at byte 4 leaves a hole"),
    (5, "negative offsets", config(), edited_header(shifted(-4)), MALFORMED, f"{FIRST} has data_offsets [-4, 3068]"),
    (5, "past the end", config(), GOOD[:-4], MALFORMED, "tensors end at byte"),
    (5, "trailing bytes", config(), edited_header(lambda header: None, b"tail"), MALFORMED, "tensors end at byte"),
    (
        6,
        "shape and bytes",
        config(),
        edited_header(lambda h: h[FIRST].update(shape=[4, 1])),
        MALFORMED,
        f"{FIRST} of F32 [4, 1] takes 16 bytes, not 3072",
    ),
    (
        6,
        "a shape that overflows",
        config(),
        edited_header(lambda h: h[FIRST].update(shape=[1 << 62, 4])),
        MALFORMED,
        f"has shape [{1 << 62}, 4]",
    ),
    *(
        (7, f"{num} tensors of no size", config(), of_no_size(num), MALFORMED, said)
        for num, said in (
            (8000, "has shape [0]; dimensions are integers >= 1"),
            (15000, "15000 tensors are over the limit of 8192"),
        )
    ),
    (8, "NaN", config(), value(float("nan")), INVALID, FIRST),
    (8, "infinity", config(), value(float("inf")), INVALID, FIRST),
    (8, "over float32", config(), value(1e300, np.float64), INVALID, f"too large for float32: {FIRST}"),
    *((9, f"r {r!r}", config(r=r), GOOD, INVALID, f"r {r!r} is not an integer >= 1") for r in (0, -1, 2.5, "4")),
    (9, "alpha NaN", config(lora_alpha=float("nan")), GOOD, MALFORMED, "NaN is not a JSON number"),
    (9, "alpha huge", config(lora_alpha=1e300), GOOD, INVALID, "lora_alpha 1e+300 is not a number > 0 and <= 65536"),
    (10, "rank 257", config(r=257), safetensors_bytes(arrays(rank=1)), RANK, "257 is over the maximum rank of 256"),
    (
        10,
        "rank 300 by pattern",
        config(rank_pattern={"q_proj": 300}),
        GOOD,
        RANK,
        "300 is over the maximum rank of 256",
    ),
    (
        11,
        "A without B",
        config(),
        changed(lambda t: t.pop(FIRST.replace("lora_A", "lora_B"))),
        INVALID,
        "self_attn.q_proj.lora_B",
    ),
    (11, "B without A", config(), changed(lambda t: t.pop(FIRST)), INVALID, "self_attn.q_proj.lora_A"),
    (
        12,
        "another base's shape",
        config(),
        changed(lambda t: t.update({FIRST: t[FIRST][:, :-1]})),
        MISMATCH,
        f"{FIRST} is [4, 191], not [4, 192]",
    ),
    (13, "unknown modules", config(target_modules=["q_proj", "nope", "nix"]), GOOD, UNSUPPORTED, "nix, nope"),
    *(
        (14, f"{changes}", config(**changes), GOOD, UNSUPPORTED, next(iter(changes)))
        for changes in (
            {"peft_type": "LOHA"},
            {"bias": "all"},
            {"use_dora": True},
            {"modules_to_save": ["lm_head"]},
            {"trainable_token_indices": [1]},
        )
    ),
    (15, "auto_map", config(auto_map={"AutoModel": "evil.Model"}), GOOD, INVALID, "auto_map"),
    (15, "an absolute path", config(layers_pattern=["/etc/passwd"]), GOOD, INVALID, "'/etc/passwd'"),
    (15, "remote code", config(trust_remote_code=True), GOOD, INVALID, "trust_remote_code"),
    (15, "a path", config(target_modules="../../etc/passwd"), GOOD, INVALID, "'../../etc/passwd'"),
    (16, "a pickle", config(), b"\x80\x04\x95" + b"\0" * 64, MALFORMED, "looks like a pickle, which is never accepted"),
    *(
        (
            18,
            ascii(name),
            config(),
            changed(lambda t, name=name: t.update({name: t.pop(FIRST)})),
            MALFORMED,
            ascii(name),
        )
        for name in ("a\0b", "../../x", "a\u202eb")
    ),
]

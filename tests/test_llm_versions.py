"""A training loop's adapters: a live PEFT model publishes versions while requests run."""

import dataclasses
import gc
import shutil
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

from lorasrv import LLM
from lorasrv.config import SchedulerConfig
from lorasrv.errors import InvalidRequest
from lorasrv.memory.packing import PackedAdapter
from lorasrv.offline.live_adapter import adapter_files
from lorasrv.types import EngineStatus, SamplingParams, Tier
from lorasrv_adapters.errors import ContentRefused
from peft_models import random_llama

TOKENIZER = Path(__file__).parent.parent / "adapters" / "samples" / "base" / "tokenizer.json"
NUM_TOKENS = 12
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS)
PROMPT = [5, 17, 42, 99, 3, 8, 64]
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    random_llama(folder)
    shutil.copy(TOKENIZER, folder)
    return folder


@pytest.fixture(scope="module")
def live(base: Path, tmp_path_factory: pytest.TempPathFactory) -> PeftModel:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(random_llama(tmp_path_factory.mktemp("live")), config)
    train(model, 0)
    return model.eval()


@pytest.fixture
def llm(base: Path) -> Iterator[LLM]:
    with LLM(base) as llm:
        yield llm
        llm.check()


def train(model: PeftModel, seed: int) -> None:
    """A step of training: every weight changes, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.25, generator=generator)


def publish(llm: LLM, model: PeftModel, name: str = "policy") -> str:
    return llm.add_adapter(name, get_peft_model_state_dict(model), model.peft_config["default"])


def peft_tokens(model: PeftModel, num_tokens: int = NUM_TOKENS) -> tuple[int, ...]:
    """PEFT's own greedy continuation, with the weights that the model has now."""
    ids = torch.tensor([PROMPT])
    mask = torch.ones_like(ids)
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=num_tokens, do_sample=False)
    return tuple(out[0, len(PROMPT) :].tolist())


def our_tokens(llm: LLM, name: str = "policy", num_tokens: int = NUM_TOKENS) -> tuple[int, ...]:
    sampling = SamplingParams(temperature=0, max_tokens=num_tokens)
    return llm.generate([PROMPT], adapter=name, sampling=sampling)[0].token_ids


def digests(status: EngineStatus, *tiers: Tier) -> list[str]:
    return [adapter.digest for adapter in status.adapters if adapter.tier in tiers]


def test_a_stream_keeps_its_version_and_next_requests_have_the_new_one(llm: LLM, live: PeftModel) -> None:
    train(live, 1)
    long = SamplingParams(temperature=0, max_tokens=200)  # longer than it takes to read the next version
    before = peft_tokens(live, 200)
    first = publish(llm, live)
    with llm.stream(PROMPT, adapter="policy", sampling=long) as stream:
        begun = [token for _ in range(3) for token in next(stream).token_ids]
        train(live, 2)
        second = publish(llm, live)
        after = peft_tokens(live)
        assert before[:4] != after[:4] and first != second
        assert our_tokens(llm, num_tokens=4) == after[:4]
        assert sorted(digests(llm.status(), Tier.DEVICE)) == sorted([first, second])
        assert (*begun, *(token for delta in stream for token in delta.token_ids)) == before
        result = stream.result()
        assert (result.token_ids, result.version_digest) == (before, first)
    assert [adapter.digest for adapter in llm.status().adapters] == [second]


def test_200_versions_leave_nothing_behind(base: Path, live: PeftModel) -> None:
    # A pool that the first versions fill: from then on whatever grows is a leak.
    llm = LLM(base, pool_bytes=400_000, scheduler=SchedulerConfig(max_running=4))
    counts: dict[int, Counter[str]] = {}
    num_compared = 0
    for version in range(200):
        stream, old = None, ()
        if version % 10 == 9:
            old = peft_tokens(live)
            stream = llm.stream(PROMPT, adapter="policy", sampling=GREEDY)
            next(stream)
        train(live, 1000 + version)
        digest = publish(llm, live)
        tokens = our_tokens(llm, num_tokens=4)
        if stream is not None:
            assert stream.result().token_ids == old
            assert tokens == peft_tokens(live)[:4] != old[:4]
            num_compared += 1
        llm.check()
        status = llm.status()
        assert (status.running, status.waiting, status.pins, status.pool.sequences) == (0, 0, 0, 0)
        assert [adapter.digest for adapter in status.adapters] == [digest]
        if version in (99, 199):
            del stream
            gc.collect()
            counts[version] = Counter(type(each).__name__ for each in gc.get_objects())
            assert counts[version][PackedAdapter.__name__] == 1
    assert num_compared == 20
    grown = counts[199] - counts[99]
    assert not {name: count for name, count in grown.items() if count >= 50}, grown.most_common(5)
    llm.close()


def test_weights_are_copied_and_not_kept(llm: LLM, live: PeftModel) -> None:
    train(live, 3)
    expected = peft_tokens(live)
    tensors = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(live).items()}
    llm.add_adapter("policy", tensors, live.peft_config["default"])
    for name in tensors:
        tensors[name].zero_()
    refs = [weakref.ref(tensor) for tensor in tensors.values()]
    tensors.clear()
    assert all(ref() is None for ref in refs)
    assert our_tokens(llm) == expected


def named(state: dict[str, torch.Tensor], change: Callable[[str], str]) -> dict[str, torch.Tensor]:
    return {change(name): tensor for name, tensor in state.items()}


def test_one_content_has_one_digest_however_it_is_given(llm: LLM, live: PeftModel, tmp_path: Path) -> None:
    train(live, 4)
    state, config = get_peft_model_state_dict(live), live.peft_config["default"]
    digest = llm.add_adapter("plain", state, config)
    full = {name: tensor for name, tensor in live.state_dict().items() if "lora_" in name}
    assert all(".default." in name for name in full)
    strided = {name: tensor.t().contiguous().t() for name, tensor in state.items()}
    flat = torch.cat([tensor.reshape(-1) for tensor in state.values()])
    pieces = flat.split([tensor.numel() for tensor in state.values()])
    shared = {name: piece.view(state[name].shape) for name, piece in zip(state, pieces, strict=True)}
    fields: dict[str, Any] = config.to_dict()
    given = [
        (full, config),
        (named(full, lambda name: name.replace(".default.", ".policy.")), config),
        (named(state, lambda name: name.removeprefix("base_model.model.")), config),
        (dict(reversed(state.items())), fields),
        ({name: torch.nn.Parameter(tensor) for name, tensor in strided.items()}, fields),
        (shared, fields | {"inference_mode": True, "target_modules": sorted(fields["target_modules"], reverse=True)}),
    ]
    given[-1][1]["target_modules"] = frozenset(given[-1][1]["target_modules"])
    for source, settings in given:
        assert llm.add_adapter("other", source, settings) == digest
    train(live, 5)
    assert publish(llm, live, "other") != digest
    train(live, 4)
    live.save_pretrained(str(tmp_path))
    llm.add_adapter("saved", tmp_path)
    assert our_tokens(llm, "saved") == our_tokens(llm, "plain") == peft_tokens(live)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_any_float_dtype(llm: LLM, live: PeftModel, dtype: torch.dtype) -> None:
    train(live, 6)
    state = {name: tensor.to(dtype) for name, tensor in get_peft_model_state_dict(live).items()}
    llm.add_adapter("policy", state, live.peft_config["default"])
    with torch.no_grad():
        for name, parameter in live.named_parameters():
            if "lora_" in name:
                parameter.copy_(state[name.replace(".default", "")])
    assert our_tokens(llm) == peft_tokens(live)


REFUSED: dict[str, tuple[Callable[[dict[str, torch.Tensor]], dict[Any, Any]], str]] = {
    "base weights": (lambda s: s | {"base_model.model.lm_head.weight": torch.ones(1)}, "no LoRA.*lm_head.weight"),
    "magnitudes": (lambda s: s | {f"{Q0}.lora_magnitude_vector": torch.ones(1)}, "no LoRA.*lora_magnitude_vector"),
    "biases": (lambda s: s | {f"{Q0}.lora_B.default.bias": torch.ones(1)}, "no LoRA.*lora_B.default.bias"),
    "a name that is no text": (lambda s: {**s, 3: torch.ones(1)}, "no LoRA.*3"),
    "two adapters": (
        lambda s: named(s, lambda n: n.replace("_A.", "_A.one.").replace("_B.", "_B.two.")),
        "several adapters.*of one.*of two",
    ),
    "half of the names": (lambda s: named(s, lambda n: n.replace("_A.", "_A.default.")), "several.*default.*no name"),
    "two spellings": (lambda s: s | {f"{Q0.removeprefix('base_model.model.')}.lora_A.weight": torch.ones(1)}, "twice"),
    "an unknown module": (lambda s: named(s, lambda n: n.replace("layers.1", "layers.7")), "no targeted.*layers.7"),
    "a wrapped model": (lambda s: named(s, lambda n: f"module.{n}"), "no targeted.*module.base_model"),
    "a missing half": (lambda s: {n: t for n, t in s.items() if n != f"{Q0}.lora_B.weight"}, "q_proj.lora_B"),
    "another shape": (lambda s: s | {f"{Q0}.lora_A.weight": torch.ones(4, 7)}, "do not fit.*q_proj"),
    "no tensor": (lambda s: s | {f"{Q0}.lora_A.weight": [[1.0]]}, "no dense tensors.*q_proj.*list"),
    "no data": (lambda s: s | {f"{Q0}.lora_A.weight": torch.ones(4, 48, device="meta")}, "no dense tensors.*q_proj"),
    "a sparse tensor": (lambda s: s | {f"{Q0}.lora_A.weight": torch.eye(4, 48).to_sparse()}, "no dense tensors.*q_pr"),
    "integers": (lambda s: s | {f"{Q0}.lora_A.weight": torch.ones(4, 48, dtype=torch.int32)}, "int32"),
    "NaN": (lambda s: s | {f"{Q0}.lora_A.weight": torch.full((4, 48), torch.nan)}, "NaN.*q_proj"),
    "nothing": (lambda _: {}, "without tensors"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_tensors_that_are_not_served_are_refused_by_name(llm: LLM, live: PeftModel, case: str) -> None:
    change, match = REFUSED[case]
    publish(llm, live)
    expected = our_tokens(llm)
    with pytest.raises(ContentRefused, match=match):
        llm.add_adapter("policy", change(dict(get_peft_model_state_dict(live))), live.peft_config["default"])
    assert our_tokens(llm) == expected


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"r": 8}, "rank is not r"),
        ({"bias": "all"}, "bias"),
        ({"rank_pattern": {"q_proj": 300}}, "maximum rank"),
        ({"modules_to_save": {"lm_head"}}, "modules_to_save"),
        ({"lora_alpha": float("nan")}, "NaN"),
        ({"runtime_config": object()}, "runtime_config.*object"),
        ({"r": torch.tensor(4)}, "r.*Tensor"),
    ],
)
def test_settings_that_are_not_served_are_refused_by_name(
    llm: LLM, live: PeftModel, changes: dict[str, Any], match: str
) -> None:
    config = live.peft_config["default"].to_dict() | changes
    with pytest.raises(ContentRefused, match=match):
        llm.add_adapter("policy", get_peft_model_state_dict(live), config)


def test_what_peft_adds_to_a_live_configuration_is_read(live: PeftModel) -> None:
    """Everything that a LoraConfig takes by itself or from the model it is given to."""
    config = dataclasses.replace(live.peft_config["default"], task_type=None, base_model_name_or_path="/home/me/base")
    (first, _), (second, _) = (
        adapter_files(get_peft_model_state_dict(live), settings) for settings in (config, config.to_dict())
    )
    assert first == second
    fields, state = config.to_dict(), get_peft_model_state_dict(live)
    orders = ({0, 8}, {8, 0})  # two orders of one set
    assert list(orders[0]) != list(orders[1])
    one, other = (adapter_files(state, fields | {"layers_to_transform": order})[0] for order in orders)
    assert one == other
    assert b'"peft_type": "LORA"' in first and b'"inference_mode": true' in first and b"runtime" not in first


def test_sources_and_configurations_belong_together(llm: LLM, live: PeftModel, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="config"):
        llm.add_adapter("policy", get_peft_model_state_dict(live))
    with pytest.raises(InvalidRequest, match="config"):
        llm.add_adapter("policy", tmp_path, live.peft_config["default"])


def test_a_version_lives_as_long_as_a_name_or_a_request_needs_it(llm: LLM, live: PeftModel) -> None:
    def images() -> int:
        gc.collect()
        return sum(type(each) is PackedAdapter for each in gc.get_objects())

    train(live, 7)
    expected = peft_tokens(live)
    first = publish(llm, live)
    publish(llm, live, "also")
    stream = llm.stream(PROMPT, adapter="policy", sampling=GREEDY)
    next(stream)
    llm.remove_adapter("policy")
    llm.remove_adapter("also")
    with pytest.raises(InvalidRequest, match="policy"):
        our_tokens(llm)
    assert images() == 1
    assert publish(llm, live, "again") == first
    next(stream)
    llm.remove_adapter("again")
    assert stream.result().token_ids == expected
    assert (llm.status().adapters, llm.status().pool.adapters, images()) == ((), 0, 0)
    publish(llm, live)
    assert our_tokens(llm) == expected


def test_versions_that_nobody_asked_for_cost_nothing(llm: LLM, live: PeftModel) -> None:
    for seed in range(10):
        train(live, 20 + seed)
        publish(llm, live)
    assert llm.status().adapters == ()
    assert our_tokens(llm) == peft_tokens(live)
    assert llm.status().counters.adapter_loads == 1

"""Adapters whose modules differ in rank, scale and layer: folders saved by PEFT, through the production reader, in
mixed batches of the engine, against PEFT."""

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from drawing import run_greedy
from lorasrv.config import EngineConfig, ModelConfig, PoolConfig, SchedulerConfig
from lorasrv.engine.batch import ChunkInput
from lorasrv.engine.build import assemble
from lorasrv.engine.fitting import page_check
from lorasrv.engine.packer import Packer
from lorasrv.engine.runner import build_runner
from lorasrv.memory.packing import PackedAdapter
from lorasrv.memory.residency import AdapterInput
from lorasrv.model.base_shapes import base_shapes
from lorasrv.model.decoder import Decoder
from lorasrv.types import AdapterUse, EngineRequest
from lorasrv_adapters.errors import ContentRefused, InvalidAdapter
from lorasrv_adapters.published import AdapterFiles, open_folder
from peft_models import peft_greedy, peft_logits, random_llama, save_random_adapter

NUM_TOKENS = 8
ADAPTERS: dict[str, dict[str, Any]] = {
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": "all-linear",
        "rank_pattern": {r"layers\.[02]\.self_attn\.(q|k)_proj": 17, "down_proj": 1, "^model.layers.1.mlp.up_proj": 40},
        "alpha_pattern": {"v_proj": 2, r"layers\.1\..*_proj": 24, "down_proj": 0.5},
    },
    "patterns_rslora": {
        "r": 3,
        "lora_alpha": 4,
        "use_rslora": True,
        "target_modules": ["q_proj", "o_proj", "gate_proj"],
        "rank_pattern": {"o_proj": 20},
        "alpha_pattern": {"layers.2.self_attn.o_proj": 16, "gate_proj": 1},
    },
    "two_layers": {"r": 8, "target_modules": ["v_proj", "down_proj"], "layers_to_transform": [0, 2]},
    "one_layer": {
        "r": 5,
        "target_modules": ["up_proj", "k_proj"],
        "layers_to_transform": 1,
        "layers_pattern": "layers",
    },
    "regex": {"r": 6, "target_modules": r".*\.(0|1)\.(self_attn\.(q|v)|mlp\.up)_proj"},
    "excluding": {"r": 16, "target_modules": "all-linear", "exclude_modules": ["layers.0.mlp.up_proj", "k_proj"]},
    "excluding_regex": {"r": 2, "target_modules": ["o_proj", "down_proj"], "exclude_modules": r".*\.2\.mlp\..*"},
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, its adapters (None is the base), and for each the prompts and PEFT's tokens and logits."""

    config: EngineConfig
    folders: dict[str | None, Path]
    prompts: dict[str | None, list[list[int]]]
    tokens: dict[str | None, list[list[int]]]
    logits: dict[str | None, list[torch.Tensor]]

    def read(self, name: str) -> AdapterFiles:
        model = self.config.model
        base = base_shapes(model.path, model.dtype)
        return open_folder(self.folders[name], base, self.config.max_rank, page_check(self.config))


def convert_pissa(model: LlamaForCausalLM, folder: Path) -> Path:
    """A PiSSA adapter, trained a little, as PEFT converts it for the base as it was."""
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    config.init_lora_weights = "pissa"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped: Any = get_peft_model(model, config)
        wrapped.peft_config["default"].init_lora_weights = True
        wrapped.save_pretrained(str(folder / "start"))
        wrapped.peft_config["default"].init_lora_weights = "pissa"
        generator = torch.Generator().manual_seed(8)
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
        start = str(folder / "start")
        wrapped.save_pretrained(str(folder / "served"), path_initial_model_for_weight_conversion=start)
    wrapped.unload()
    model.load_state_dict(weights)
    return folder / "served"


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp("patterns")
    model = random_llama(root / "base", seed=2, num_hidden_layers=3)
    folders: dict[str | None, Path] = {
        name: save_random_adapter(model, root / name, LoraConfig(task_type="CAUSAL_LM", **settings), seed=seed)
        for seed, (name, settings) in enumerate(ADAPTERS.items())
    }
    folders["converted"] = convert_pissa(model, root)
    generator = torch.Generator().manual_seed(4)
    prompts: dict[str | None, list[list[int]]] = {
        name: [torch.randint(1, 100, (length,), generator=generator).tolist() for length in (3, 19)]
        for name in (None, *folders)
    }
    tokens = {name: peft_greedy(model, folders.get(name), prompts[name], NUM_TOKENS) for name in prompts}
    for name in folders:
        assert tokens[name] != peft_greedy(model, None, prompts[name], NUM_TOKENS), f"{name} does nothing"
    config = EngineConfig(
        model=ModelConfig(path=str(root / "base")),
        pool=PoolConfig(pool_bytes=8 << 20),
        scheduler=SchedulerConfig(max_step_tokens=48, max_running=16),
    )
    logits = {name: peft_logits(model, folders.get(name), prompts[name]) for name in prompts}
    return Case(config=config, folders=folders, prompts=prompts, tokens=tokens, logits=logits)


def engine_tokens(case: Case) -> dict[str | None, list[list[int]]]:
    """All requests in one engine, adapters in turn, two joining at every step."""

    def read(name: str, packer: Packer) -> PackedAdapter:
        return packer.pack(case.read(name))

    core = assemble(case.config, read).core
    found: dict[str, list[int]] = {}
    waiting = [
        EngineRequest(
            request_id=f"{name}/{index}",
            token_ids=tuple(case.prompts[name][index]),
            adapter=AdapterUse(digest=name) if name else None,
            max_tokens=NUM_TOKENS,
            seed=0,
            temperature=0.0,
        )
        for index in range(2)
        for name in case.prompts
    ]
    while waiting or core.has_work():
        for request in waiting[:2]:
            core.add(request)
            found[request.request_id] = []
        del waiting[:2]
        for delta in core.step():
            assert delta.failure is None, delta.failure
            found[delta.request_id] += delta.token_ids
        core.check()
    core.close()
    return {name: [found[f"{name}/{index}"] for index in range(2)] for name in case.prompts}


def differing(case: Case) -> set[str | None]:
    tokens = engine_tokens(case)
    return {name for name in case.prompts if tokens[name] != case.tokens[name]}


def test_mixed_batches_equal_peft(case: Case) -> None:
    assert differing(case) == set()


def test_logits_equal_peft_in_one_batch_of_all(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, storage, architecture, info = build_runner(case.config)
    storage.bytes.view(torch.float32).fill_(float("nan"))
    packer = Packer(layout=storage.layout, module_shapes=architecture.module_shapes())
    free = list(range(info.num_pages))
    # The runner sorts by directory, so adapters loaded to falling pages come out in that order, the base last.
    chunks: list[ChunkInput] = []
    expected: list[torch.Tensor] = []
    for name in (*case.folders, None):
        adapter: AdapterInput | None = None
        if name is not None:
            packed = packer.pack(case.read(name))
            pages = [free.pop(0) for _ in range(packed.num_pages)]
            directory = storage.write_adapter(packed, pages, wait_for_steps=False).directory
            adapter = AdapterInput(directory=directory, max_rank=packed.max_rank, scale=1.0)
        for prompt, logits in zip(case.prompts[name], case.logits[name], strict=True):
            table = tuple(free.pop(0) for _ in range(storage.layout.pages_for_tokens(len(prompt))))
            chunks.append(ChunkInput(token_ids=tuple(prompt), start=0, block_table=table, adapter=adapter))
            expected.append(logits)
    seen: list[torch.Tensor] = []
    logits_of = Decoder.logits

    def recorded(self: Decoder, *arguments: Any) -> torch.Tensor:
        seen.append(logits_of(self, *arguments))
        return seen[-1]

    monkeypatch.setattr(Decoder, "logits", recorded)
    run_greedy(runner, chunks)
    (logits,) = seen
    assert logits.shape[0] == len(expected) == 2 * len(case.prompts)
    torch.testing.assert_close(logits, torch.stack(expected), rtol=0, atol=1e-4)


Change = Callable[[dict[str, Any]], object]


def changed(case: Case, tmp_path: Path, name: str, change: Change) -> Case:
    """The same case with one adapter's configuration edited."""
    folder = Path(shutil.copytree(case.folders[name], tmp_path / name))
    config = json.loads((folder / "adapter_config.json").read_text())
    change(config)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return replace(case, folders={**case.folders, name: folder})


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("patterns", lambda config: config["alpha_pattern"].update(v_proj=16)),
        ("patterns", lambda config: config["alpha_pattern"].pop("down_proj")),
        ("patterns", lambda config: config["alpha_pattern"].update({r"layers\.1\..*_proj": 8})),
        ("patterns_rslora", lambda config: config["alpha_pattern"].pop("layers.2.self_attn.o_proj")),
        ("patterns_rslora", lambda config: config.update(use_rslora=False)),
    ],
)
def test_a_wrong_scale_of_some_modules_is_seen(case: Case, tmp_path: Path, name: str, change: Change) -> None:
    assert differing(changed(case, tmp_path, name, change)) == {name}


def test_a_wrong_rank_of_some_modules_is_refused(case: Case, tmp_path: Path) -> None:
    wrong = changed(case, tmp_path, "patterns", lambda config: config["rank_pattern"].update(down_proj=2))
    with pytest.raises(ContentRefused, match=r"down_proj\.lora_A\.weight is \[1, 80\] at r=2") as refused:
        wrong.read("patterns")
    assert [type(error) for error in refused.value.errors] == [InvalidAdapter]

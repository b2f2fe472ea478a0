"""Random models and PEFT adapters on disk, PEFT's own greedy tokens, and PEFT folders read for the pool."""

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from lorasrv.memory.tensors import PackedModule
from lorasrv.model.families import MODULE_PATHS

ALL_TARGETS = tuple(path.split(".")[1] for path in MODULE_PATHS)


def random_llama(folder: Path, *, seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    model = random_model(folder, "llama", seed=seed, **overrides)
    assert isinstance(model, LlamaForCausalLM)
    return model


def random_model(folder: Path, model_type: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Save a small random model into `folder` and return it (fp32, eval, with no end-of-sequence token)."""
    settings: dict[str, Any] = {
        "vocab_size": 101,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(settings | overrides))).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # ones would hide a norm that is left out
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith("bias"):  # and zeros a bias
            torch.nn.init.uniform_(parameter, -1.0, 1.0)
    model.save_pretrained(folder)
    return model


def random_adapter(
    model: PreTrainedModel,
    folder: Path,
    *,
    rank: int,
    seed: int,
    targets: tuple[str, ...] = ALL_TARGETS,
    alpha: int | None = None,
    rslora: bool = False,
    delta: float = 0.5,
) -> Path:
    """Save a random PEFT adapter whose delta has about `delta` times the size of the base's weights."""
    settings = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        target_modules=list(targets),
        use_rslora=rslora,
        task_type="CAUSAL_LM",
    )
    return save_random_adapter(model, folder, settings, seed=seed, delta=delta)


def save_random_adapter(
    model: LlamaForCausalLM, folder: Path, config: LoraConfig, *, seed: int, delta: float = 0.5
) -> Path:
    """Save an adapter of this configuration whose delta has about `delta` times the size of the base's weights."""
    with _deprecations_ignored():
        wrapped = get_peft_model(model, config)
    layers = {name: module for name, module in wrapped.named_modules() if isinstance(module, LoraLayer)}
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            layer = layers[name.partition(".lora_")[0]]
            deviation = (delta * 0.3 / (layer.scaling["default"] * layer.r["default"] ** 0.5)) ** 0.5
            parameter.data.normal_(0.0, deviation, generator=generator)
    wrapped.save_pretrained(str(folder))
    wrapped.unload()
    return folder


def peft_logits(model: LlamaForCausalLM, adapter: Path | None, prompts: list[list[int]]) -> list[torch.Tensor]:
    """The logits after each prompt's last token, `[vocab_size]` each."""
    runner: Any = model
    if adapter is not None:
        with _deprecations_ignored():
            runner = PeftModel.from_pretrained(model, str(adapter)).eval()
    with torch.inference_mode():
        logits = [runner(input_ids=torch.tensor([prompt])).logits[0, -1] for prompt in prompts]
    if isinstance(runner, PeftModel):
        runner.unload()
    return logits


def peft_greedy(
    model: PreTrainedModel, adapter: Path | None, prompts: list[list[int]], num_tokens: int
) -> list[list[int]]:
    """Greedy continuations by transformers, or by PEFT with one adapter, each prompt on its own."""
    runner: Any = model
    if adapter is not None:
        with _deprecations_ignored():
            runner = PeftModel.from_pretrained(model, str(adapter)).eval()
    outputs: list[list[int]] = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = runner.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False
        )
        outputs.append(out[0, len(prompt) :].tolist())
    if isinstance(runner, PeftModel):
        runner.unload()
    return outputs


@contextmanager
def _deprecations_ignored() -> Iterator[None]:
    """PEFT reads an attribute that this transformers deprecates."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        yield


def load_peft_folder(folder: Path) -> list[PackedModule]:
    """Read a PEFT LoRA folder as this test suite writes them; production code has its own, stricter reader."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    modules: list[PackedModule] = []
    for name, a in tensors.items():
        found = re.fullmatch(r"base_model\.model\.model\.layers\.(\d+)\.(.+)\.lora_A\.weight", name)
        if found is None:
            continue
        rank = a.shape[0]
        modules.append(
            PackedModule(
                layer=int(found[1]),
                module=MODULE_PATHS.index(found[2]),
                rank=rank,
                scale=config["lora_alpha"] / (rank**0.5 if config["use_rslora"] else rank),
                a=a,
                b=tensors[name.replace("lora_A", "lora_B")],
            )
        )
    assert 2 * len(modules) == len(tensors), sorted(tensors)
    return modules

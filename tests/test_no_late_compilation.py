"""Behind READY nothing is compiled: what a CUDA engine's steps would have compiled, found without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

MODELS = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
KERNELS = {
    "_add_kernel",
    "_norm_kernel",
    "_rope_write_kv_kernel",
    "_shrink_kernel",
    "_silu_mul_kernel",
    "attend_kernel",
    "block_kernel",
    "merge_kernel",
    "row_kernel",
}


@pytest.mark.parametrize(("name", "dtype"), [("llama", "bfloat16"), ("qwen3", "bfloat16"), ("llama", "float32")])
def test_random_steps_need_no_kernel_that_start_up_has_not_compiled(tmp_path: Path, name: str, dtype: str) -> None:
    """Ranks, batches, chunks and sampling that no step before has had."""
    config, model = MODELS[name]
    shape = config(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        head_dim=128,
    )
    model(shape).save_pretrained(tmp_path)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-m", "launched_kernels", str(tmp_path), dtype],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found["ready"]) == KERNELS
    assert found["later"] == []

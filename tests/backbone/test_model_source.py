"""Models with layers that keep another state than keys and values are refused by name, from the configuration alone."""

import subprocess
import sys
from typing import Any

import pytest
from tiny import COMMON, OPTIONS, UNDECLARED, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from backbone.errors import UnsupportedModelError
from backbone.execution.apply_plan import apply_plan
from backbone.model_source import check_supported
from backbone.plan import LayerPlan

CONFIG = {**COMMON, **OPTIONS["llama"], "num_hidden_layers": 4}
MIXED: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"] * 2}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 4, "mamba_n_groups": 1}
PERIOD = {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4}
HEADS = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
HYBRIDS: dict[str, dict[str, Any]] = {
    "bamba": {**MAMBA, "attn_layer_indices": [1, 3]},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64, "head_dim": 8},
    "falcon_mamba": {"state_size": 4},
    "granitemoehybrid": {**MAMBA, "layer_types": ["mamba", "attention"] * 2, "num_local_experts": 2},
    "jamba": {**PERIOD, "expert_layer_period": 10, "expert_layer_offset": 9, "use_mamba_kernels": False},
    "kimi_linear": MIXED,
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba": {"state_size": 4},
    "mamba2": {"state_size": 4, "num_heads": 4, "head_dim": 16, "n_groups": 1},
    "minimax": {**MIXED, "head_dim": 8, "num_local_experts": 2},
    "nemotron_h": {"layer_types": ["mamba", "attention"] * 2},
    "olmo_hybrid": {**MIXED, **HEADS},
    "qwen3_5_moe_text": MIXED,
    "qwen3_5_text": MIXED,
    "qwen3_next": {**MIXED, **HEADS, **EXPERTS, "head_dim": 8},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 8, "head_dim": 8},
    "rwkv": {"attention_hidden_size": 32},
    "xlstm": {},
    "zamba": {**PERIOD, "n_mamba_heads": 2, "use_mamba_kernels": False},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2},
}
BUILT = ("bamba", "falcon_h1", "jamba", "lfm2", "mamba", "qwen3_next", "recurrent_gemma", "rwkv")


def config_of(kind: str):
    return AutoConfig.for_model(kind, **{**CONFIG, **HYBRIDS[kind]})


@pytest.mark.parametrize("kind", HYBRIDS)
def test_hybrid_is_refused_from_its_configuration(kind) -> None:
    config = config_of(kind)
    for given in (config, config.to_dict()):
        with pytest.raises(UnsupportedModelError, match=rf"^{kind} is not made of attention layers alone: "):
            check_supported(given)


@pytest.mark.parametrize("kind", BUILT)
def test_no_plan_is_applied_to_a_hybrid(kind) -> None:
    """Also one that happens to leave a recurrent layer running, which passed the self-test."""
    model = AutoModelForCausalLM.from_config(config_of(kind))
    for plan in (LayerPlan.full(4), LayerPlan.skipping(4, {2}), LayerPlan.exiting(4, 1)):
        with pytest.raises(UnsupportedModelError, match=f"^{kind} is not made of attention"), apply_plan(model, plan):
            pass


@pytest.mark.parametrize("kind", [*OPTIONS, *UNDECLARED])
def test_attention_models_are_supported(kind) -> None:
    config = tiny_model(kind).config
    check_supported(config)
    check_supported(config.to_dict())


def test_hybrid_family_of_attention_layers_alone_is_supported() -> None:
    check_supported(AutoConfig.for_model("granitemoehybrid", **CONFIG, **MAMBA, layer_types=["attention"] * 4))


def test_layer_types_of_a_declared_family_are_looked_at() -> None:
    with pytest.raises(UnsupportedModelError, match=r"^llama is not .*: layer 1 \(linear_attention\) keeps"):
        check_supported(
            {**tiny_model("llama").config.to_dict(), "layer_types": ["full_attention", "linear_attention"] * 3}
        )


def test_configuration_of_unknown_code_has_to_be_loaded() -> None:
    check_supported({"model_type": "somebodys_own", "num_hidden_layers": 4})
    check_supported({})


def test_declared_families_need_no_torch() -> None:
    code = (
        "import sys; from backbone.model_source import check_supported; "
        "check_supported({'model_type': 'llama', 'num_hidden_layers': 4}); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"

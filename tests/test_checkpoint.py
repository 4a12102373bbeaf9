# SPDX-License-Identifier: Apache-2.0
"""The made checkpoint: its shapes and names against vLLM's own model code, its tokenizer, its numbers."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from weightless import write_weightless

from vllm_mqa_sm90 import checkpoint, cli, seams
from vllm_mqa_sm90.architectures import ARCHITECTURES, Tensor, has_indexer, text
from vllm_mqa_sm90.checkpoint import fill, make_checkpoint

# The same structure with a thousandth of the numbers.
SMALL = {
    "hidden_size": 512, "moe_intermediate_size": 64, "q_lora_rank": 128, "num_attention_heads": 4, "index_n_heads": 16,
    "n_routed_experts": 16,
}  # fmt: skip
LATENT = {**SMALL, "intermediate_size": 256, "kv_lora_rank": 128, "num_key_value_heads": 4}
SMALL_OF = {"v32": LATENT, "glm": LATENT, "v4": {**SMALL, "o_lora_rank": 128}, "glm53": LATENT, "hyv4": LATENT}


def shrink(patch: pytest.MonkeyPatch, arch: str = "v32") -> None:
    """From now on `arch` is small."""
    architecture = ARCHITECTURES[arch]

    def config(layers: int, experts: int) -> dict:
        found = architecture.config(layers, experts)
        text(found).update(SMALL_OF[arch])
        return found

    patch.setitem(ARCHITECTURES, arch, replace(architecture, config=config))


def make_small(directory: Path, arch: str, layers: int) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch, arch)
        make_checkpoint(directory, arch, layers, experts=16)
    return directory


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small(tmp_path_factory.mktemp("small") / "model", "v32", layers=3)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o007, 0o660)])
def test_files_have_the_mode_of_the_umask(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        files = list(make_small(tmp_path / "model", "v32", layers=1).iterdir())
    finally:
        os.umask(before)
    assert len(files) > 4 and {oct(file.stat().st_mode & 0o777) for file in files} == {oct(mode)}


def shapes_of(arch: str, layers: int) -> dict[str, tuple[int, ...]]:
    architecture = ARCHITECTURES[arch]
    return {t.name: t.shape for shard in architecture.shards(architecture.config(layers, 32)) for t in shard}


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}
    return found


def lacking(arch: str) -> pytest.MarkDecorator:
    """Skips where the installed vLLM has no such model."""
    since = ARCHITECTURES[arch].since
    return pytest.mark.skipif(seams.release() < since, reason=f"{arch}: vLLM has it from {since[0]}.{since[1]} on")


@pytest.mark.parametrize(
    "arch, layers, architecture, tokenizer_mode",
    [
        ("v32", 1, "DeepseekV32ForCausalLM", "deepseek_v32"),
        ("v32", 4, "DeepseekV32ForCausalLM", "deepseek_v32"),
        ("glm", 4, "GlmMoeDsaForCausalLM", "auto"),
        ("v4", 1, "DeepseekV4ForCausalLM", "deepseek_v4"),
        ("v4", 4, "DeepseekV4ForCausalLM", "deepseek_v4"),
        *(
            pytest.param(arch, 4, architecture, mode, marks=lacking(arch))
            for arch, architecture, mode in (
                ("v41", "DeepseekV41ForCausalLM", "deepseek_v41"),
                ("glm53", "Glm5NextForCausalLM", "auto"),
                ("hyv4", "HYV4ForCausalLM", "auto"),
            )
        ),
    ],
)
def test_every_tensor_is_a_parameter_of_vllm_and_every_parameter_a_tensor(
    tmp_path: Path, run_script: Callable[..., Any], arch: str, layers: int, architecture: str, tokenizer_mode: str
) -> None:
    write_weightless(tmp_path, ARCHITECTURES[arch].config(layers, 32))
    assert run_script("load_on_meta.py", tmp_path, arch) == {
        "architecture": architecture,
        "tokenizer_mode": tokenizer_mode,
        "unfilled": {"target": [], "draft": []},
    }


def test_random_weights_are_known_as_such(small: Path) -> None:
    assert checkpoint.has_random_weights(small)


def test_shapes_are_those_of_one_rank_of_eight() -> None:
    shapes = shapes_of("v32", layers=4)
    attention = "model.layers.2.self_attn."
    # DeepSeek-V3.2 has 128 heads of 128 + 64 and an MLP width of 2048, which TP divides; the indexer it replicates.
    assert shapes[attention + "q_b_proj.weight"] == (128 // 8 * (128 + 64), 1536)
    assert shapes[attention + "o_proj.weight"] == (7168, 128 // 8 * 128)
    assert shapes[attention + "kv_a_proj_with_mqa.weight"] == (512 + 64, 7168)
    assert shapes[attention + "indexer.wq_b.weight"] == (64 * 128, 1536)
    assert shapes[attention + "indexer.weights_proj.weight"] == (64, 7168)
    assert shapes["model.layers.2.mlp.experts.31.down_proj.weight"] == (7168, 2048 // 8)
    assert shapes["lm_head.weight"] == (129280 // 8, 7168)
    assert "model.layers.0.mlp.gate_proj.weight" in shapes and "model.layers.1.mlp.gate.weight" in shapes
    assert "model.layers.4.eh_proj.weight" in shapes

    shapes = shapes_of("glm", layers=4)
    # GLM-5.2 has 64 heads of 192 + 64 and 256, and an indexer of 32 heads.
    assert shapes[attention + "q_b_proj.weight"] == (64 // 8 * (192 + 64), 2048)
    assert shapes[attention + "o_proj.weight"] == (6144, 64 // 8 * 256)
    assert shapes[attention + "indexer.wq_b.weight"] == (32 * 128, 2048)
    assert shapes["model.layers.2.mlp.experts.31.down_proj.weight"] == (6144, 2048 // 8)
    assert shapes["lm_head.weight"] == (154880 // 8, 6144)
    assert "model.layers.4.eh_proj.weight" in shapes

    shapes = shapes_of("v4", layers=4)
    # DeepSeek-V4-Flash has 64 heads of 512 in 8 groups, and an indexer of 64 heads.
    assert shapes["layers.2.attn.wq_b.weight"] == (64 // 8 * 512, 1024)
    assert shapes["layers.2.attn.wo_a.weight"] == (8 // 8 * 1024, 64 * 512 // 8)
    assert shapes["layers.2.attn.indexer.wq_b.weight"] == (64 * 128, 1024)
    assert shapes["layers.2.attn.indexer.wq_b.scale"] == (64, 8)
    assert shapes["layers.2.ffn.experts.31.w2.weight"] == (4096, 2048 // 8)
    assert shapes["head.weight"] == (129280 // 8, 4096)
    assert "layers.0.ffn.gate.tid2eid" in shapes and "layers.1.ffn.gate.bias" in shapes
    assert "mtp.0.h_proj.weight" in shapes

    shapes = shapes_of("v41", layers=4)
    # DeepSeek-V4.1-Flash has 64 heads of 512 in 8 groups, and an indexer of 32 heads with keys made of those of 512.
    assert shapes["layers.2.attn.wq_b.weight"] == (64 // 8 * 512, 1280)
    assert shapes["layers.2.attn.indexer.wq_b.weight"] == (32 * 128, 1280)
    assert shapes["layers.2.attn.indexer.wk.weight"] == (128, 512)
    assert shapes["layers.2.ffn.experts.31.w2.weight"] == (5120, 256)  # an eighth is 288
    assert shapes["head.weight"] == (129280 // 8, 5120)
    assert shapes["mtp.0.main_proj.weight"] == (5120, 3 * 5120)
    assert shapes["mtp.2.markov_head.head.weight"] == (129280 // 8, 256)

    shapes = shapes_of("glm53", layers=4)
    attention = "model.layers.3.self_attn."
    # GLM-5.3-Flash has 64 heads of 256, nothing rotated, an indexer of 16 heads, and 64 heads of 128 without a cache.
    assert shapes[attention + "q_b_proj.weight"] == (64 // 8 * 256, 1536)
    assert shapes[attention + "kv_a_proj_with_mqa.weight"] == (512, 4096)
    assert shapes[attention + "indexer.wq_b.weight"] == (16 * 128, 1536)
    assert shapes[attention + "indexer.index_kpool_compress_ape"] == (4, 128)
    assert shapes["model.layers.2.self_attn.k_proj.weight"] == (64 // 8 * 128, 4096)
    assert shapes["model.layers.2.mlp.experts.31.down_proj.weight"] == (4096, 2048 // 8)
    assert shapes["lm_head.weight"] == (154880 // 8, 4096)
    assert "model.layers.4.eh_proj.weight" in shapes

    shapes = shapes_of("hyv4", layers=4)
    attention = "model.layers.1.self_attn."
    # Hy4-preview has 64 heads of 192 + 64 and 256, and an indexer of 32 heads.
    assert shapes[attention + "q_b_proj.weight"] == (64 // 8 * (192 + 64), 2048)
    assert shapes[attention + "linear_gate.weight"] == (64 // 8 * 256, 6144)
    assert shapes[attention + "indexer.wq_b.weight"] == (32 * 128, 2048)
    assert shapes["model.layers.2.mlp.experts.gate_up_proj"] == (32, 2 * 2048 // 8, 6144)
    assert shapes["lm_head.weight"] == (120832 // 8, 6144)
    assert "model.mtp_layers.0.eh_proj.weight" in shapes


def with_tensor(arch: str, layers: int, part: str) -> set[str]:
    """The layers that have such a tensor."""
    return {name[: name.index(part)].split(".")[-1] for name in shapes_of(arch, layers) if part in name}


@pytest.mark.parametrize("layers", [1, 2, 4, 9, 20])
def test_layers_of_v41_choose_among_keys_and_candidates_of_earlier_ones(layers: int) -> None:
    c = text(ARCHITECTURES["v41"].config(layers, 16))
    keys, indexers, first = c["kv_source_layer_ids"], c["index_source_layer_ids"], c["candidate_source_layer_id"]
    assert keys[0] == indexers[0] == 0 and set(keys) <= set(indexers) and max(indexers) < layers
    # The candidates are of the keys that all later indexers choose from, and those of every token.
    assert first == keys[-1] and c["compress_ratios"][:layers] == [2] * first + [1] * (layers - first)
    # vLLM plans for the ratios in the list, and gives the drafter's layers 0.
    assert c["compress_ratios"][layers:] == [0] * c["num_nextn_predict_layers"]
    assert layers <= 2 or max(indexers) > first
    assert with_tensor("v41", layers, ".attn.indexer.wk.") == {str(layer) for layer in keys}
    assert with_tensor("v41", layers, ".attn.indexer.wq_b.weight") == {str(layer) for layer in indexers}
    assert with_tensor("v41", layers, ".attn.compressor.wgate.") == {str(layer) for layer in keys if layer != first}


def test_layers_of_glm53_and_hyv4_have_indexers_as_released() -> None:
    assert with_tensor("glm53", 9, ".self_attn.indexer.wk.") == {"3", "7", "8", "9"}  # the last two: last layer and MTP
    assert with_tensor("glm53", 9, ".self_attn.k_conv1d.") == {"0", "1", "2", "4", "5", "6"}
    assert with_tensor("hyv4", 12, ".self_attn.indexer.wk.") == {"0", "1", "5", "9"}  # and MTP, whose is 0, too


def test_layers_of_v4_compress_in_turn() -> None:
    shapes = shapes_of("v4", layers=4)
    assert {name.split(".")[1] for name in shapes if "indexer" in name} == {"0", "2"}
    ape = {name: shape for name, shape in shapes.items() if name.endswith(".attn.compressor.ape")}
    assert ape == {
        f"layers.{layer}.attn.compressor.ape": shape for layer, shape in enumerate([(4, 1024), (128, 512)] * 2)
    }


def test_layers_of_glm_share_indexers_as_released() -> None:
    config = ARCHITECTURES["glm"].config(12, 16)
    # The first three layers, then one of four; the MTP layer has its own.
    assert [layer for layer in range(13) if has_indexer(config, layer)] == [0, 1, 2, 6, 10, 12]
    with_indexer = {name.split(".")[2] for name in shapes_of("glm", layers=12) if "indexer" in name}
    assert with_indexer == {"0", "1", "2", "6", "10", "12"}


def test_files_hold_what_the_index_says(small: Path) -> None:
    index = json.loads((small / "model.safetensors.index.json").read_text())
    config = json.loads((small / "config.json").read_text())
    found = tensors_of(small)
    assert found.keys() == index["weight_map"].keys()
    for tensor in (tensor for shard in ARCHITECTURES["v32"].shards(config) for tensor in shard):
        with safe_open(small / index["weight_map"][tensor.name], "pt") as file:
            assert torch.equal(file.get_tensor(tensor.name), fill(tensor, seed=0)), tensor.name
    embedding = found["model.embed_tokens.weight"]
    assert torch.equal(embedding, found["model.layers.3.embed_tokens.weight"])
    assert torch.equal(found["lm_head.weight"], found["model.layers.3.shared_head.head.weight"])
    assert not torch.equal(embedding, found["lm_head.weight"])


def test_values_follow_name_and_seed() -> None:
    tensor = Tensor("a.weight", (400, 1000), gain=2.0)
    values = fill(tensor, 0)
    assert torch.equal(values, fill(tensor, 0))
    assert not torch.equal(values, fill(tensor, 1))
    assert not torch.equal(values, fill(Tensor("b.weight", (400, 1000), gain=2.0), 0))
    # Unit-variance activations come out with the gain as their deviation.
    torch.manual_seed(0)
    assert (torch.randn(500, 1000) @ values.float().T).std().item() == pytest.approx(2.0, rel=0.02)


def test_fp8_weights_use_their_range_and_scales_undo_it() -> None:
    by_name = {t.name: t for shard in ARCHITECTURES["v4"].shards(ARCHITECTURES["v4"].config(1, 16)) for t in shard}
    weight, scale = (fill(by_name[f"layers.0.ffn.experts.3.w2.{part}"], 0) for part in ("weight", "scale"))
    assert weight.dtype == torch.float8_e4m3fn and weight.float().isfinite().all()
    assert 1 < weight.float().abs().max() < 448
    (factor,) = set(scale.flatten().tolist())
    torch.manual_seed(0)
    assert (torch.randn(500, 256) @ weight.float().T * factor).std().item() == pytest.approx(1.0, rel=0.05)


def test_hashed_tokens_have_different_experts() -> None:
    table = fill(Tensor("tid2eid", (1000, 6), dtype="int64", below=16), 0)
    assert table.dtype == torch.int64 and table.min() == 0 and table.max() == 15
    assert all(len(set(row)) == 6 for row in table.tolist())


def v32_model(directory: Path) -> torch.nn.Module:
    """The target as Transformers' DeepSeek-V3 computes it: without the indexer, the same below 2048 tokens."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    settings = json.loads((directory / "config.json").read_text())
    settings = {name: value for name, value in settings.items() if name not in ("model_type", "architectures")}
    return DeepseekV3ForCausalLM.from_pretrained(directory, config=DeepseekV3Config(**settings), dtype=torch.bfloat16)


def glm_model(directory: Path) -> torch.nn.Module:
    from transformers import GlmMoeDsaForCausalLM

    return GlmMoeDsaForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)


def v4_model(directory: Path) -> torch.nn.Module:
    """The target from BF16 weights: Transformers' FP8 needs a GPU."""
    from transformers import DeepseekV4ForCausalLM

    config = json.loads((directory / "config.json").read_text())
    del config["quantization_config"]
    weights = tensors_of(directory)
    for name in [name for name in weights if name.endswith(".scale")]:
        scales = weights.pop(name).repeat_interleave(128, dim=0).repeat_interleave(128, dim=1)
        stored = weights[name.replace(".scale", ".weight")]
        rows, columns = stored.shape
        weights[name.replace(".scale", ".weight")] = (stored.float() * scales[:rows, :columns]).bfloat16()
    unquantized = directory.with_name("unquantized")
    unquantized.mkdir()
    save_file(weights, unquantized / "model.safetensors", metadata={"format": "pt"})
    (unquantized / "config.json").write_text(json.dumps(config))
    model, report = DeepseekV4ForCausalLM.from_pretrained(unquantized, dtype=torch.bfloat16, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    return model


def glm53_model(directory: Path) -> torch.nn.Module:
    """The language model below an encoder of nothing: Transformers has it with one alone."""
    from transformers import Glm5NextForConditionalGeneration

    config = json.loads((directory / "config.json").read_text())
    encoder = {"depth": 1, "hidden_size": 64, "num_heads": 2, "intermediate_size": 64}
    width = {"projection_intermediate_size": 64, "out_hidden_size": config["text_config"]["hidden_size"]}
    config["vision_config"] = encoder | width
    nested = directory.with_name("nested")
    nested.mkdir()
    weights = tensors_of(directory)
    weights = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in weights.items()}
    save_file(weights, nested / "model.safetensors", metadata={"format": "pt"})
    (nested / "config.json").write_text(json.dumps(config))
    load = Glm5NextForConditionalGeneration.from_pretrained
    model, report = load(nested, dtype=torch.bfloat16, output_loading_info=True)
    assert all(name.startswith("model.visual.") for name in report["missing_keys"]) and not report["mismatched_keys"]
    model.config.vocab_size = config["text_config"]["vocab_size"]
    return model


def hyv4_model(directory: Path) -> torch.nn.Module:
    from transformers import HYV4ForCausalLM

    model, report = HYV4ForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return model


LOADS = {"v32": v32_model, "glm": glm_model, "v4": v4_model, "glm53": glm53_model, "hyv4": hyv4_model}


@pytest.mark.parametrize("arch, load", LOADS.items())
def test_logits_are_finite_and_follow_the_context(tmp_path: Path, arch: str, load) -> None:
    """The target as Transformers computes it."""
    model = load(make_small(tmp_path / "model", arch, layers=4))
    prompts = torch.randint(7, model.config.vocab_size, (2, 200), generator=torch.Generator().manual_seed(0))
    prompts[1, -4:] = prompts[0, -4:]
    with torch.inference_mode():
        logits = model(prompts).logits.float()
    assert logits.isfinite().all()
    # Unit variance, times what the rows of the head are scaled by.
    assert 1 < logits.std() < 3
    assert torch.corrcoef(logits[:, -1])[0, 1] < 0.9


def test_greedy_outputs_are_finite_varied_and_not_tied(small: Path) -> None:
    model = v32_model(small)
    prompts = torch.randint(7, model.config.vocab_size, (2, 200), generator=torch.Generator().manual_seed(0))
    prompts[1, -4:] = prompts[0, -4:]
    best, gaps = [], []
    with torch.inference_mode():
        step = model(prompts, use_cache=True)
        for _ in range(32):
            logits = step.logits[:, -1].float()
            assert logits.isfinite().all()
            top = logits.topk(2, dim=-1)
            gaps.append((top.values[:, 0] - top.values[:, 1]) / top.values[:, 0])
            best.append(top.indices[:, :1])
            step = model(best[-1], past_key_values=step.past_key_values, use_cache=True)
    tokens = torch.cat(best, dim=1)
    assert all(len(set(row)) >= 6 for row in tokens.tolist())
    # The context decides, not the last tokens alone.
    assert not torch.equal(tokens[0], tokens[1])
    # bf16 logits are 2**-8 apart, relatively.
    assert (torch.cat(gaps) > 2**-7).float().mean() > 0.8


@pytest.fixture(scope="session")
def tokenizer() -> object:
    return checkpoint.make_tokenizer(129280 // 8)


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_survives_the_tokenizer(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_tokenizer_has_a_text_for_each_row_of_the_head(tokenizer) -> None:
    assert len(tokenizer) == 129280 // 8
    assert len(set(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))) == len(tokenizer)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)


@pytest.mark.parametrize(
    "name",
    [
        "deepseek_v32:DeepseekV32Tokenizer",
        "deepseek_v4:DeepseekV4Tokenizer",
        pytest.param("deepseek_v41:DeepseekV41Tokenizer", marks=lacking("v41")),
    ],
)
def test_chat_template_and_vllms_own_encoding_agree(small: Path, name: str) -> None:
    from transformers import AutoTokenizer

    messages = [{"role": "user", "content": "Hi"}]
    expected = "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜></think>"
    template = AutoTokenizer.from_pretrained(small)
    assert template.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == expected
    vllm = seams.resolve(f"vllm.tokenizers.{name}").from_pretrained(small)
    assert vllm.apply_chat_template(messages, tokenize=False, thinking=False) == expected
    ids = vllm.apply_chat_template(messages, thinking=False)
    # The markers are one token each, and text comes back from ids as sent.
    assert [ids[0], ids[1], *ids[-2:]] == [0, 3, 4, 6]
    assert vllm.decode(ids) == expected


LIMITS = {"--layers": "at least 1", "--experts": "a multiple of 8 from 16 to 256"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--layers", "0"], f"layers: expected {LIMITS['--layers']}, got 0"),
        (["--experts", "20"], f"experts: expected {LIMITS['--experts']}, got 20"),
        (["--experts", "8"], f"experts: expected {LIMITS['--experts']}, got 8"),
        ([], "is not empty"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path: Path, capsys, arguments: list[str], message: str) -> None:
    (tmp_path / "something").touch()
    assert message in refused(capsys, tmp_path, *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["something"]


def refused(capsys, directory: Path, *arguments: str) -> str:
    """The one line that the command says."""
    assert cli.main(["make-checkpoint", str(directory), *arguments]) == 2
    captured = capsys.readouterr()
    (line,) = (line for line in captured.err.splitlines() if not re.fullmatch(r"writing [\d.]+ GB", line))
    assert line.startswith("vllm-mqa-sm90 make-checkpoint: ") and not captured.out
    return line


def test_help_says_the_limits(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["make-checkpoint", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(limit in text for limit in LIMITS.values())


def test_a_file_in_its_place_is_one_line(tmp_path: Path, capsys) -> None:
    (tmp_path / "model").write_text("mine")
    assert f"{tmp_path / 'model'} is a file: name a new directory" in refused(capsys, tmp_path / "model")
    assert (tmp_path / "model").read_text() == "mine"
    below = tmp_path / "model" / "below"
    assert f"{below} cannot be made, Not a directory: name another directory" in refused(capsys, below)


def test_wrong_arguments_do_not_wait_for_pytorch(tmp_path: Path) -> None:
    program = (
        "import sys; from vllm_mqa_sm90 import cli; status = cli.main(sys.argv[1:]);"
        "sys.exit(status if 'torch' not in sys.modules else 9)"
    )
    (tmp_path / "file").touch()
    for arguments in (["new", "--layers", "0"], ["new", "--experts", "20"], ["file"], ["."]):
        done = subprocess.run([sys.executable, "-c", program, "make-checkpoint", *arguments], cwd=tmp_path)
        assert done.returncode == 2, arguments


def test_a_missing_package_is_one_line(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "safetensors" else find(name))
    line = refused(capsys, tmp_path / "model")
    assert line.endswith("needs safetensors, which vLLM brings: pip install safetensors")
    assert not (tmp_path / "model").exists()


def test_too_little_disk_is_said_before_anything_is_written(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2_900_000_000))
    line = refused(capsys, tmp_path / "model")
    assert re.search(r"model needs 3\.\d GB of disk, where 2\.9 GB are free: name another directory, or fewer layers", line)
    assert not (tmp_path / "model").exists()


def test_the_size_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    seen = []
    written = make_checkpoint(tmp_path / "model", layers=2, experts=16, progress=lambda *step: seen.append(step))
    (total,) = {total for _, total in seen}
    assert seen[0] == (0, total) and seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert 0 < written - total < 0.01 * total  # the files' headers
    assert not (tmp_path / "model" / ".incomplete").exists()


def test_progress_is_a_bar_on_a_terminal_and_a_line_elsewhere(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    cli.main(["make-checkpoint", str(tmp_path / "a"), "--layers", "1"])
    assert re.fullmatch(r"writing [\d.]+ GB\n", capsys.readouterr().err)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich: a terminal
    cli.main(["make-checkpoint", str(tmp_path / "b"), "--layers", "1"])
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    assert re.search(r"writing \S+ ([\d.]+)/\1 MB \d:\d\d:\d\d", shown)


# What a full disk does, for more than 1 MB in one file.
FULL = """
import resource, sys
from vllm_mqa_sm90 import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
sys.exit(cli.main(["make-checkpoint", sys.argv[1], "--layers", "1", "--experts", "16"]))
"""


@pytest.mark.parametrize("there", [False, True])
def test_a_write_that_fails_is_one_line_and_leaves_nothing(tmp_path: Path, there: bool) -> None:
    model = tmp_path / "model"
    if there:
        model.mkdir()
    done = subprocess.run([sys.executable, "-c", FULL, model], capture_output=True, text=True)
    _, line = done.stderr.splitlines()
    assert done.returncode == 2
    assert re.search(r"model-\d+-of-\d+\.safetensors cannot be written: .*\(os error \d+\)$", line)
    assert model.exists() == there and (not there or not list(model.iterdir()))


def begun(model: Path) -> subprocess.Popen:
    """A process in the middle of writing to `model`."""
    command = [sys.executable, "-m", "vllm_mqa_sm90", "make-checkpoint", model, "--layers", "8"]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not list(model.glob("*.safetensors")):
        assert running.poll() is None
        time.sleep(0.02)
    return running


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_nothing(tmp_path: Path, sent: signal.Signals) -> None:
    running = begun(tmp_path / "model")
    start = time.monotonic()
    running.send_signal(sent)
    _, errors = running.communicate(timeout=30)
    assert time.monotonic() - start < 3  # a second, and what a busy machine adds
    assert running.returncode == 130 and errors.splitlines()[1:] == ["interrupted"]
    assert not (tmp_path / "model").exists()


def test_what_a_killed_run_left_is_replaced(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    running = begun(model)
    assert "is being written by another make-checkpoint" in refused(capsys, model)
    running.kill()
    running.communicate()
    assert list(model.glob("*-of-00010.safetensors"))
    shrink(monkeypatch)
    assert cli.main(["make-checkpoint", str(model), "--layers", "1", "--experts", "16"]) == 0
    assert {path.name for path in model.glob("*.safetensors")} == {f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)}
    assert (model / "config.json").is_file() and not (model / ".incomplete").exists()
    capsys.readouterr()
    assert "is not empty" in refused(capsys, model)


def test_unknown_architecture_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="arch: expected one of v32, glm, v4, v41, glm53, hyv4, got 'v9'"):
        make_checkpoint(tmp_path / "model", arch="v9")

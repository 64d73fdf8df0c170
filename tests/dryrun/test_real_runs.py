"""The project's own YAMLs through run_mindformer.py's path and MindSpore's compiler, without a card.

Layouts are compared with `parameters.model_weights`, which states the plan of sharding.py as plain shapes.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "research" / "deepseek3"
TINY = RUNS / "deepseek3_tiny" / "pretrain_deepseek3_tiny_4p.yaml"
ONE_BILLION = RUNS / "deepseek3_1b" / "pretrain_deepseek3_1b.yaml"
CLUSTER = RUNS / "deepseek3_671b" / "pretrain_deepseek3_671b.yaml"
FINETUNE = RUNS / "deepseek3_671b" / "finetune_deepseek3_671b.yaml"
LORA = RUNS / "deepseek3_671b" / "finetune_deepseek3_671b_lora.yaml"
MOONLIGHT = RUNS / "moonlight_16b" / "pretrain_moonlight_16b.yaml"
MOONLIGHT_LORA = RUNS / "moonlight_16b" / "finetune_moonlight_16b_lora.yaml"
KIMI = RUNS / "kimi_k2" / "pretrain_kimi_k2.yaml"
KIMI_LORA = RUNS / "kimi_k2" / "finetune_kimi_k2_lora.yaml"
LITE = RUNS / "deepseek2_lite" / "pretrain_deepseek2_lite.yaml"
# A slice of the 671B run: its widths and its 1024 devices, two stages, four layers and MTP.
SLICE = {
    "model.model_config.num_layers": "4",
    "model.model_config.offset": "0",
    "moe_config.first_k_dense_replace": "1",
    "parallel_config.pipeline_stage": "2",
    "parallel_config.data_parallel": "128",
    "parallel_config.micro_batch_num": "2",
    "recompute_config.recompute": "True",
    "parallel.dataset_strategy": "[[128, 1], [128, 1], [128, 1], [128, 1]]",
}


def dry_run(out: Path, config: Path, *arguments: str, overrides: dict[str, str] | None = None) -> dict:
    """Run scripts/dryrun.py; returns its report, with every rank compiled."""
    command = [
        sys.executable,
        str(ROOT / "scripts" / "dryrun.py"),
        "--config",
        str(config),
        "--out",
        str(out),
        *arguments,
    ]
    command += [text for key, value in (overrides or {}).items() for text in (f"--{key}", value)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=out)
    report = json.loads((out / "report.json").read_text())
    assert all(r["status"] == "compiled" for r in report["ranks"]), done.stdout
    return report


def test_one_billion_on_eight_devices(tmp_path):
    report = dry_run(tmp_path, ONE_BILLION, "--ranks", "all", "--jobs", "2")
    assert [r["stage"] for r in report["ranks"]] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert report["parameter_check"]["differences"] == []
    assert report["parameter_check"]["stages"] == [0, 1]
    first = report["ranks"][0]
    assert {c["group_size"] for c in first["collectives"] if c["kind"] == "Send"} == {2}
    assert not any(c["across_nodes"] for r in report["ranks"] for c in r["collectives"]), "eight ranks are one node"


def test_slice_of_671b_on_1024_ranks(tmp_path):
    report = dry_run(tmp_path, CLUSTER, "--device_num", "1024", "--jobs", "2", overrides=SLICE)
    assert [r["rank"] for r in report["ranks"]] == [0, 512]
    assert report["parameter_check"]["differences"] == []
    for rank in report["ranks"]:
        # Between stages only messages, the global norm and the overflow flag.
        communication = rank["compiled"]["collectives"]
        groups = [c for c in communication if c["kind"] not in ("Send", "Receive") and c["bytes"] > 64]
        assert all(r // 512 == rank["stage"] for c in groups for r in c["ranks"]), "a group reaches into another stage"
    assert {f["verdict"] for f in report["audit"]} == {"doubtful", "documented"}, "an operator breaks Ascend's rules"
    assert not [f["operator"] for f in report["audit"] if "not in the table" in f["demand"]]
    assert not [f for f in report["audit"] if "does not say" in f["remedy"]]
    (attention,) = (f for f in report["audit"] if f["operator"] == "FlashAttentionScore")
    assert attention["attributes"] == "input_layout=BNSD sparse_mode=2"
    assert any("fused_ops.py" in place for place in attention["places"]), attention["places"]
    (tokens,) = (c for c in groups if c["purpose"] == "gather_ids" and c["dtype"] == "bfloat16")
    assert tokens["ranks"] == list(range(512, 520)), "expert parallelism over 8 ranks"
    assert tokens["bytes"] == 8 * 1024 * 7168 * 2, "each has a quarter (mp 4) of a sequence of 4096"
    experts = [row for row in report["ranks"][1]["layouts"] if row["name"] == "model.layers.2.mlp.experts.gate_up_proj"]
    assert experts[0]["full_shape"] == [256, 7168, 4096]
    assert max(r["compiled"]["peak_rss_bytes"] for r in report["ranks"]) < 3 * 2**30


@pytest.mark.slow
def test_two_depths_of_multi_token_prediction(tmp_path):
    overrides = {"model.model_config.mtp_depth": "2"}
    report = dry_run(tmp_path, TINY, "--ranks", "per-stage", "--jobs", "2", overrides=overrides)
    assert report["parameter_check"]["differences"] == []
    assert report["parameter_check"]["values"] == report["parameter_check"]["expected"]
    names = {row["name"] for row in report["ranks"][0]["layouts"]}
    assert {name.split(".")[1] for name in names if name.startswith("mtp.")} == {"0", "1"}


@pytest.mark.slow
def test_slice_of_671b_fine_tuned_on_1024_ranks(tmp_path):
    """YaRN, no balancing, a mask of the loss."""
    report = dry_run(tmp_path, FINETUNE, "--device_num", "1024", "--ranks", "512", overrides=SLICE)
    assert report["parameter_check"]["differences"] == []


@pytest.mark.slow
@pytest.mark.parametrize("experts", [False, True], ids=["as_written", "routed_experts"])
def test_slice_of_671b_with_lora_on_128_ranks(tmp_path, experts):
    """Only adapters are trained, and lie where their projections do, those of routed experts too."""
    overrides = SLICE | {
        "parallel_config.data_parallel": "16",
        "parallel.dataset_strategy": "[[16, 1], [16, 1], [16, 1], [16, 1]]",
    }
    if experts:
        overrides |= {
            "model.model_config.pet_config.lora_dropout": "0.0",
            "model.model_config.pet_config.target_modules": "[q_b_proj, kv_b_proj, gate_proj, up_proj, down_proj]",
        }
    report = dry_run(tmp_path, LORA, "--device_num", "128", "--ranks", "64", overrides=overrides)
    assert report["parameter_check"]["differences"] == []
    layouts = {row["name"]: row["stored_shape"] for row in report["ranks"][0]["layouts"]}
    assert all(name.endswith((".lora_a", ".lora_b")) for name in layouts)
    if experts:  # 256 experts over ep 16, and over 4 ranks of optimizer parallelism
        assert layouts["model.layers.2.mlp.experts.lora.up_proj.lora_b"] == [4, 2048, 16]


@pytest.mark.slow
def test_memory_grows_when_recompute_is_off(tmp_path):
    peaks, kept = [], []
    for index, recompute in enumerate(("True", "False")):
        out = tmp_path / str(index)
        out.mkdir()
        # Few experts: with all of them the peak of so few layers is the optimizer's, whatever is kept before.
        overrides = SLICE | {"recompute_config.recompute": recompute, "moe_config.expert_num": "32"}
        report = dry_run(out, CLUSTER, "--ranks", "0", "--level", "memory", overrides=overrides)
        peaks.append(report["ranks"][0]["memory"]["used_peak_bytes"])
        kept.append(report["estimate"]["stages"][0]["activation_bytes"])
    assert peaks[1] - peaks[0] > 0.5 * (kept[1] - kept[0]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("grouped", ["True", "False"], ids=["dropless", "capacity"])
def test_every_stage_of_671b_at_level_memory(tmp_path, grouped):
    arguments = ["--device_num", "1024", "--level", "memory"]
    report = dry_run(tmp_path, CLUSTER, *arguments, overrides={"moe_config.use_gmm": grouped})
    assert len(report["ranks"]) == 16
    assert report["parameter_check"]["differences"] == []
    assert report["parameter_check"]["values"] == report["parameter_check"]["expected"]
    assert all(r["memory"]["actual_peak_bytes"] for r in report["ranks"])
    assert report["exit_code"] == 0, report["verdict"]
    assert max(r["compiled"]["peak_rss_bytes"] for r in report["ranks"]) < 5e9


@pytest.mark.slow
def test_v2_lite_on_eight_ranks(tmp_path):
    report = dry_run(tmp_path, LITE, "--ranks", "per-stage", "--level", "memory")
    assert report["parameter_check"]["differences"] == []
    assert report["exit_code"] == 0, report["verdict"]


@pytest.mark.slow
@pytest.mark.parametrize("config", [MOONLIGHT, MOONLIGHT_LORA], ids=["all", "lora"])
@pytest.mark.parametrize("devices", [8, 16])
def test_moonlight(tmp_path, config, devices):
    """On 16 devices by the overrides that the YAML's head names."""
    split = devices // 2
    overrides = {
        "model.model_config.num_layers": "4",
        "model.model_config.offset": "0",
        "parallel_config.data_parallel": str(split),
        "parallel.dataset_strategy": str([[split, 1]] * 4),
    }
    report = dry_run(tmp_path, config, "--device_num", str(devices), "--jobs", "2", overrides=overrides)
    assert report["parameter_check"]["differences"] == []
    assert [f for f in report["audit"] if f["verdict"] == "violation"] == []


@pytest.mark.slow
@pytest.mark.parametrize("config", [KIMI, KIMI_LORA], ids=["all", "lora"])
def test_slice_of_kimi_k2_on_1024_ranks(tmp_path, config):
    report = dry_run(tmp_path, config, "--device_num", "1024", "--ranks", "512", overrides=SLICE)
    assert report["parameter_check"]["differences"] == []
    assert [f for f in report["audit"] if f["verdict"] == "violation"] == []
    if config == KIMI:
        experts = [row for row in report["ranks"][0]["layouts"] if row["name"].endswith("experts.gate_up_proj")]
        assert experts[0]["full_shape"] == [384, 7168, 4096]

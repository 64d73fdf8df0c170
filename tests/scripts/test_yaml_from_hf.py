"""A complete YAML from a config.json: the model that it says, a legal layout, and a dry run that takes it."""

import json
import sys

import pytest
from helpers.command_line import ROOT, run_command
from helpers.hf_folders import V2_LITE_CONFIG, V3_CONFIG, random_tensors, write_folder
from hf_config import sections_from_hf

from mindformers_ext.config.run import read_run
from mindformers_ext.config.strategy_rules import check_plan
from mindformers_ext.errors import ConfigError
from scripts import yaml_from_hf

V3 = V3_CONFIG | {"num_hidden_layers": 4, "n_routed_experts": 16, "intermediate_size": 128, "moe_intermediate_size": 64}
V2 = V2_LITE_CONFIG | {
    "num_hidden_layers": 3,
    "n_routed_experts": 8,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
}


def written(tmp_path, config, *more):
    (tmp_path / "hf").mkdir(exist_ok=True)
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    output = tmp_path / "out.yaml"
    yaml_from_hf.main(["--hf_dir", str(tmp_path / "hf"), "--output", str(output), *more])
    return read_run(output)


@pytest.mark.parametrize(
    "config,more",
    [(V3, []), (V3, ["--lora", "4", "--device_num", "1"]), (V2, ["--lora", "4", "--device_num", "4"])],
    ids=["v3", "v3-lora", "v2-lora"],
)
def test_the_yaml_is_complete(config, more, tmp_path):
    run = written(tmp_path, config, *more)
    assert check_plan(run) == [] and run.device_num == int(more[-1] if more else 8)
    assert run.global_batch == 128 and run.sections.load_checkpoint == str(tmp_path / "hf")
    expected = sections_from_hf(config)["model"]["model_config"]
    adapted = {"mtp_depth": 0} if "--lora" in more else {}
    assert expected | adapted == {key: run.value(f"model.model_config.{key}") for key in expected}
    assert run.model.moe_config.expert_num == config["n_routed_experts"] and run.model.compute_dtype == "bfloat16"
    assert run.model.seq_length == min(4096, config["max_position_embeddings"])
    assert run.model.lora.lora_rank == (4 if "--lora" in more else 0)


@pytest.mark.parametrize("there", ["all files", "the index of a download that goes on", "one file"])
@pytest.mark.parametrize("depth", [0, 1])
def test_the_mtp_layers_are_those_of_the_weights(depth, there, tmp_path):
    config = V3 | {"num_nextn_predict_layers": depth}
    folder = write_folder(tmp_path / "hf", config, random_tensors(config), 1 if there == "one file" else 3)
    if there == "one file":
        next(folder.glob("*.safetensors")).rename(folder / "model.safetensors")
        (folder / "model.safetensors.index.json").unlink()
    elif there != "all files":
        for path in folder.glob("*.safetensors"):
            path.unlink()
    assert written(tmp_path, V3 | {"num_nextn_predict_layers": 1}).model.mtp_depth == depth


def test_the_dry_run_takes_it(tmp_path):
    written(tmp_path, V3)
    done = run_command(
        [sys.executable, str(ROOT / "scripts/dryrun.py"), "--config", "out.yaml", "--ranks", "none"], tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "config,more,words",
    [
        (V3, ["--device_num", "0"], "--device_num is 0"),
        (V3, ["--device_num", "3"], "--device_num 3: no layout is legal"),
        (V3, ["--seq_length", "9999"], "--seq_length 9999 is above 320"),
        (V3 | {"model_type": "llama"}, [], "model_type is 'llama'"),
    ],
)
def test_what_is_refused(config, more, words, tmp_path):
    with pytest.raises(ConfigError) as error:
        written(tmp_path, config, *more)
    assert words in str(error.value) and not (tmp_path / "out.yaml").exists()

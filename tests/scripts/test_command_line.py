"""The command lines: run_mindformer.py's arguments, its errors, the launcher's messages."""

import re
import socket
import sys
from pathlib import Path

import pytest
from helpers.command_line import ROOT, TOY, run_command, run_mindformer

from mindformers_ext.config.command_line import all_overrides, build_parser, parse_overrides
from mindformers_ext.errors import ConfigError


def test_overrides_are_read_as_yaml() -> None:
    rest = ["--a.b", "2", "--c.d=[1, 2]", "--e.f", "None", "--g", "1.0e-3", "--h.i", "True", "--j", "text", "--k=a=b"]
    expected = {"a.b": 2, "c.d": [1, 2], "e.f": "None", "g": 1e-3, "h.i": True, "j": "text", "k": "a=b"}
    assert dict(parse_overrides(rest)) == expected


@pytest.mark.parametrize("rest,words", [(["--a.b"], "--a.b has no value"), (["word"], "'word' is not understood")])
def test_overrides_that_are_not_pairs(rest: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_overrides(rest)


def test_named_options() -> None:
    line = "--config y.yaml --run_mode eval --use_parallel False --load_checkpoint c --resume_training True --seed 3"
    options, rest = build_parser().parse_known_args(
        [*line.split(), "--output_dir", "o", "--device_target", "CPU", "--x.y", "1"]
    )
    assert (options.run_mode, options.use_parallel, options.resume_training, options.seed) == ("eval", False, True, 3)
    assert rest == ["--x.y", "1"]
    assert build_parser().parse_args(["--config", "y", "--resume_training", "step_8"]).resume_training == "step_8"


def test_null_is_no_name_of_a_folder() -> None:
    options, rest = build_parser().parse_known_args(["--config", "x.yaml", "--output_dir", "null"])
    assert all_overrides(options, rest) == [("output_dir", None)]  # which read_run refuses


def test_an_unknown_key_on_the_command_line_is_one_sentence(toy_folder: Path) -> None:
    result = run_mindformer(toy_folder, "--optimizer.weight_decy", "0.1")
    assert result.returncode == 2
    assert result.stderr.strip() == (
        f"error: {TOY}/train_toy.yaml: optimizer.weight_decy: unknown key with value 0.1; did you mean 'weight_decay'?"
    )


def test_a_missing_yaml_is_one_sentence(tmp_path: Path) -> None:
    result = run_mindformer(tmp_path, config=tmp_path / "none.yaml")
    assert result.returncode == 2 and len(result.stderr.strip().splitlines()) == 1
    assert "none.yaml" in result.stderr and "--config" in result.stderr


def test_a_missing_checkpoint_is_one_sentence(toy_folder: Path) -> None:
    result = run_mindformer(toy_folder, "--load_checkpoint", "nowhere", "--resume_training", "True")
    assert result.returncode == 2
    assert "load_checkpoint is 'nowhere', which does not exist" in result.stderr.strip().splitlines()[-1]


LAUNCHER = ["bash", str(ROOT / "scripts/msrun_launcher.sh")]
WITH_CONFIG = "run_mindformer.py --config research/deepseek3/deepseek3_tiny/pretrain_deepseek3_tiny.yaml"
BAD_LAUNCHES = [
    ([], "no command given"),
    ([""], "no command given"),
    (["  "], "no command given"),
    (["run_mindformer.py"], "no --config"),
    (["run_mindformer.py --config"], "--config '' is no file"),
    (["run_mindformer.py --config=lost.yaml"], "--config 'lost.yaml' is no file"),
    (["run_mindformer.py --config 'a"], "cannot be split into words (No closing quotation)"),
    ([f"{WITH_CONFIG} --use_parallel maybe"], "'maybe' is neither True nor False"),
    ([f"{WITH_CONFIG} --optimizer.betas"], "--optimizer.betas has no value"),
    (["run_mindformer.py --config bad.yaml", "4"], "missing.yaml: cannot read this YAML file"),
    (["run_mindformer.py", "99999999999999999999"], "WORKER_NUM is '99999999999999999999'"),
    (["run_mindformer.py", "2", "2", "h", "8118", "08"], "NODE_RANK is '08'"),
    (["run_mindformer.py", "eight"], "WORKER_NUM is 'eight'"),
    (["run_mindformer.py", "0"], "WORKER_NUM is '0'"),
    (["run_mindformer.py", "2", "4"], "LOCAL_WORKER_NUM is 4, but must not exceed WORKER_NUM 2"),
    (["run_mindformer.py", "10", "4"], "must be a multiple of LOCAL_WORKER_NUM 4"),
    (["run_mindformer.py", "2", "2", "127.0.0.1", "99999"], "MASTER_PORT is '99999'"),
    (["run_mindformer.py", "16", "8", "h", "8118", "2"], "NODE_RANK is '2', but must be from 0 to 1"),
    (["run_mindformer.py", "2", "2", "h", "8118", "0", "log", "maybe"], "JOIN is 'maybe'"),
    (["run_mindformer.py", "2", "2", "h", "8118", "0", "log", "True", "soon"], "CLUSTER_TIME_OUT is 'soon'"),
    (["run_mindformers.py --config y", "2"], "'run_mindformers.py', which is no file"),
    (["run_mindformer.py --config lost.yaml", "2"], "--config 'lost.yaml' is no file"),
    (["run_mindformer.py", *"123456789"], "at most 9"),
]


@pytest.mark.parametrize("arguments,words", BAD_LAUNCHES, ids=[words for _, words in BAD_LAUNCHES])
def test_launcher_messages(arguments: list[str], words: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("base_config: missing.yaml\n")
    result = run_command([*LAUNCHER, *arguments], tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_taken_port(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = run_command([*LAUNCHER, WITH_CONFIG, "2", "2", "127.0.0.1", port], tmp_path)
    assert result.returncode == 2 and f"MASTER_PORT {port} is taken" in result.stderr


@pytest.mark.parametrize(
    "arguments,expected",
    [
        (["8"], "--worker_num=8 --local_worker_num=8 --master_addr=127.0.0.1 --master_port=8118 --node_rank=0"),
        (
            ["1024", "8", "192.168.1.1", "8118", "3", "output/msrun_log", "False", "7200"],
            "--worker_num=1024 --local_worker_num=8 --master_addr=192.168.1.1 --master_port=8118 --node_rank=3 "
            "--log_dir=output/msrun_log --join=False --cluster_time_out=7200",
        ),
        (
            ["4", "8119", "log", "True", "60"],
            "--worker_num=4 --local_worker_num=4 --master_addr=127.0.0.1 --master_port=8119",
        ),
    ],
)
def test_what_msrun_is_called_with(
    arguments: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recording msrun takes the real one's place in PATH."""
    (tmp_path / "msrun").write_text('#!/bin/sh\necho "msrun $*"\n')
    (tmp_path / "msrun").chmod(0o755)
    config = tmp_path / "my file.yaml"
    config.write_text(f"base_config: {ROOT}/research/deepseek3/deepseek3_tiny/pretrain_deepseek3_tiny.yaml\n")
    (tmp_path / "0").touch()  # which [400,0,0] would be replaced with if the command were a pattern
    words = "--train_dataset.data_loader.sizes [400,0,0] --output_dir 'x$(touch ran)`touch ran`'"
    command = f"run_mindformer.py --config '{config}' {words} --seed 1"
    script = f'PATH={tmp_path}:$PATH bash {LAUNCHER[1]} "$@"'
    result = run_command(["bash", "-c", script, "launcher", command, *arguments], tmp_path)
    assert result.returncode == 0, result.stderr
    assert expected in result.stdout
    words = "--train_dataset.data_loader.sizes [400,0,0] --output_dir x$(touch ran)`touch ran`"
    assert f"run_mindformer.py --config {config} {words} --seed 1 --use_parallel True" in result.stdout
    assert not (tmp_path / "ran").exists()


def test_the_server_answers_this_machine_only(tmp_path: Path) -> None:
    """A recording python takes the place of vLLM's; the last of two --host counts."""
    environment = tmp_path / "vllm"
    (environment / "bin").mkdir(parents=True)
    (environment / "ready").touch()
    (environment / "bin" / "python").write_text('#!/bin/sh\necho "$*"\n')
    (environment / "bin" / "python").chmod(0o755)
    (tmp_path / "config.json").touch()
    serve = f'VLLM_VENV={environment} VLLM_OPTIONS="$0" bash {ROOT}/scripts/serve_vllm.sh {tmp_path} 8001'
    hosts = [run_command(["bash", "-c", serve, more], tmp_path).stdout for more in ("", "--host 0.0.0.0")]
    assert [re.findall(r"--host (\S+)", line) for line in hosts] == [["127.0.0.1"], ["127.0.0.1", "0.0.0.0"]]


@pytest.mark.parametrize(
    "script,arguments,words",
    [
        ("quickstart.sh", ["--inptu", "x"], "unknown argument '--inptu'"),
        ("quickstart.sh", ["--input", "nothing.txt"], "nothing.txt does not exist or is empty"),
        ("install.sh", ["--venv"], "unknown argument '--venv'"),
    ],
)
def test_script_messages(script: str, arguments: list[str], words: str, tmp_path: Path) -> None:
    result = run_command(["bash", str(ROOT / "scripts" / script), *arguments], tmp_path)
    assert result.returncode == 2 and words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_every_script_parses() -> None:
    for script in [*(ROOT / "scripts").glob("*.sh"), ROOT / ".ci/run"]:
        assert run_command(["bash", "-n", str(script)], ROOT).returncode == 0
    assert run_command([sys.executable, str(ROOT / "run_mindformer.py"), "--help"], ROOT).returncode == 0

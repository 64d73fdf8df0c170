"""docs/from_huggingface.md, typed by a new user: every command, on a tiny model of a hub on this machine."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.command_line import ROOT
from helpers.hub import Hub
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import DeepseekV3Config as HfConfig
from transformers import DeepseekV3ForCausalLM as HfModel

pytestmark = pytest.mark.slow
PAGE = (ROOT / "docs/from_huggingface.md").read_text(encoding="utf-8")
TINY = "research/deepseek3/deepseek3_tiny_serve/pretrain_deepseek3_tiny_serve.yaml"
COMMANDS = re.search(r"```bash\n(.*?)```", PAGE, re.S)[1].replace("\\\n", " ")
CONVERSATION = [{"role": "user", "content": "What is a list?"}, {"role": "assistant", "content": "A row of things."}]


class User:
    """Who types in one folder."""

    def __init__(self, folder: Path, endpoint: str = ""):
        self.folder = folder
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self.environment = dict(os.environ, PATH=path, HF_ENDPOINT=endpoint, GLOG_v="3", OMP_NUM_THREADS="1")
        self.environment |= {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}

    def types(self, command: str) -> str:
        """What a command prints."""
        done = subprocess.run(
            ["bash", "-c", command], cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=1800
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout


@pytest.fixture
def user(tmp_path):
    """In a folder with the project's programs, and a hub that has a tiny DeepSeek-V3 of random weights."""
    for name in ("scripts", "research", "mindformers_ext", "dataset_tools", "docker", "run_mindformer.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    user = User(tmp_path)
    text = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "research/deepseek3").glob("*.py")))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    user.types("python dataset_tools/train_tokenizer.py --input text.txt --output tokenizer.json --vocab-size 2048")
    user.types(f"python scripts/make_hf_assets.py --config {TINY} --tokenizer_file tokenizer.json --output original")
    config = json.loads((tmp_path / "original/config.json").read_text()) | {"num_nextn_predict_layers": 0}
    torch.manual_seed(0)
    HfModel(HfConfig(**config)).to(torch.bfloat16).save_pretrained(tmp_path / "original", max_shard_size="4MB")
    (tmp_path / "original/config.json").write_text(json.dumps(config))
    line = json.dumps({"messages": CONVERSATION}) + "\n"
    (tmp_path / "conversations.jsonl").write_text(line * 64)
    files = {path.name: path.read_bytes() for path in (tmp_path / "original").iterdir()}
    with Hub(files, {name for name in files if name.endswith(".safetensors")}) as hub:
        yield User(tmp_path, hub.endpoint)


def test_from_the_download_to_the_chat(user):
    small = COMMANDS.replace("--device_num 128", "--device_num 2").replace("--seq-length 4096", "--seq-length 128")
    small = small.replace("--output finetune.yaml", "--output finetune.yaml --seq_length 128 --global_batch 2")
    *before, job, merge, serve = [line for line in small.splitlines() if line and not line.startswith("#")]
    said = [user.types(command) for command in before]
    assert "DeepSeek-V3.1-Base" in before[0] and "every one checked" in said[1]
    assert {path.name for path in (user.folder / "D").iterdir()} >= {"config.json", "tokenizer.json"}
    user.types(job)
    assert "AscendJob" in (user.folder / "job.yaml").read_text()

    # What the job would run, on this machine's CPU.
    short = "--train_dataset.data_loader.sizes [8,0,0]"
    user.types(f'bash scripts/msrun_launcher.sh "run_mindformer.py --config finetune.yaml {short}" 2')
    assert (user.folder / "output/adapter/adapter_model.safetensors").is_file()
    user.types(merge)

    chat, released = (AutoModelForCausalLM.from_pretrained(user.folder / name).float() for name in ("chat", "D"))
    changed = [
        name
        for (name, ours), theirs in zip(chat.state_dict().items(), released.state_dict().values(), strict=True)
        if not torch.equal(ours, theirs)
    ]
    assert changed and all(re.search(r"(self_attn|mlp).*proj", name) for name in changed), changed
    tokenizer = AutoTokenizer.from_pretrained(user.folder / "chat")
    ids = tokenizer.apply_chat_template(CONVERSATION[:1], add_generation_prompt=True, return_tensors="pt")
    assert chat.generate(ids, max_new_tokens=8, do_sample=False).shape[1] > ids.shape[1]
    assert serve.startswith("bash scripts/serve_vllm.sh chat")  # tests/weights/test_serving.py asks such a server
    shutil.rmtree(user.folder / "chat")

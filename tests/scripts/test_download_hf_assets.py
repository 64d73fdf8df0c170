"""Downloading a model: what is chosen, resumed, checked and refused, against a hub on this machine."""

import random
import shutil
import subprocess
import sys
import time
import types
from collections import Counter

import pytest
from helpers.command_line import ROOT, run_environment
from helpers.hub import REPO, Hub

from mindformers_ext.errors import ConfigError, UserError
from scripts import download_hf_assets

SCRIPT = str(ROOT / "scripts/download_hf_assets.py")
NAMES = {
    "tokenizer": {"tokenizer.json", "tokenizer_config.json"},
    "config": {"config.json", "generation_config.json", "modeling_deepseek.py"},
    "weights": {"model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"},
}
LARGE = "model-00001-of-00002.safetensors"


def content(size, seed):
    return random.Random(seed).randbytes(size)


@pytest.fixture
def hub(monkeypatch):
    files = {name: content(200 + i, i) for i, name in enumerate(sorted(set().union(*NAMES.values())))}
    files |= {LARGE: content(1_500_000, 7), "model-00002-of-00002.safetensors": content(700_000, 8)}
    files |= {"README.md": b"a model", ".gitattributes": b"* lfs", "figures/benchmark.png": content(900, 9)}
    files |= {"onnx/model.safetensors": b"another format", "empty.txt": b""}
    large = {name for name in files if name.endswith((".safetensors", ".png"))} | {"tokenizer.json"}
    with Hub(files, large) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        monkeypatch.setenv("HF_TOKEN", "secret")
        yield running


def download(folder, *more):
    download_hf_assets.main(["--repo_id", REPO, "--local_dir", str(folder), *more])


def held(folder):
    paths = [path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_everything_arrives_and_a_second_run_downloads_nothing(hub, tmp_path, capsys):
    download(tmp_path)
    assert held(tmp_path) == {name: data for name, data in hub.files.items() if name != ".gitattributes"}
    assert "12 files, every one checked" in capsys.readouterr().out
    asked = len(hub.asked)
    download(tmp_path)
    assert len(hub.asked) == asked + 1  # the listing
    assert "0 of 0 bytes to download or check" in capsys.readouterr().out
    # The token goes to the hub and not to the host that large files are on.
    assert all(("secret" in authorization) != path.startswith("/cdn/") for _, path, _, authorization in hub.asked)


@pytest.mark.parametrize("group", NAMES)
def test_groups(group, hub, tmp_path):
    download(tmp_path, f"--{group}")
    assert set(held(tmp_path)) == NAMES[group]


def test_a_line_that_breaks_anywhere_is_taken_up_where_it_broke(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(download_hf_assets, "WAIT_SECONDS", 0)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1 << 16)  # of 10 MB, which would hide it
    generator = random.Random()
    stops = [generator.randrange(1, 300_000) for _ in range(9)]
    hub.breaks[LARGE] = list(stops)
    download(tmp_path, "--weights")
    assert held(tmp_path)[LARGE] == hub.files[LARGE], stops
    assert hub.ranges(LARGE)[0] == "" and any(text.startswith("bytes=") for text in hub.ranges(LARGE)), stops
    assert hub.sent[LARGE] <= len(hub.files[LARGE]) + len(stops) * (1 << 16), stops


def test_a_killed_download_goes_on(hub, tmp_path):
    hub.bytes_a_second = 1_000_000
    command = [sys.executable, SCRIPT, "--repo_id", REPO, "--local_dir", str(tmp_path), "--weights"]
    run = subprocess.Popen(command, env=run_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    # 10 MB at a time is what huggingface_hub writes, so what is on the disk before a kill is what was flushed.
    end = time.monotonic() + 60
    while hub.sent["model-00002-of-00002.safetensors"] < 700_000 and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(0.3)
    run.kill()
    run.wait()
    assert LARGE not in held(tmp_path)
    hub.bytes_a_second = None
    before = hub.sent["model-00002-of-00002.safetensors"]
    download(tmp_path, "--weights")
    assert set(held(tmp_path)) == NAMES["weights"] and held(tmp_path)[LARGE] == hub.files[LARGE]
    assert hub.sent["model-00002-of-00002.safetensors"] == before


@pytest.mark.parametrize("name", [LARGE, "config.json"])
def test_wrong_content_is_downloaded_again_and_refused_when_it_stays_wrong(name, hub, tmp_path, capsys):
    group = "--weights" if name == LARGE else "--config"
    hub.wrong = Counter({name: 1})
    download(tmp_path / "once", group)
    assert held(tmp_path / "once")[name] == hub.files[name]
    assert f"{name}: has the sha" in capsys.readouterr().out
    hub.wrong = Counter({name: 100})
    with pytest.raises(UserError) as error:
        download(tmp_path / "always", group)
    assert "3 times; the hub or a proxy on the way changes it" in str(error.value)
    assert f"({name}); run it again" in str(error.value) and name not in held(tmp_path / "always")


def test_a_file_that_was_changed_or_cut_is_found(hub, tmp_path):
    download(tmp_path, "--weights")
    (tmp_path / LARGE).write_bytes(hub.files[LARGE][:1000])
    (tmp_path / "model.safetensors.index.json").write_bytes(b"{}")
    download(tmp_path, "--weights")
    assert held(tmp_path) == {name: hub.files[name] for name in NAMES["weights"]}


@pytest.mark.parametrize(
    "name", ["../evil.safetensors", "/etc/evil", "a/../../evil", "a\\b", "C:evil", ".cache/x", "a\nb", "a//b", "./a"]
)
def test_names_that_leave_the_folder_are_refused(name, hub, tmp_path):
    hub.files[name] = b"evil"
    with pytest.raises(ConfigError, match="which is no plain path inside it"):
        download(tmp_path / "inside")
    assert not (tmp_path / "inside").exists() or held(tmp_path / "inside") == {}


def test_links_in_the_folder_are_not_followed(hub, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "figures").symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match="is a link, or lies behind one"):
        download(tmp_path / "inside")
    assert [*(tmp_path / "outside").iterdir()] == []


@pytest.mark.parametrize("seen_before", [True, False])
def test_a_full_disk_says_what_is_missing(seen_before, hub, mounted, monkeypatch):
    folder = mounted("size=1m")
    if not seen_before:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=10**9))
    with pytest.raises(UserError) as error:
        download(folder, "--weights", "--workers", "1")
    text = str(error.value)
    assert (hub.sent[LARGE] == 0) == seen_before
    assert "No space left on device" in text and "MB free in" in text and LARGE in text and "run it again" in text


@pytest.mark.parametrize(
    "more,words",
    [
        (["--repo_id", "deepseek-ai/none"], "there is no such repository, or it is private"),
        (["--revision", "v9"], "there is no such revision"),
        (["--repo_id", "a/b/c"], "a/b/c: Repo id must be"),
        (["--workers", "0"], "--workers is 0"),
        (["--source", "modelscope"], "pip install modelscope-hub"),
    ],
)
def test_what_the_hub_refuses_is_a_sentence(more, words, hub, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    with pytest.raises(UserError) as error:
        download(tmp_path, *more)
    assert words in str(error.value)


def test_gated_and_unreachable(hub, tmp_path, monkeypatch):
    hub.token = "another"
    with pytest.raises(UserError, match="its owner must give you access"):
        download(tmp_path)
    hub.token = None
    monkeypatch.setattr(download_hf_assets, "WAIT_SECONDS", 0)
    hub.breaks["config.json"] = [0] * 1000
    with pytest.raises(UserError, match="the hub is not reached") as error:
        download(tmp_path, "--config")
    assert "1 files of 200 bytes are missing (config.json); run it again" in str(error.value)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="the hub is not reached"):
        download(tmp_path)


def test_modelscope(hub, tmp_path, monkeypatch):
    """A stand-in takes the place of ModelScope's package: its calls as in modelscope-hub 0.5.1."""

    class HubError(Exception):
        pass

    class HubApi:
        def list_repo_files(self, repo_id, repo_type, *, revision=None, recursive=True):
            if repo_id != REPO:
                raise HubError("not found")
            import hashlib

            files = [
                types.SimpleNamespace(path=name, size=len(data), type="blob", sha256=hashlib.sha256(data).hexdigest())
                for name, data in hub.files.items()
            ]
            return [*files, types.SimpleNamespace(path="figures", size=0, type="tree", sha256=None)]

        def download_file(self, repo_id, repo_type, file_path, *, revision=None, local_dir=None, force=False):
            data = hub.files[file_path]
            if file_path == "config.json" and not force:
                data = data[:-1]
            (local_dir / file_path).parent.mkdir(parents=True, exist_ok=True)
            (local_dir / file_path).write_bytes(data)

    for name, members in {"modelscope_hub": {}, "modelscope_hub.api": {"HubApi": HubApi}}.items():
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**members))
    monkeypatch.setitem(sys.modules, "modelscope_hub.errors", types.SimpleNamespace(HubError=HubError))
    download(tmp_path, "--source", "modelscope")
    assert held(tmp_path)["config.json"] == hub.files["config.json"] and len(held(tmp_path)) == 12
    with pytest.raises(UserError, match="ModelScope refuses it"):
        download(tmp_path, "--source", "modelscope", "--repo_id", "other/one")

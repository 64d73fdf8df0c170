"""What the documents say is there: paths, links, and every option and key of every command."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mindformers_ext.config.command_line import OPTIONS
from mindformers_ext.config.run import read_run

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = "benchmarks|dataset_tools|docker|docs|mindformers_ext|research|scripts|tests"
DOCUMENTS = [*sorted(ROOT.glob("README*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
SHARED = ("mindformers_ext/bin_dataset/cli.py", "mindformers_ext/config/command_line.py")  # parsers of several programs


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_paths_and_links_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    named = re.findall(rf"`((?:{FOLDERS})/[\w./-]*)", text)
    linked = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert [path for path in named if not (ROOT / path.rstrip(".")).exists()] == []
    assert [link for link in linked if not (document.parent / link).exists()] == []


def test_the_site_is_built_and_its_links_hold(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    site, sources = tmp_path / "site", ROOT / "docs"
    pages = {path.relative_to(site).with_suffix("") for path in site.rglob("*.html")} - {Path("404"), Path("search")}
    assert pages == {path.relative_to(sources).with_suffix("") for path in sources.rglob("*.md")}


def commands_of(text: str) -> list[str]:
    """Every line of the bash blocks, and the commands in backticks inside tables and sentences."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    inline = re.findall(r"`((?:python|bash) [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    return [line.strip() for line in [*lines, *inline] if line.strip() and not line.lstrip().startswith("#")]


COMMANDS = sorted(
    {(str(document.relative_to(ROOT)), line) for document in DOCUMENTS for line in commands_of(document.read_text())}
)


def script_of(words: list[str]) -> Path | None:
    """The project's program that a command runs."""
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    if len(words) < 2 or words[0] not in ("python", "bash", "sbatch"):
        return None
    name = next((word for word in words[1:] if not word.startswith("-")), "")
    return ROOT / name if name.endswith((".py", ".sh")) else None


def run_keys() -> set[str]:
    tiny = read_run(ROOT / "research/deepseek3/deepseek3_tiny/pretrain_deepseek3_tiny.yaml")
    return tiny.known_keys() | {name for name, *_ in OPTIONS}


def unknown_options(script: Path, words: list[str], keys: set[str]) -> list[str]:
    """Options that neither the program's text nor the shared parsers name, and keys that no YAML has."""
    known = script.read_text() + "".join((ROOT / path).read_text() for path in SHARED)
    for module in re.findall(r"-m (mindformers_ext[\w.]+)", known):  # what a shell script becomes
        known += (ROOT / f"{module.replace('.', '/')}.py").read_text()
    found = []
    for word in words:
        option = word.split("=")[0]
        if not re.fullmatch(r"--[A-Za-z][\w.-]*", option):
            continue
        name = option.removeprefix("--")
        as_key = name in keys or name == "section.key"
        if not as_key and f'"{option}"' not in known and not re.search(rf"{re.escape(option)}\b", known):
            found.append(option)
    return found


@pytest.mark.parametrize("document,command", COMMANDS, ids=lambda text: text[:60])
def test_every_command_is_one_that_the_program_takes(document: str, command: str) -> None:
    """Parsed, not run: the program is there, and so is every option and every key of a YAML."""
    text = re.sub(r"\s#.*$", "", command).replace("[", " ").replace("]", " ").replace("|", " ")
    text = re.split(r"\s(?:&&|&|>)\s|\s&$", f"{text} ")[0]
    if text.count("'") % 2 or text.count('"') % 2:
        text = re.sub(r"['\"]", "", text)
    words = shlex.split(text)
    script = script_of(words)
    if script is None:
        return
    assert script.exists(), script
    nested = [part for word in words if word.startswith("run_mindformer.py ") for part in shlex.split(word)]
    after = words[words.index("--") + 1 :] if "--" in words else []
    own = words[: words.index("--")] if "--" in words else words
    keys = run_keys()
    assert unknown_options(script, own, keys) == []
    assert unknown_options(ROOT / "run_mindformer.py", [*nested, *after], keys) == []
    for paths in (words, nested):
        for option, value in zip(paths, paths[1:], strict=False):
            if option == "--config" and "/" in value:
                assert (ROOT / value).exists(), value


def test_the_sentences_of_troubleshooting_are_said() -> None:
    """Between what is filled in, their words stand in the sources."""
    sources = [*ROOT.glob("mindformers_ext/**/*.py"), *ROOT.glob("scripts/*"), *ROOT.glob("research/deepseek3/*.py")]
    said = re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text() for path in sources if path.is_file()))
    table = (ROOT / "docs/troubleshooting.md").read_text()
    sentences = re.findall(r"^\| `([^`]+)`", table, re.M)
    assert len(sentences) > 10
    words = [max(re.split(r"\.\.\.|\bN\b|\bX\b|\b25 s\b", sentence), key=len).strip(" ;,()") for sentence in sentences]
    assert [part for part in words if part not in said] == []


CHINESE = [ROOT / "README.zh-CN.md", *sorted((ROOT / "docs/zh").glob("*.md"))]


@pytest.mark.parametrize("chinese", CHINESE, ids=lambda path: path.name)
def test_both_languages_name_the_same_commands_and_keys(chinese: Path) -> None:
    front = chinese.name == "README.zh-CN.md"
    english = ROOT / "README.md" if front else ROOT / "docs" / chinese.name
    blocks, codes = {}, {}
    for path in (english, chinese):
        text = path.read_text(encoding="utf-8")
        blocks[path] = [re.sub(r"\s*# .*", "", block) for block in re.findall(r"```(?:bash)?\n(.*?)```", text, re.S)]
        codes[path] = set(re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S)))
    if front:  # the English one says more: a report, features, files
        blocks[english] = [block for block in blocks[english] if "bash " in block or "python " in block]
        assert codes[chinese] <= codes[english]
    else:
        assert codes[chinese] == codes[english]
    assert blocks[chinese] == blocks[english]

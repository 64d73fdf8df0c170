"""Download a model's files from HuggingFace or ModelScope, each checked by size and hash.

    python scripts/download_hf_assets.py --repo_id deepseek-ai/DeepSeek-V3.1-Base --local_dir DeepSeek-V3.1 --tokenizer

--all (the default), --tokenizer, --config and --weights choose the files. Run it again after a kill, a full disk or a
broken line: it goes on where it was, and files that were checked are not read again. HF_ENDPOINT, HF_TOKEN and proxies
are honoured as huggingface_hub does. ModelScope needs its package: pip install modelscope-hub.
"""

import argparse
import hashlib
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mindformers_ext.errors import FULL, ConfigError, UserError, exit_code_of, free_space
from mindformers_ext.files.atomic import write_json
from mindformers_ext.files.json_files import read_object

GROUPS = {
    "tokenizer": "tokenizer* *.tiktoken tiktoken.model special_tokens_map.json added_tokens.json vocab.json merges.txt "
    "chat_template* tokenization_*.py encoding_*.py",
    "config": "config.json generation_config.json configuration_*.py modeling_*.py",
    "weights": "*.safetensors *.safetensors.index.json",
}
CHECKED = ".cache/checked.json"  # {name: [size, mtime in ns, hash]}, of files that were read and are right
ATTEMPTS = 3  # of content that is wrong
QUIET_TRIES, WAIT_SECONDS = 5, 2.0  # of a line that breaks and brings nothing new; as long as bytes arrive, it goes on


class NotReached(UserError):
    """The line to the hub broke, or was never there."""


@dataclass(frozen=True)
class File:
    """A file of the repository: its name, size, and how its content is known ("sha256", or git's "sha1")."""

    name: str
    size: int
    kind: str
    digest: str


@dataclass
class Source:
    """A hub: what a repository holds, and how one file of it gets into a folder."""

    files: list[File]
    fetch: Callable[[str, bool], None]  # (name, whether to forget what is there)


def huggingface(repo_id: str, revision: str | None, folder: Path) -> Source:
    """A HuggingFace repository, at one commit from beginning to end. Raises UserError."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if sys.stderr.isatty() else "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import HfApi, hf_hub_download

    endpoint = os.environ.get("HF_ENDPOINT") or None
    info = told(lambda: HfApi(endpoint=endpoint).model_info(repo_id, revision=revision, files_metadata=True), repo_id)

    def fetch(name: str, anew: bool) -> None:
        told(
            lambda: hf_hub_download(
                repo_id, name, revision=info.sha, local_dir=folder, endpoint=endpoint, force_download=anew
            ),
            f"{repo_id}/{name}",
        )

    files = []
    for item in info.siblings:
        large = item.lfs is not None
        digest = item.lfs.sha256 if large else item.blob_id
        files.append(File(item.rfilename, item.lfs.size if large else item.size, "sha256" if large else "sha1", digest))
    return Source(files, fetch)


def told(work: Callable, what: str):
    """Do something with the hub. Raises UserError with one sentence for what it refuses."""
    import requests
    from huggingface_hub import errors

    try:
        return work()
    except errors.GatedRepoError:
        reason = "its owner must give you access; ask on its page, and set HF_TOKEN"
    except errors.RepositoryNotFoundError:
        reason = "there is no such repository, or it is private; check --repo_id, and set HF_TOKEN"
    except errors.RevisionNotFoundError:
        reason = "there is no such revision; check --revision"
    except errors.HFValidationError as error:
        reason = str(error)
    except errors.HfHubHTTPError as error:
        reason = f"the hub answered {error.response.status_code}; run the command again later"
    except (requests.RequestException, errors.LocalEntryNotFoundError, errors.FileMetadataError) as error:
        cause = type(error.__cause__ or error).__name__
        text = f"{what}: the hub is not reached ({cause}); check HF_ENDPOINT and proxies, and run it again"
        raise NotReached(text) from None
    raise UserError(f"{what}: {reason}")


def modelscope(repo_id: str, revision: str | None, folder: Path) -> Source:
    """A ModelScope repository. Raises UserError."""
    try:
        from modelscope_hub.api import HubApi
        from modelscope_hub.errors import HubError
    except ImportError:
        raise UserError("--source modelscope needs its package; run pip install modelscope-hub") from None
    hub = HubApi()

    def refused(error: Exception, what: str) -> UserError:
        return UserError(f"{what}: ModelScope refuses it ({type(error).__name__}: {error})")

    try:
        listed = hub.list_repo_files(repo_id, "model", revision=revision, recursive=True)
    except HubError as error:
        raise refused(error, repo_id) from None
    by_name = {item.path: item for item in listed if item.type != "tree"}
    unknown = [name for name, item in by_name.items() if not item.sha256 or item.size is None]
    if unknown:
        raise UserError(f"{repo_id}/{unknown[0]}: ModelScope tells no size and hash of it, so nothing can check it")

    def fetch(name: str, anew: bool) -> None:
        try:
            hub.download_file(repo_id, "model", name, revision=revision, local_dir=folder, force=anew)
        except HubError as error:
            raise refused(error, f"{repo_id}/{name}") from None

    return Source([File(name, item.size, "sha256", item.sha256) for name, item in by_name.items()], fetch)


def is_plain(name: str) -> bool:
    """True for a path that stays in its folder and is no name of this program's own or of a device."""
    parts = PurePosixPath(name).parts
    odd = re.search(r"[\x00-\x1f\x7f\\:]", name) or name.startswith("/") or name != "/".join(parts)
    return bool(parts) and not odd and ".." not in parts and parts[0] not in (".cache", ".git")


def chosen(files: list[File], groups: list[str]) -> list[File]:
    """The files of the groups. Raises ConfigError for names that would leave the folder."""
    bad = [file.name for file in files if not is_plain(file.name)]
    if bad:
        raise ConfigError(*(f"the repository names a file {name!r}, which is no plain path inside it" for name in bad))
    if not groups:
        return [file for file in files if file.name != ".gitattributes"]
    patterns = [pattern for group in groups for pattern in GROUPS[group].split()]
    # What belongs to the model lies at the top: folders hold other formats of the same.
    return [file for file in files if any(fnmatch(file.name, p) for p in patterns) and "/" not in file.name]


def hash_of(path: Path, kind: str) -> str:
    """Of a file's content: sha256, or the name that git gives it."""
    digest = hashlib.sha256() if kind == "sha256" else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as stream:
        while piece := stream.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


class Folder:
    """The local folder, and which of its files are known to be right."""

    def __init__(self, path: Path):
        self.path, self.lock = path, threading.Lock()
        path.mkdir(parents=True, exist_ok=True)
        self.checked = read_object(path / CHECKED) if (path / CHECKED).exists() else {}

    def has(self, file: File) -> bool:
        """True when the file was checked and not touched since."""
        place = self.path / file.name
        if place.is_symlink() or not place.is_file():
            return False
        found = place.stat()
        return self.checked.get(file.name) == [found.st_size, found.st_mtime_ns, file.digest]

    def arrived(self) -> int:
        """Bytes in the folder, parts of files that are under way included."""
        total = 0
        for place in self.path.rglob("*"):
            with suppress(OSError):  # a part that has just become a file
                total += place.lstat().st_size
        return total

    def fault(self, file: File) -> str | None:
        """What is wrong with a file that is there; None when it is right, which is remembered."""
        place = self.path / file.name
        if place.stat().st_size != file.size:
            return f"has {place.stat().st_size:,} bytes, the hub says {file.size:,}"
        if (found := hash_of(place, file.kind)) != file.digest:
            return f"has the {file.kind} {found}, the hub says {file.digest}"
        with self.lock:
            self.checked[file.name] = [place.stat().st_size, place.stat().st_mtime_ns, file.digest]
            (self.path / CHECKED).parent.mkdir(exist_ok=True)
            write_json(self.path / CHECKED, self.checked)
        return None


def patiently(fetch: Callable[[], None], folder: Folder) -> None:
    """Fetch a file over a line that breaks. Raises NotReached when nothing more arrives over it."""
    tries, before = 0, folder.arrived()
    while True:
        try:
            return fetch()
        except NotReached:  # huggingface_hub 0.36 itself tries again for some of these errors only
            now = folder.arrived()
            tries, before = (0 if now > before else tries + 1), now
            if tries >= QUIET_TRIES:
                raise
            time.sleep(WAIT_SECONDS)


def get(folder: Folder, source: Source, file: File) -> None:
    """Bring one file in and check it. Raises UserError when it stays wrong."""
    place = folder.path / file.name
    if any(parent.is_symlink() for parent in (place, *place.parents) if folder.path in parent.parents):
        raise ConfigError(f"{place}: is a link, or lies behind one; remove it, or give another --local_dir")
    fault = None
    for _ in range(ATTEMPTS):
        patiently(lambda anew=fault is not None: source.fetch(file.name, anew), folder)
        fault = folder.fault(file)
        if fault is None:
            print(f"{file.name}: {file.size:,} bytes, {file.kind} right", flush=True)
            return
        print(f"{file.name}: {fault}; it is downloaded again", flush=True)
        place.unlink(missing_ok=True)
    raise UserError(f"{place}: {fault}, {ATTEMPTS} times; the hub or a proxy on the way changes it")


def download(folder: Folder, source: Source, files: list[File], workers: int) -> None:
    """Bring in what is missing. Raises UserError that says what still is, when the disk is full or the hub fails."""
    missing = [file for file in files if not folder.has(file)]
    need, here = sum(file.size for file in missing), sum(file.size for file in files)
    print(f"{len(files)} files of {here:,} bytes, {len(missing)} of {need:,} bytes to download or check", flush=True)
    errors: list[Exception] = []
    if need > shutil.disk_usage(folder.path).free + folder.arrived():
        errors.append(OSError(FULL[0], ""))

    def work(file: File) -> None:
        if errors:
            return  # what failed once fails for the others too, and a new run goes on
        try:
            get(folder, source, file)
        except (UserError, OSError) as error:
            errors.append(error)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, missing))
    if not errors:
        return
    error = errors[0]
    left = [file for file in missing if not folder.has(file)]
    names = ", ".join(file.name for file in left[:5]) + (" ..." if len(left) > 5 else "")
    rest = f"{len(left)} files of {sum(file.size for file in left):,} bytes are missing ({names}); run it again"
    if isinstance(error, OSError) and error.errno in FULL:
        raise UserError(f"{folder.path}: No space left on device{free_space(folder.path / 'x')}; {rest} with more room")
    if isinstance(error, UserError):
        raise UserError(*error.sentences, rest)
    raise error


def main(argv: list[str] | None = None) -> None:
    """Parse, list, download, check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo_id", required=True, help="owner/name")
    parser.add_argument("--local_dir", required=True, type=Path)
    parser.add_argument("--all", action="store_true", help="every file; the default")
    for group, patterns in GROUPS.items():
        parser.add_argument(f"--{group}", action="store_true", help=patterns.replace("%", "%%"))
    parser.add_argument("--source", choices=["huggingface", "modelscope"], default="huggingface")
    parser.add_argument("--revision", help="branch, tag or commit; default is the hub's main branch")
    parser.add_argument("--workers", type=int, default=8, help="files at a time")
    args = parser.parse_args(argv)
    if args.workers < 1:
        raise ConfigError(f"--workers is {args.workers}, but must be at least 1")
    groups = [] if args.all else [group for group in GROUPS if getattr(args, group)]
    source = {"huggingface": huggingface, "modelscope": modelscope}[args.source](
        args.repo_id, args.revision, args.local_dir
    )
    files = chosen(source.files, groups)
    if not files:
        raise ConfigError(f"{args.repo_id}: has no file for --{' --'.join(groups or ['all'])}")
    folder = Folder(args.local_dir)
    download(folder, source, files, args.workers)
    print(f"{args.local_dir} is complete: {len(files)} files, every one checked")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))

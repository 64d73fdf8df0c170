"""Corpora on an object store, which moto plays: in and out of the tools by s3:// addresses."""

import json

import numpy as np
import pytest
from helpers.tools import bytes_of, run_tool

from mindformers_ext.bin_dataset.blended_dataset import parse_blend
from mindformers_ext.bin_dataset.indexed_dataset import IndexedDatasetWriter, loss_mask_prefix

moto_server = pytest.importorskip("moto.server", reason="the test group has moto[server]")
s3fs = pytest.importorskip("s3fs")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A file system with a bucket, and the environment of a process that reaches it."""
    server = moto_server.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    environment = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {**environment, "AWS_ENDPOINT_URL": endpoint, "AWS_ENDPOINT_URL_S3": endpoint}.items():
            patch.setenv(key, value)
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("scratch")))
        files = s3fs.S3FileSystem()
        files.mkdir("s3://corpus")
        yield files
    server.stop()


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "parquet"])
def test_the_tools_read_and_write_addresses(suffix, store, texts, tokenizer_file, tmp_path):
    import gzip

    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    local = tmp_path / f"in.{suffix}"
    local.write_bytes(gzip.compress(lines) if suffix.endswith("gz") else lines)
    if suffix == "parquet":
        pq.write_table(pa.table({"text": texts}), local)
    store.put_file(str(local), f"s3://corpus/raw/{suffix}/in.{suffix}")
    common = ["--vocab-file", tokenizer_file, "--append-eod", "--partitions", 3]
    run_tool("jsonl_to_bin", "--input", local, "--output-prefix", tmp_path / "p", *common)
    prefix = f"s3://corpus/done/{suffix}/p"
    command = ["jsonl_to_bin", "--input", f"s3://corpus/raw/{suffix}/*.{suffix}", "--output-prefix", prefix, *common]
    run_tool(*command)
    for end in ("bin", "idx"):
        store.get_file(f"{prefix}_text_document.{end}", str(tmp_path / f"q.{end}"))
    assert bytes_of(tmp_path / "q") == bytes_of(tmp_path / "p_text_document")
    manifest = json.loads(store.cat_file(f"{prefix}_text_document.json"))
    source = {"path": f"s3://corpus/raw/{suffix}/in.{suffix}", "bytes": local.stat().st_size}
    assert manifest["sources"] == [source]
    before = store.info(f"{prefix}_text_document.bin")["LastModified"]
    assert "finished by an earlier run" in run_tool(*command).stderr
    assert store.info(f"{prefix}_text_document.bin")["LastModified"] == before


def test_parts_are_joined_from_and_to_addresses(store, corpus, tmp_path):
    lengths = [50, 0, 700, 3, 1200, 9]
    parts = [corpus(f"c.shard-{i}-of-3_text_document", lengths, seed=i) for i in range(3)]
    for prefix in parts:
        with IndexedDatasetWriter(loss_mask_prefix(prefix), np.uint8) as writer:
            for length in lengths:
                writer.add_document(np.arange(length) % 2)
    for path in tmp_path.glob("c.shard*"):
        store.put_file(str(path), f"s3://corpus/parts/{path.name}")
    pattern = "c.shard-*-of-3_text_document"
    for source in (tmp_path, "s3://corpus/parts"):
        for number, output in enumerate((tmp_path / "whole", "s3://corpus/joined/whole")):
            done = run_tool("merge_bin", "--input", f"{source}/{pattern}", "--output-prefix", output)
            assert "merged 3 datasets: 18 documents" in done.stdout
            if number:
                for path in store.ls("corpus/joined", refresh=True):
                    store.get_file(path, str(tmp_path / path.rsplit("/", 1)[1].replace("whole", "fetched")))
                    store.rm(path)
                for name in ("", "_loss_mask"):
                    assert bytes_of(tmp_path / f"fetched{name}") == bytes_of(tmp_path / f"whole{name}")
                assert json.loads((tmp_path / "fetched.json").read_text())["counts"]["sequences"] == 18
    assert bytes_of(tmp_path / "whole")[0] == b"".join(bytes_of(prefix)[0] for prefix in parts)
    blend = ["--input", f"s3://corpus/parts/{pattern}", "--output-prefix", "s3://corpus/joined/blend", "--blend"]
    run_tool("merge_bin", *blend)
    expected = [f"s3://corpus/parts/c.shard-{i}-of-3_text_document" for i in range(3)]
    assert parse_blend("s3://corpus/joined/blend.json") == (expected, None)


def test_a_part_that_changed_on_the_store_is_refused(store, corpus, tmp_path):
    prefix = corpus("d", [5, 6])
    record = {"files": {"d": {"bin": [{"bytes": 44, "sha256": "0" * 64}]}}}
    (tmp_path / "d.json").write_text(json.dumps(record))
    for suffix in ("bin", "idx", "json"):
        store.put_file(f"{prefix}.{suffix}", f"s3://corpus/changed/d.{suffix}")
    done = run_tool("merge_bin", "--input", "s3://corpus/changed/d", "--output-prefix", tmp_path / "e", check=False)
    assert done.returncode == 1 and "s3://corpus/changed/d.bin has sha256" in done.stderr


def test_training_samples_come_from_addresses_through_a_bounded_cache(store, corpus, tmp_path, monkeypatch):
    from mindformers_ext.bin_dataset import remote_tokens
    from mindformers_ext.bin_dataset.loader_config import LoaderConfig

    prefixes = [corpus(name, [50, 0, 700, 3, 1200, 9] * 4, seed=i) for i, name in enumerate("ab")]
    with IndexedDatasetWriter(f"{prefixes[0]}_loss_mask", np.uint8) as writer:
        for length in [50, 0, 700, 3, 1200, 9] * 4:
            writer.add_document(np.arange(length) % 2)
    for path in tmp_path.glob("[ab]*.[bi]??"):
        store.put_file(str(path), f"s3://corpus/train/{path.name}")
    monkeypatch.setattr(remote_tokens, "BLOCK", 4000)
    cache = remote_tokens.BlockCache(4)
    monkeypatch.setattr(remote_tokens, "block_cache", lambda: cache)
    fetched = []
    fetch = remote_tokens._fetch
    monkeypatch.setattr(remote_tokens, "_fetch", lambda *args: fetched.append(args) or fetch(*args))

    def build(paths, folders):
        config = {"seq_length": 64, "data_path": ["3", paths[0], "1", paths[1]], "split": "9,1", **folders}
        return LoaderConfig.of("GPTDataset", [250, 10, 0], config, False, "train").build()

    local = build(prefixes, {"path_to_cache": str(tmp_path / "cache")})
    addresses = [f"s3://corpus/train/{name}" for name in "ab"]
    far = build(addresses, {"s3_cache_path": str(tmp_path / "s3")})
    assert far.description == local.description and not fetched
    for start in range(0, len(local), 64):
        rows = np.arange(start, min(start + 64, len(local)))
        for name, column in local.batch(rows).items():
            np.testing.assert_array_equal(far.batch(rows)[name], column)
    assert len(fetched) > 4 and len(cache._blocks) <= 4
    assert len(list((tmp_path / "s3").glob("*.idx"))) == 3

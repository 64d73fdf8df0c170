"""Corpora on an object store, which moto plays: in and out of the tools by s3:// addresses."""

import json

import pytest
from helpers.tools import bytes_of, run_tool

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

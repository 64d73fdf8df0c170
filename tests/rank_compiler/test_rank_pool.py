"""Child processes that are killed, refuse, hang or crash: each is named in the report, and the others go on."""

from pathlib import Path

from mindformers_ext.config.run import read_run
from mindformers_ext.dryrun.cost_model import estimate
from mindformers_ext.dryrun.device_profile import load_profile
from mindformers_ext.dryrun.report import DOES_NOT_FIT, FITS, TOOL_FAILURE, exit_code, make_report
from mindformers_ext.dryrun.terminal_report import render
from mindformers_ext.rank_compiler.rank_pool import COMPILED, KILLED, REFUSED, TIMED_OUT, RankJobs, compile_ranks
from mindformers_ext.rank_compiler.stand_in_cann import COMPILE

TESTS = Path(__file__).parents[1]
CLUSTER = TESTS / "helpers" / "runs" / "cluster_671b.yaml"
PRINT_MEMORY = "print('Actual peak memory usage (with fragments): 1024M')"
CHILDREN = {
    0: f"import json; json.dump({{}}, open('compiled.json', 'w')); {PRINT_MEMORY}",
    64: "import os; os.kill(os.getpid(), 9)",
    128: (
        "import json, sys; print('[ERROR] PARALLEL(1,7f,python):2026 [a.cc:1] Check] MatMul: 3 does not divide 64');"
        "json.dump({'exception': 'RuntimeError', 'message': 'MatMul init failed\\nstack', "
        "'source_lines': ['model.py:25']}, open('failure.json', 'w')); sys.exit(1)"
    ),
    192: "import time; time.sleep(60)",
    256: "print('last words'); raise SystemExit(3)",
    320: (
        "import json; json.dump({'exception': 'MemoryError', 'message': '', 'source_lines': []},"
        "open('failure.json', 'w'))"
    ),
}


def run_children(out: Path, ranks: list[int]) -> list:
    jobs = RankJobs(
        module="helpers.rank_code",
        arguments=lambda folder: [CHILDREN[int(folder.name.removeprefix("rank_"))]],
        python_path=(str(TESTS),),
        world_size=1024,
        devices_per_stage=64,
        out=out,
        level=COMPILE,
        timeout_seconds=5,
    )
    return compile_ranks(jobs, ranks, workers=3)


def test_every_failure_is_named_and_the_others_go_on(tmp_path):
    results = run_children(tmp_path, list(CHILDREN))
    assert [r.status for r in results] == [COMPILED, KILLED, REFUSED, TIMED_OUT, KILLED, KILLED]
    assert [r.stage for r in results] == [0, 1, 2, 3, 4, 5]
    good, killed, refused, hung, crashed, starved = results
    assert starved.message == "MemoryError: ; the machine may be out of memory: use fewer --jobs"
    assert good.memory == {"actual_peak_bytes": 1024 * 2**20}
    assert "SIGKILL" in killed.message and "out of memory" in killed.message
    assert refused.message == "RuntimeError: MatMul init failed"
    assert refused.compiler_errors == ["MatMul: 3 does not divide 64"]
    assert "no result after 5 s" in hung.message
    assert "code 3" in crashed.message and "last words" in Path(crashed.log).read_text()


def test_the_report_names_rank_stage_line_and_log(tmp_path):
    results = run_children(tmp_path, [64, 128])
    report = make_report(read_run(CLUSTER, 1024), load_profile(), [], None, results)
    text = render(report)
    assert report["exit_code"] == TOOL_FAILURE
    assert "rank 64 (stage 1, layers 3-6) killed" in text
    assert "rank 128 (stage 2, layers 7-10) refused: RuntimeError: MatMul init failed\n  at model.py:25" in text
    assert str(tmp_path / "rank_128" / "log.txt") in text


def test_exit_codes(tmp_path):
    fitting, refused = run_children(tmp_path, [0, 128])
    assert exit_code([], None, [fitting], limit=2**31) == FITS
    assert exit_code([], None, [fitting], limit=2**29) == DOES_NOT_FIT
    cost = estimate(read_run(CLUSTER, 1024), load_profile())
    assert exit_code([], cost, [fitting], limit=2**31) == DOES_NOT_FIT, "the estimate speaks for the other stages"
    assert exit_code([], None, [refused], limit=2**31) == DOES_NOT_FIT
    assert exit_code(["a violation"], None, [], limit=2**31) == DOES_NOT_FIT


def test_a_compiler_that_cannot_start_is_told_for_every_rank(tmp_path):
    jobs = RankJobs("no_such_module", lambda folder: [], 4, 2, tmp_path, COMPILE)
    results = compile_ranks(jobs, [0, 3], workers=2)
    assert [(r.rank, r.stage, r.status) for r in results] == [(0, 0, KILLED), (3, 1, KILLED)]
    assert all("No module named 'no_such_module'" in r.message for r in results)

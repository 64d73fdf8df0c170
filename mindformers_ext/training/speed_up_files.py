"""MindFormers' context without the files that it leaves in the temporary folder. Importing this module mends it.

Extends mindformers.core.context.build_context (1.9.0): whenever dataset_broadcast_opt_level is set, it hands the number
to MindSpore in a new file parallel_speed_up_*.json, which MindSpore reads at once and nobody deletes.
"""

from pathlib import Path

from mindformers.core.context.build_context import _MSContextApplier

_write, _apply = _MSContextApplier._write_speed_up_temp_file, _MSContextApplier._apply_set_context_remaining
_written: list[Path] = []


def _write_and_note(level: int) -> str:
    path = _write(level)
    _written.append(Path(path))
    return path


def _apply_and_delete(self, params) -> None:
    try:
        _apply(self, params)
    finally:
        while _written:
            _written.pop().unlink(missing_ok=True)


_MSContextApplier._write_speed_up_temp_file = staticmethod(_write_and_note)
_MSContextApplier._apply_set_context_remaining = _apply_and_delete

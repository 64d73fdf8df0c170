"""Compile what a YAML trains, as one rank: run_mindformer.py's own path, stopped where training would begin.

    python -m mindformers_ext.dryrun.compile_run --out DIR --samples N --config Y [run_mindformer's other arguments]

Extends: run_mindformer.py and `mindspore.train.Model.train` (2.9.0), in this child process only. Model, wrapper,
optimizer and dataset strategy are built as in training; only the samples are stand-ins (a compiler reads shapes, not
tokens), and `Model.train` compiles its network instead of running it. Results as in `compile_rank`.
"""

import argparse
import os
import sys
from pathlib import Path

from mindformers_ext.dryrun.compile_rank import compile_cell, guarded
from mindformers_ext.yaml_config import load_yaml, lookup

# What a dry run does not need: data files, checkpoints, reports of steps that never run.
WITHOUT = {
    "use_parallel": "True",
    "load_checkpoint": "",
    "resume_training": "False",
    "processor": "null",
    "callbacks": "[]",
    "context.device_target": "Ascend",
    "train_dataset.num_parallel_workers": "1",
}


def main(argv: list[str] | None = None) -> int:
    """Compile the run; 0 when compiled, 1 when the YAML, the model or the compiler failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="folder for the results")
    parser.add_argument("--samples", required=True, type=int, help="stand-in samples: those of one step")
    options, arguments = parser.parse_known_args(argv)
    return guarded(options.out, lambda: compile_run(arguments, options.samples, options.out))


def compile_run(arguments: list[str], samples: int, out: Path) -> None:
    """Run `run_mindformer.py arguments` up to the compiled training graph."""
    import mindspore as ms

    import run_mindformer

    out = out.resolve()
    settings = WITHOUT | {"output_dir": str(out / "output"), "train_dataset.data_loader.sizes": f"[{samples}, 0, 0]"}
    arguments = arguments + [text for key, value in settings.items() for text in (f"--{key}", value)]
    options, _ = run_mindformer.build_parser().parse_known_args(arguments)
    arguments += _absolute_paths(run_mindformer.find(options.config))
    run_mindformer.prepare_environment(options.register_path, options.output_dir)  # before MindFormers is imported
    ms.train.Model.train = _compiling_train(out)
    _stand_in_data()
    run_mindformer.run(arguments)


def _absolute_paths(config: Path) -> list[str]:
    """Overrides for paths in the YAML that are relative to the project: this process has a folder of its own."""
    key = "context.ascend_config.parallel_speed_up_json_path"
    given = lookup(load_yaml(config), key)
    if given is None or Path(given).is_absolute():
        return []
    return [f"--{key}", str(Path(__file__).resolve().parents[2] / given)]


def _stand_in_data() -> None:
    """Rows of ones in place of the YAML's files: what a rank gets that receives its samples by broadcast."""
    from mindformers_ext import run_modes
    from mindformers_ext.data import megatron_dataloader

    run_modes.check_data = lambda *_: None
    megatron_dataloader._reads_data = lambda: False


def _compiling_train(out: Path):
    """A `Model.train` that compiles the training network on the first batch's shapes."""

    def train(self, epoch, train_dataset, *_, **__):
        import mindspore as ms

        network = self._train_network
        network.set_train()
        batch = next(train_dataset.create_tuple_iterator(num_epochs=1, output_numpy=True))
        inputs = tuple(ms.Tensor(column) for column in batch)
        compile_cell(network, inputs, out)
        if int(os.environ["MS_SIMULATION_LEVEL"]) >= 1:
            network(*inputs)  # the memory plan is made, and printed at exit, when the graph is launched

    return train


if __name__ == "__main__":
    sys.exit(main())

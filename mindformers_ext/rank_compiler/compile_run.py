"""Compile what a YAML trains, as one rank: run_mindformer.py's own path, stopped where training would begin.

    python -m mindformers_ext.rank_compiler.compile_run --out DIR [--samples N] --config Y [run_mindformer's others]

Extends: run_mindformer.py and `mindspore.train.Model.train` (2.9.0), in this child process only. Model, wrapper,
optimizer and dataset strategy are built as in training; only the samples are stand-ins (a compiler reads shapes, not
tokens), and `Model.train` compiles its network instead of running it. Results as in `compile_rank`.
"""

import argparse
import os
import sys
from pathlib import Path

from mindformers_ext.config.command_line import all_overrides, build_parser, find
from mindformers_ext.config.run import Run, read_run
from mindformers_ext.rank_compiler.compile_rank import add_rewrite, compile_cell, guarded, launch
from mindformers_ext.training.start import prepare_environment, run

# What a run that stops before training does not need: data files, checkpoints, reports of steps that never run.
WITHOUT = {
    "run_mode": "train",
    "load_checkpoint": "",
    "resume_training": "False",
    "do_eval": "False",
    "processor": "null",
    "callbacks": '[{"type": "TopkBiasBalanceCallback"}]',  # never called: a model whose bias balances asks for it
    "train_dataset.num_parallel_workers": "1",
}


def main(argv: list[str] | None = None) -> int:
    """Compile the run; 0 when compiled, 1 when the YAML, the model or the compiler failed."""
    options, arguments = _parse(argv)
    arguments += ["--use_parallel", "True", "--device_target", "Ascend"]
    return guarded(options.out, lambda: compile_run(arguments, options))


def _parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="folder for the results")
    parser.add_argument("--samples", type=int, help="stand-in samples, in place of train_dataset.data_loader.sizes")
    parser.add_argument("--whole_model", action="store_true", help="keep the layers of other pipeline stages")
    add_rewrite(parser)
    return parser.parse_known_args(argv)


def preload(argv: list[str]) -> None:
    """Import what `main(argv)` will. MindFormers' own log files are those of the first rank."""
    options, _ = build_parser().parse_known_args(argv)
    prepare_environment(options.register_path, os.path.join(_parse(argv)[0].out, "output"))
    from mindformers_ext.training import run_modes  # noqa: F401


def compile_run(arguments: list[str], options: argparse.Namespace) -> None:
    """Run `run_mindformer.py arguments` up to the compiled training graph."""
    import mindspore as ms

    def compile_network(network, train_dataset) -> None:
        network.set_train()
        batch = next(train_dataset.create_tuple_iterator(num_epochs=1, output_numpy=True))
        inputs = tuple(ms.Tensor(column) for column in batch)
        compile_cell(network, inputs, options.out, rewrite=options.rewrite)
        launch(network, inputs)

    arguments = prepare(arguments, options.samples, options.out.resolve())
    if not options.whole_model:
        only_own_stage()
    ms.train.Model.train = lambda self, epoch, train_dataset, *_, **__: compile_network(
        self._train_network, train_dataset
    )
    _stand_in_data()
    run(arguments)


def only_own_stage() -> None:
    """Let the Trainer of this process build only the layers of the rank's pipeline stage.

    Extends mindformers.trainer.base_trainer.BaseTrainer (1.9.0): the moment between the model and its optimizer.
    """
    from mindformers.trainer.base_trainer import BaseTrainer

    from mindformers_ext.rank_compiler.other_stages import leave_out_other_stages
    from mindformers_ext.training.wrapper import real_model

    build_wrapper = BaseTrainer.wrap_network_with_tool_cells

    def wrap(self, network):
        stages = self.config.parallel_config.pipeline_stage
        if stages > 1:
            devices, rank = int(os.environ["RANK_SIZE"]), int(os.environ["RANK_ID"])
            leave_out_other_stages(real_model(network), rank // (devices // stages))
        return build_wrapper(self, network)

    BaseTrainer.wrap_network_with_tool_cells = wrap


def prepare(arguments: list[str], samples: int | None, out: Path) -> list[str]:
    """Arguments of a run that needs no data and reports nothing; prepares the environment that MindFormers reads."""
    from mindformers.tools.hub.hub import HubConstants

    # MindFormers copies the model's files there, and the ranks share what this was when it was imported.
    HubConstants.OM_MODULES_CACHE = str(out / "output" / "log" / "modules")
    settings = WITHOUT | {"output_dir": str(out / "output")}
    if samples is not None:
        settings["train_dataset.data_loader.sizes"] = f"[{samples}, 0, 0]"
    arguments = arguments + [text for key, value in settings.items() for text in (f"--{key}", value)]
    options, rest = build_parser().parse_known_args(arguments)
    prepare_environment(options.register_path, options.output_dir)
    return arguments + _absolute_paths(read_run(find(options.config), overrides=all_overrides(options, rest)))


def _absolute_paths(asked: Run) -> list[str]:
    """Overrides for paths that are relative to the project: this process has a folder of its own."""
    key = "context.ascend_config.parallel_speed_up_json_path"
    ascend = asked.sections.context.ascend_config
    given = ascend and ascend.parallel_speed_up_json_path
    if given is None or Path(given).is_absolute():
        return []
    return [f"--{key}", str(Path(__file__).resolve().parents[2] / given)]


def _stand_in_data() -> None:
    """Rows of ones in place of the YAML's files: what a rank gets that receives its samples by broadcast."""
    from mindformers_ext.config import data_check
    from mindformers_ext.data import megatron_dataloader

    data_check.check_data = lambda *_: None
    megatron_dataloader._reads_data = lambda: False


if __name__ == "__main__":
    sys.exit(main())

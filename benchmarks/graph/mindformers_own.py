"""Compile what a YAML of MindFormers' own trains, as one rank: its Trainer, stopped where training would begin.

    python -m benchmarks.graph.mindformers_own --out DIR --config YAML --overrides '{"runner_config.batch_size": 1}'

Extends: mindformers.trainer (1.9.0), in this child process only. Model, wrapper and optimizer are MindFormers'; only
the samples are stand-ins. Results as in `mindformers_ext.rank_compiler.compile_rank`.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np

from mindformers_ext.config.yaml_files import load_yaml
from mindformers_ext.rank_compiler.compile_rank import compile_cell, guarded, launch

COLUMNS = ("input_ids", "labels", "loss_mask", "position_ids")


def main(argv: list[str] | None = None) -> int:
    """Compile the run; 0 when compiled, 1 when MindFormers or the compiler failed."""
    options = _parse(argv)
    return guarded(options.out, lambda: compile_own(options))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="folder for the results")
    parser.add_argument("--config", required=True, type=Path, help="a YAML of MindFormers'")
    parser.add_argument("--overrides", default={}, type=json.loads, help='{"section.key": value}, JSON')
    return parser.parse_args(argv)


def preload(argv: list[str]) -> None:
    """Import what `main(argv)` will."""
    os.environ.setdefault("LOG_MF_PATH", str(_parse(argv).out / "output" / "log"))
    from mindformers import Trainer  # noqa: F401


def compile_own(options: argparse.Namespace) -> None:
    """MindFormers' own path from a YAML to the training network, which is compiled in place of being trained."""
    import mindspore as ms
    from mindformers.core.context import build_context
    from mindformers.tools.register import MindFormerConfig
    from mindformers.tools.register.template import ConfigTemplate
    from mindformers.trainer import Trainer
    from mindformers.trainer.base_trainer import BaseTrainer

    values = load_yaml(options.config)
    for key, value in options.overrides.items():
        *sections, last = key.split(".")
        section = values
        for name in sections:
            section = section.setdefault(name, {})
        section[last] = value
    values["output_dir"] = str(options.out.resolve() / "output")
    values["callbacks"] = []
    ConfigTemplate.apply_template(values)
    config = MindFormerConfig(**values)

    def stand_in_data(self, default_args=None):
        self._reset_dataset_batch_size()
        rows = np.ones((self.config.train_dataset.batch_size, config.model.model_config.seq_length), np.int32)
        row = tuple(rows.astype(np.float32) if name == "loss_mask" else rows for name in COLUMNS)
        return ms.dataset.GeneratorDataset([row] * 8, list(COLUMNS), shuffle=False)

    def compile_network(model, epoch, train_dataset, *_, **__):
        network = model._train_network
        network.set_train()
        batch = next(train_dataset.create_tuple_iterator(num_epochs=1, output_numpy=True))
        inputs = tuple(ms.Tensor(column) for column in batch)
        compile_cell(network, inputs, options.out)
        launch(network, inputs)

    BaseTrainer.create_train_dataset = stand_in_data
    ms.train.Model.train = compile_network
    build_context(config)
    Trainer(config).train()


if __name__ == "__main__":
    sys.exit(main())

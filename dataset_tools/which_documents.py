"""Print which documents a step of a training reads: file, document and tokens of every sample, from the index alone.

    python dataset_tools/which_documents.py --step 12 \
        --config research/deepseek3/deepseek3_tiny/pretrain_deepseek3_tiny.yaml

The steps are those of a training from its start with this YAML; with --load_checkpoint, of one that goes on from it.
--devices says how many each train the whole model, where parallel_config.data_parallel does not (parallel_mode 0).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mindformers_ext.bin_dataset.sample_order import LeftOut, Place, passages, samples_of_step
from mindformers_ext.config.command_line import all_overrides, build_parser, find
from mindformers_ext.config.data_check import read_loader
from mindformers_ext.config.recipe import phase_after, phases, samples_per_step
from mindformers_ext.config.run import Run, read_run
from mindformers_ext.errors import ConfigError, exit_code_of
from mindformers_ext.sharded_checkpoint.reader import Checkpoint, open_source


def beginning(run: Run) -> Place:
    """Where the checkpoint stands that the run goes on from."""
    if not run.sections.load_checkpoint:
        return Place()
    source = open_source(run.sections.load_checkpoint)
    if not isinstance(source, Checkpoint):
        raise ConfigError(f"{run.sections.load_checkpoint} holds weights only, and no place in the data")
    return Place(source.meta.step, source.meta.epoch, source.meta.consumed_samples)


def report(arguments: list[str]) -> None:
    """Parse the command line and print the documents."""
    parser = build_parser(__doc__)
    parser.add_argument("--step", type=int, required=True, help="counted from 1")
    parser.add_argument("--devices", type=int, help="of data-parallel mode")
    options, rest = parser.parse_known_args(arguments)
    run = read_run(find(options.config), options.devices, all_overrides(options, rest))
    if run.sections.train_dataset is None or run.sections.train_dataset.megatron is None:
        raise ConfigError(f"{run.path}: train_dataset has no Megatron files; other data has no index to look into")
    asked, after = read_loader(run, "train_dataset"), beginning(run)
    try:
        dataset = asked.build()
        left_out = LeftOut(run.value("train_dataset.data_loader.leave_out") or (), asked.size_of(len(dataset)))
        whole = run.value("train_dataset.drop_remainder") is not False
        skipped = 0 if after.step else run.sections.data_skip_steps or 0
        phase, _ = phase_after(phases(run), max(options.step - 1, 0))
        if phase.step > after.step:  # its batch begins where those before have ended
            after = Place(phase.step, 0, left_out.place_after(phase.tokens // run.model.seq_length))
        samples = samples_of_step(left_out, samples_per_step(run, phase), options.step, skipped, after, whole)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{run.path}: train_dataset.data_loader: {error}") from None
    for sample in samples.tolist():
        for passage in passages(dataset, sample):
            print(f"sample {sample}: {passage}")


if __name__ == "__main__":
    sys.exit(exit_code_of(lambda: report(sys.argv[1:])))

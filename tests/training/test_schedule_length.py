"""A schedule that counts the run's steps counts those of left-out samples too, with and without sinking."""

from types import SimpleNamespace

import pytest
from mindformers.tools.register import MindFormerConfig

from mindformers_ext.bin_dataset.sample_order import LeftOut
from mindformers_ext.training.resuming_trainer import ResumingTrainer


class Source:
    """Of 40 samples 8 are left out."""

    left_out = LeftOut([[4, 12]], 40)

    def __len__(self) -> int:
        return self.left_out.kept


@pytest.mark.parametrize("sink_mode", [False, True])
def test_left_out_samples_count(sink_mode: bool) -> None:
    trainer = ResumingTrainer.__new__(ResumingTrainer)
    # As MindFormers leaves it: two passes of 8 batches, in sink mode 16 epochs of one.
    epochs = {"epochs": 16, "sink_size": 1} if sink_mode else {"epochs": 2, "sink_size": -1}
    trainer.config = MindFormerConfig(runner_config={**epochs, "origin_epochs": 2, "sink_mode": sink_mode})
    trainer.train_dataset = SimpleNamespace(
        children=[], source=Source(), get_dataset_size=lambda: 8, get_batch_size=lambda: 4
    )
    schedule = MindFormerConfig(type="CosineWithWarmUpLR", learning_rate=1.0, warmup_steps=0, total_steps=-1)
    trainer.create_lr_scheduler(schedule)
    assert schedule.total_steps == 2 * 10

"""Everything of this package that a user's YAML can name, registered with MindFormers by importing it."""

import mindformers_ext.data
import mindformers_ext.training.adapter_monitor
import mindformers_ext.training.checkpoint_monitor
import mindformers_ext.training.lr_schedule
import mindformers_ext.training.metrics
import mindformers_ext.training.muon
import mindformers_ext.training.parallel_check
import mindformers_ext.training.resuming_trainer
import mindformers_ext.training.speed_up_files
import mindformers_ext.training.topk_bias_callback
import mindformers_ext.training.wrapper  # noqa: F401 (imported to register)

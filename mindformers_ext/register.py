"""Everything of this package that a YAML can name, registered with MindFormers by importing it."""

import mindformers_ext.adapter_monitor
import mindformers_ext.checkpoint_monitor
import mindformers_ext.cpu_parallel.check_callback
import mindformers_ext.cpu_parallel.lowered_step
import mindformers_ext.data
import mindformers_ext.lr_schedule
import mindformers_ext.resuming_trainer
import mindformers_ext.topk_bias_callback
import mindformers_ext.train_wrapper
import mindformers_ext.training_metrics  # noqa: F401 (imported to register)

"""MindFormers' command line for DeepSeek: train, finetune, eval or predict from one YAML.

    python run_mindformer.py --config research/deepseek3/deepseek3_tiny/pretrain_deepseek3_tiny.yaml \
        --register_path research/deepseek3 --runner_config.epochs 2

Any key of the YAML can be set as `--section.key value`. Bad input ends with one sentence and exit code 2.
"""

import sys

from mindformers_ext.errors import exit_code_of
from mindformers_ext.training.start import run

if __name__ == "__main__":
    sys.exit(exit_code_of(lambda: run(sys.argv[1:], __doc__)))

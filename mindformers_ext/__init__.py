"""What MindFormers 1.9.0 lacks to train DeepSeek-V3, one extension point a file."""

from mindformers_ext import later_imports

later_imports.install()

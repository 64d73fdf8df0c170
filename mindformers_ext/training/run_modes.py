"""What run_mindformer.py does once it has its configuration: train, finetune, eval, predict, score or compile.

Training goes through MindFormers' Trainer (1.9.0). Evaluation and prediction build the network the same way and run
their own short loops: upstream's need Ascend operators and metrics that know nothing of this model.
"""

import copy
import math
import os
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from mindformers.core.context import build_context
from mindformers.core.parallel_config import build_parallel_config
from mindformers.dataset import build_dataset
from mindformers.models import build_network
from mindformers.tools.logger import logger
from mindformers.tools.register import MindFormerConfig
from mindformers.tools.register.template import ConfigTemplate
from mindformers.tools.utils import get_real_rank
from mindformers.trainer import Trainer
from mindformers.utils.file_utils import set_output_path
from mindspore import nn
from mindspore.dataset import Dataset
from mindspore.train import Model
from tokenizers import Tokenizer
from tqdm import tqdm

import mindformers_ext.training.register  # noqa: F401 (registers our classes)
from mindformers_ext.collectives.rank_job import is_cpu_rank
from mindformers_ext.config.check import check_classes
from mindformers_ext.config.data_check import check_tokenizer
from mindformers_ext.config.model import MoeConfig
from mindformers_ext.config.one_process import as_rank
from mindformers_ext.config.run import Run
from mindformers_ext.config.sections import Context, MonitorConfig
from mindformers_ext.errors import ConfigError
from mindformers_ext.files import run_lock
from mindformers_ext.sharded_checkpoint.reader import Checkpoint, Source, open_source
from mindformers_ext.training import muon, scoring
from mindformers_ext.training.checkpoint_monitor import load_weights
from mindformers_ext.training.console import print_own_lines
from mindformers_ext.training.evaluation import EvaluationSet, forward_logits, loss_of, told
from mindformers_ext.training.pretrained import HuggingFaceFolder, is_huggingface, resolve
from mindformers_ext.training.text_generation import generate, pick_token

# Keys of the YAML that MindFormers must not see: its own way of doing it is another, or it does not know them.
OWN_KEYS = ("do_eval", "eval_step_interval", "use_graceful_exit", "data_skip_steps", "max_train_hours")
OWN_KEYS += ("max_step_minutes", "recipe", "check_for_nan_in_loss_and_grad")
AS_MINDFORMERS = {"compile": "train", "score": "predict"}  # run modes that it does not know
# Keys of the context section that mean something on CPU; the others set up an NPU.
CPU_CONTEXT = ("mode", "device_target", "max_call_depth", "save_graphs", "save_graphs_path")


def run_mode(run: Run, predict_data: list[str] | None = None) -> None:
    """Check a run on this machine and do what its run_mode says.

    Raises:
        ConfigError: the run or what it points to cannot work.
        TrainingStopped: the loss is no longer finite.
    """
    every_message = print_own_lines()
    check_classes(run)
    evaluation = evaluation_of(run)
    if is_cpu_rank():  # its launcher has said where the logs are
        run = as_rank(run)
    else:
        mode = run.sections.run_mode
        logger.info("run_mode %s of %s; MindFormers' messages are in %s", mode, run.path, every_message)
    settings = mindformers_settings(run)
    settings.evaluation = evaluation
    set_output_path(settings.output_dir)
    build_context(settings)
    if run.trains:
        train(run, settings)
    elif run.sections.run_mode == "eval":
        evaluate(run, settings)
    elif run.sections.run_mode == "score":
        score(run, settings)
    else:
        predict(run, settings, predict_data)


def evaluation_of(run: Run) -> dict[str, Any] | None:
    """What a training evaluates and how often, None without do_eval.

    Raises:
        ConfigError: this run cannot, or its data has no batch.
    """
    if not run.trains or not run.sections.do_eval:
        return None
    if run.is_semi_auto and not is_cpu_rank():
        raise ConfigError(
            f"{run.path}: do_eval is True, but no device of a split graph holds the whole model; use --run_mode eval "
            "on its checkpoints"
        )
    return {"data": EvaluationSet.of(run), "every": run.sections.eval_step_interval}


def mindformers_settings(run: Run) -> MindFormerConfig:
    """The run as MindFormers reads it: its YAML, fitted to the device, over MindFormers' template."""
    values = copy.deepcopy(run.values)
    values["run_mode"] = AS_MINDFORMERS.get(run.sections.run_mode, run.sections.run_mode)
    if run.model is not None:
        # MindFormers' own MoEConfig knows only its keys and has other defaults: ours travel inside model_config.
        values["model"]["model_config"]["experts"] = asdict(run.model.moe_config)
        if run.sections.recipe and run.sections.recipe.mtp_loss_factor:
            values["model"]["model_config"]["moves_mtp_factor"] = True
    fit_to_device(run, values)
    take_over(run, values)
    ConfigTemplate.apply_template(values)
    if run.trains:
        listed = [item["type"] for item in run.values.get("callbacks", [])]
        drop_second_monitor(values, listed)
    return MindFormerConfig(**values)


def take_over(run: Run, values: dict[str, Any]) -> None:
    """Take out OWN_KEYS, name our Muon, and give MindFormers' step the gradient norm's limit that it begins with."""
    if run.trains and run.sections.optimizer.type == "Muon":
        values["optimizer"]["type"] = muon.REGISTERED
    for key in OWN_KEYS:
        values.pop(key, None)
    for section, own in (("moe_config", MoeConfig.own), ("context", Context.own)):
        for key in own:
            (values.get(section) or {}).pop(key, None)
    monitor = values.setdefault("monitor_config", {}) if run.sections.use_skip_data_by_global_norm else {}
    for key in MonitorConfig.own:
        monitor.pop(key, None)
    monitor["global_norm_spike_threshold"] = float(monitor.get("global_norm_spike_threshold") or math.inf)


def fit_to_device(run: Run, values: dict[str, Any]) -> None:
    """Leave out what only an NPU has when the run is on CPU, and accumulate gradients in our own step."""
    runner = values.setdefault("runner_config", {})
    steps = run.sections.runner_config.gradient_accumulation_steps
    if run.trains and steps > 1 and not run.is_semi_auto:
        values["runner_wrapper"]["accumulation_steps"] = steps
        runner["batch_size"] = run.batch_size * steps
        runner["gradient_accumulation_steps"] = 1
    limit_workers(values)
    if "pipeline_config" in values.get("parallel", {}):  # MindSpore wants both keys
        values["parallel"]["pipeline_config"] = asdict(run.sections.parallel.pipeline_config)
    if not run.on_cpu:
        return
    context = values["context"]
    dropped = sorted(set(context) - set(CPU_CONTEXT))
    if dropped:
        logger.info("on CPU these keys of the context section have no effect: %s", ", ".join(dropped))
    values["context"] = {key: context[key] for key in context if key in CPU_CONTEXT} | {
        "dataset_broadcast_opt_level": 0
    }
    runner["sink_mode"] = False


def limit_workers(values: dict[str, Any]) -> None:
    """Read data with no more workers than the machine has cores, which MindSpore refuses; large YAMLs ask for 8."""
    cores = os.cpu_count() or 1
    for data in filter(None, (values.get("train_dataset"), values.get("eval_dataset"))):
        if data.get("num_parallel_workers", 1) > cores:
            logger.info("num_parallel_workers: %d in place of %d, the cores here", cores, data["num_parallel_workers"])
            data["num_parallel_workers"] = cores


def drop_second_monitor(config: dict, listed: list[str]) -> None:
    """Take out the MFLossMonitor that MindFormers adds to every run when TrainingMetrics already reports the steps."""
    if "TrainingMetrics" in listed and "MFLossMonitor" not in listed:
        config["callbacks"] = [item for item in config["callbacks"] if item["type"] != "MFLossMonitor"]


def train(run: Run, settings: MindFormerConfig) -> None:
    """Train or fine-tune through MindFormers' Trainer, which is told of no checkpoint: ours loads it itself."""
    if not is_cpu_rank() and get_real_rank() == 0:  # the ranks on CPU have a launcher that holds it for them
        run_lock.hold(settings.output_dir)
    source = find_checkpoint(run) if settings.load_checkpoint or settings.resume_training else None
    skipped = run.sections.data_skip_steps or 0
    settings.start_from = {"source": source, "resume": bool(settings.resume_training), "skip_steps": skipped}
    settings.guards, settings.run = run.sections, run
    settings.load_checkpoint, settings.resume_training = "", False
    if run.only_compiles:
        Model.train = compile_only
    Trainer(settings).train()


def compile_only(
    model: Model, epoch: int, train_dataset: Dataset, *_, dataset_sink_mode: bool = False, sink_size: int = -1, **__
) -> None:
    """Stands in for mindspore.train.Model.train (2.9.0): ends where the first step would run."""
    if dataset_sink_mode:
        model.build(train_dataset, sink_size=sink_size, epoch=epoch)
    else:
        network = model.train_network.set_train()
        network.compile(*next(train_dataset.create_tuple_iterator(num_epochs=1)))
    print("compiled; a run with run_mode train starts from MindSpore's compile cache", flush=True)


def find_checkpoint(run: Run) -> Source | HuggingFaceFolder:
    """Open the checkpoint that load_checkpoint and resume_training name.

    Raises:
        ConfigError: it does not exist, is damaged, or cannot be resumed.
    """
    path, location, resume = run.path, run.sections.load_checkpoint, run.sections.resume_training
    if location and is_huggingface(location):
        source = HuggingFaceFolder(Path(location), path)
    else:
        try:
            source = open_source(location, resume if isinstance(resume, str) else None)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
    if resume and not isinstance(source, Checkpoint):
        raise ConfigError(f"{path}: resume_training is {resume!r}, but {location} holds weights only; set it to False")
    return source


def build_model(run: Run, settings: MindFormerConfig) -> nn.Cell:
    """Build the network for inference and load `load_checkpoint` into it."""
    checkpoint = find_checkpoint(run)
    build_parallel_config(settings)
    network = build_network(
        settings.model,
        default_args={"parallel_config": settings.parallel_config, "moe_config": settings.moe_config},
    )
    network.set_train(False)
    load_weights(network, resolve(checkpoint, network))
    logger.info("loaded %s", checkpoint.path)
    return network


def evaluate(run: Run, settings: MindFormerConfig) -> dict[str, Any]:
    """Print and return the loss (nats per token) and the perplexity of eval_dataset."""
    network = build_model(run, settings)
    if run.sections.eval_dataset.megatron is not None:
        data = EvaluationSet.of(run)
        batches, total, sources = data.batches(), len(data.places) // data.batch, data.sources()
    else:
        settings.eval_dataset.batch_size = run.batch_size
        settings.eval_dataset_task.dataset_config = settings.eval_dataset
        dataset = build_dataset(settings.eval_dataset_task)
        batches, total, sources = dataset.create_dict_iterator(output_numpy=True), dataset.get_dataset_size(), {}
    result = loss_of(network, tqdm(batches, total=total, unit="batch"), sources)
    if not result:
        raise ConfigError(f"{run.path}: eval_dataset gives no full batch of {run.batch_size} samples")
    print("\n".join(told(result)))
    return result


def score(run: Run, settings: MindFormerConfig) -> Path:
    """Score the completions of the file that input_data names; returns OUTPUT_DIR/scores.jsonl, which it writes."""
    given = run.sections.input_data
    if run.model is None:
        raise ConfigError(f"{run.path}: model.model_config.type: run_mode score knows DeepSeek's models only")
    if not isinstance(given, str) or not Path(given).is_file():
        raise ConfigError(f"{run.path}: input_data is {given!r}, but run_mode score needs a JSONL file")
    rows, length = run.batch_size, run.model.seq_length
    lines = list(scoring.read_lines(Path(given), check_tokenizer(run), run.model.vocab_size, length))
    if not lines:
        raise ConfigError(f"{given}: has no line to score")
    network = build_model(run, settings)
    results = scoring.scores(partial(forward_logits, network), tqdm(lines, unit="line"), rows, length)
    output = Path(settings.output_dir) / "scores.jsonl"
    count, tokens, total = scoring.write_scores(results, output)
    print(
        f"wrote {output}: {count:,} completions, {tokens:,} tokens, mean log-probability {total / tokens:.4f} a token"
    )
    return output


def predict(run: Run, settings: MindFormerConfig, predict_data: list[str] | None) -> list[str]:
    """Print and return the continuation of every text of `predict_data`."""
    given = run.sections.input_data
    texts = predict_data or ([given] if isinstance(given, str) else given)
    if not texts:
        raise ConfigError(f"{run.path}: run_mode predict needs a text: give --predict_data 'some text' or input_data")
    tokenizer = check_tokenizer(run)
    if tokenizer is None:
        raise ConfigError(
            f"{run.path}: run_mode predict needs processor.tokenizer.tokenizer_file, a tokenizer.json or tiktoken's"
        )
    network = build_model(run, settings)
    return [continue_text(run, network, tokenizer, text) for text in texts]


def continue_text(run: Run, network: nn.Cell, tokenizer: Tokenizer, text: str) -> str:
    """Print and return one text with its continuation."""
    model = network.config
    prompt = tokenizer.encode(text).ids
    if not 0 < len(prompt) < model.seq_length:
        raise ConfigError(
            f"{run.path}: --predict_data has {len(prompt)} tokens, but must have 1 to model_config.seq_length - 1 = "
            f"{model.seq_length - 1}"
        )
    rng = np.random.default_rng(run.sections.seed) if model.do_sample else None
    tokens = generate(
        lambda ids: forward_logits(network, ids),
        prompt,
        model.seq_length,
        model.eos_token_id,
        model.max_decode_length,
        lambda logits: pick_token(
            logits[: tokenizer.get_vocab_size()], rng, model.temperature, model.top_k, model.top_p
        ),
    )
    answer = text + tokenizer.decode(tokens)
    print(answer, flush=True)
    return answer

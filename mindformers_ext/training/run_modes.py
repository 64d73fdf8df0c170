"""What run_mindformer.py does once it has its configuration: train, finetune, eval or predict.

Training goes through MindFormers' Trainer (1.9.0). Evaluation and prediction build the network the same way and run
their own short loops: upstream's need Ascend operators and metrics that know nothing of this model.
"""

import math
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
from mindformers.trainer import Trainer
from mindformers.utils.file_utils import set_output_path
from mindspore import Tensor, nn
from tokenizers import Tokenizer
from tqdm import tqdm

import mindformers_ext.training.register  # noqa: F401 (registers our classes)
from mindformers_ext.collectives.rank_job import is_cpu_rank
from mindformers_ext.config.check import check_config
from mindformers_ext.config.data_check import check_data, check_tokenizer
from mindformers_ext.config.one_process import as_rank
from mindformers_ext.config.yaml_files import is_semi_auto, lookup
from mindformers_ext.errors import ConfigError
from mindformers_ext.sharded_checkpoint.reader import Checkpoint, Source, open_source
from mindformers_ext.training.checkpoint_monitor import load_weights
from mindformers_ext.training.pretrained import HuggingFaceFolder, is_huggingface, resolve
from mindformers_ext.training.text_generation import generate, pick_token

# Keys of the context section that mean something on CPU; the others set up an NPU.
CPU_CONTEXT = ("mode", "device_target", "max_call_depth", "save_graphs", "save_graphs_path", "deterministic")


def run_mode(config: dict, path: str | Path, predict_data: list[str] | None = None) -> None:
    """Check the configuration read from `path` and do what its run_mode says.

    Raises:
        ConfigError: the configuration or what it points to cannot work.
        TrainingStopped: the loss is no longer finite.
    """
    config.setdefault("run_mode", "train")
    check_config(config, path)
    mode, callbacks = config["run_mode"], config.get("callbacks") or []
    if mode in ("train", "finetune"):
        check_data(config, "train_dataset", path)
    if is_cpu_rank():
        as_rank(config, path)
    fit_to_device(config)
    ConfigTemplate.apply_template(config)
    if mode in ("train", "finetune"):
        drop_second_monitor(config, listed=[item["type"] for item in callbacks])
    settings = MindFormerConfig(**config)
    set_output_path(settings.output_dir)
    build_context(settings)
    if mode in ("train", "finetune"):
        train(settings, path)
    elif mode == "eval":
        evaluate(settings, path)
    else:
        predict(settings, path, predict_data)


def fit_to_device(config: dict) -> None:
    """Leave out what only an NPU has when the run is on CPU, and accumulate gradients in our own step."""
    runner = config.setdefault("runner_config", {})
    steps = runner.get("gradient_accumulation_steps", 1)
    if steps > 1 and not is_semi_auto(config):
        wrapper = config.setdefault("runner_wrapper", {"type": "MFTrainOneStepCell"})
        wrapper["accumulation_steps"] = steps
        runner["batch_size"] = runner.get("batch_size", 1) * steps
        runner["gradient_accumulation_steps"] = 1
    if lookup(config, "context.device_target", "Ascend") != "CPU":
        return
    dropped = sorted(set(config["context"]) - set(CPU_CONTEXT))
    if dropped:
        logger.info("on CPU these keys of the context section have no effect: %s", ", ".join(dropped))
    config["context"] = {key: value for key, value in config["context"].items() if key in CPU_CONTEXT}
    config["context"]["dataset_broadcast_opt_level"] = 0
    runner["sink_mode"] = False


def drop_second_monitor(config: dict, listed: list[str]) -> None:
    """Take out the MFLossMonitor that MindFormers adds to every run when TrainingMetrics already reports the steps."""
    if "TrainingMetrics" in listed and "MFLossMonitor" not in listed:
        config["callbacks"] = [item for item in config["callbacks"] if item["type"] != "MFLossMonitor"]


def train(settings: MindFormerConfig, path: str | Path) -> None:
    """Train or fine-tune through MindFormers' Trainer, which is told of no checkpoint: ours loads it itself."""
    if settings.load_checkpoint or settings.resume_training:
        settings.start_from = {"source": find_checkpoint(settings, path), "resume": bool(settings.resume_training)}
    settings.load_checkpoint, settings.resume_training = "", False
    Trainer(settings).train()


def find_checkpoint(settings: MindFormerConfig, path: str | Path) -> Source | HuggingFaceFolder:
    """Open the checkpoint that load_checkpoint and resume_training name.

    Raises:
        ConfigError: it does not exist, is damaged, or cannot be resumed.
    """
    location, resume = settings.load_checkpoint, settings.resume_training
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


def build_model(settings: MindFormerConfig, path: str | Path) -> nn.Cell:
    """Build the network for inference and load `load_checkpoint` into it."""
    if settings.use_parallel:
        raise ConfigError(f"{path}: use_parallel is True, but run_mode {settings.run_mode!r} runs on one device")
    checkpoint = find_checkpoint(settings, path)
    build_parallel_config(settings)
    network = build_network(
        settings.model,
        default_args={"parallel_config": settings.parallel_config, "moe_config": settings.moe_config},
    )
    network.set_train(False)
    load_weights(network, resolve(checkpoint, network))
    logger.info("loaded %s", checkpoint.path)
    return network


def forward_logits(network: nn.Cell, tokens: np.ndarray) -> np.ndarray:
    """Logits (B, S, V) float32 of tokens (B, S)."""
    output = network(Tensor(tokens.astype(np.int32)))
    logits = output[0] if isinstance(output, tuple) else output
    return logits.asnumpy().astype(np.float32).reshape(*tokens.shape, -1)


def cross_entropy_sum(logits: np.ndarray, labels: np.ndarray, mask: np.ndarray) -> float:
    """Sum of -log p(label) in nats over the positions where mask (B, S) is 1."""
    shifted = logits - logits.max(-1, keepdims=True)
    log_z = np.log(np.exp(shifted, dtype=np.float64).sum(-1))
    chosen = np.take_along_axis(shifted, labels[..., None].astype(np.int64), -1)[..., 0]
    return float(((log_z - chosen) * mask).sum())


def evaluate(settings: MindFormerConfig, path: str | Path) -> dict[str, float]:
    """Print and return the loss (nats per token) and the perplexity of eval_dataset."""
    if lookup(settings, "eval_dataset.data_loader") is None or lookup(settings, "eval_dataset_task") is None:
        raise ConfigError(f"{path}: run_mode eval needs the sections eval_dataset and eval_dataset_task")
    check_data(settings, "eval_dataset", path)
    network = build_model(settings, path)
    settings.eval_dataset.batch_size = settings.runner_config.batch_size
    settings.eval_dataset_task.dataset_config = settings.eval_dataset
    dataset = build_dataset(settings.eval_dataset_task)
    total, count = 0.0, 0.0
    for batch in tqdm(dataset.create_dict_iterator(output_numpy=True), total=dataset.get_dataset_size(), unit="batch"):
        mask = batch.get("loss_mask", np.ones_like(batch["labels"])).astype(np.float64)
        total += cross_entropy_sum(forward_logits(network, batch["input_ids"]), batch["labels"], mask)
        count += float(mask.sum())
    if count == 0:
        raise ConfigError(f"{path}: eval_dataset gives no full batch of {settings.runner_config.batch_size} samples")
    result = {"loss": total / count, "perplexity": math.exp(total / count), "tokens": count}
    print(f"validation loss {result['loss']:.4f}, perplexity {result['perplexity']:.2f} over {count:,.0f} tokens")
    return result


def predict(settings: MindFormerConfig, path: str | Path, predict_data: list[str] | None) -> list[str]:
    """Print and return the continuation of every text of `predict_data`."""
    texts = predict_data or ([settings.input_data] if isinstance(settings.input_data, str) else settings.input_data)
    if not texts:
        raise ConfigError(f"{path}: run_mode predict needs a text: give --predict_data 'some text' or input_data")
    tokenizer = check_tokenizer(settings, path)
    if tokenizer is None:
        raise ConfigError(f"{path}: run_mode predict needs processor.tokenizer.tokenizer_file, a tokenizer.json")
    network = build_model(settings, path)
    return [continue_text(network, tokenizer, text, settings, path) for text in texts]


def continue_text(network: nn.Cell, tokenizer: Tokenizer, text: str, settings: Any, path: str | Path) -> str:
    """Print and return one text with its continuation."""
    model = network.config
    prompt = tokenizer.encode(text).ids
    if not 0 < len(prompt) < model.seq_length:
        raise ConfigError(
            f"{path}: --predict_data has {len(prompt)} tokens, but must have 1 to model_config.seq_length - 1 = "
            f"{model.seq_length - 1}"
        )
    rng = np.random.default_rng(settings.seed or 0) if model.do_sample else None
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

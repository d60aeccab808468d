"""A training run put together: data, first weights and what is measured on the way.

`gpt2_jax.training` knows neither generation nor evaluation; here it is handed both.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax import tokenizer
from gpt2_jax.config import GPT2Config
from gpt2_jax.data.batches import training_batches, validation_windows
from gpt2_jax.data.dataset import open_dataset
from gpt2_jax.errors import UserError
from gpt2_jax.evaluation.hellaswag import make_hellaswag
from gpt2_jax.evaluation.hellaswag_items import FIELDS, read_items
from gpt2_jax.files import read_text
from gpt2_jax.generation.decode import check_prompt, generate
from gpt2_jax.generation.sampling import Sampling
from gpt2_jax.lora import merged
from gpt2_jax.model import GPT2, AdaptedParams, Params
from gpt2_jax.sources import load_source
from gpt2_jax.training.checkpoint import Checkpoints
from gpt2_jax.training.config_files import from_json
from gpt2_jax.training.distributed import agree, is_primary
from gpt2_jax.training.loop import train
from gpt2_jax.training.mesh import Layout
from gpt2_jax.training.resume import fingerprint
from gpt2_jax.training.settings import SampleSettings, TrainSettings
from gpt2_jax.training.step import TrainState
from gpt2_jax.training.validation import Measure, Probe


def run(
    settings: TrainSettings, source: tuple[Params, GPT2Config] | None = None, **options: bool
) -> TrainState:
    """Opens everything the settings name and trains.

    Args:
      settings: the run.
      source: what `settings.init_from` names, where it is loaded already.
      **options: `resume`, `overwrite`, `allow_changes` and `profile` of `training.loop.train`.

    Returns:
      The last state.

    Raises:
      UserError: if data, weights or settings won't do, and as `train` does.
    """
    params = None
    if settings.init_from is not None:
        _check_apart(Path(settings.run_dir), Path(settings.init_from))
        settings, params = _start_from(settings, settings.init_from, source, **options)
    data = settings.data
    vocab_size = settings.model.vocab_size
    train_windows, held_out = open_dataset(data.path, data.sequence_length, vocab_size)
    fingerprints = {"data": train_windows.fingerprint()}
    if settings.lora is not None:
        assert params is not None
        fingerprints["base"] = fingerprint(params)
    return train(
        settings,
        training_batches(train_windows, data.batch_size, settings.seed),
        validation_windows(held_out, settings.validation.windows),
        probes=_probes(settings),
        initial_params=params if settings.lora is None else None,
        base=params if settings.lora is not None else None,
        fingerprints=fingerprints,
        **options,
    )


def _check_apart(run_dir: Path, source: Path) -> None:
    """Raises UserError if a run would write where the weights are that it starts from."""
    if source.exists() and run_dir.resolve() in (source.resolve(), *source.resolve().parents):
        raise UserError(
            f"run_dir {run_dir} holds the weights that the run is to start from, {source}; "
            f"give another --run_dir"
        )


def _start_from(
    settings: TrainSettings,
    name: str,
    source: tuple[Params, GPT2Config] | None,
    *,
    overwrite: bool = False,
    **_: bool,
) -> tuple[TrainSettings, Params | None]:
    """Weights from elsewhere, and the settings with their architecture.

    A run that has checkpoints needs the weights no more, unless it trains an adapter: they may be
    gone.
    """
    run_dir = Path(settings.run_dir)
    stored = run_dir / "config.json"
    begun = not overwrite and stored.exists() and bool(Checkpoints(run_dir).finished())
    params = None
    if source is not None:
        params, config = source
    elif agree(begun) and settings.lora is None:
        config = from_json(read_text(stored), str(stored)).model
    else:
        params, config = load_source(name)
    mine = settings.model
    config = dataclasses.replace(
        config,
        embd_pdrop=mine.embd_pdrop,
        attn_pdrop=mine.attn_pdrop,
        resid_pdrop=mine.resid_pdrop,
        pad_vocab_size_multiple=mine.pad_vocab_size_multiple,
    )
    try:
        settings = dataclasses.replace(settings, model=config)
    except UserError as error:
        raise UserError(f"--init_from {name}: {error}") from None
    if params is None:
        return settings, None
    if source is None and config != mine and is_primary():
        print(
            f"starting from {name}: {config.parameter_count:,} parameters in {config.n_layer} "
            f"layers, an architecture other than the config's",
            file=sys.stderr,
        )
    return settings, _pad_vocabulary(jax.device_get(params), config)


def _pad_vocabulary(params: Params, config: GPT2Config) -> Params:
    """The same parameters with the rows of padding that the config asks for."""
    padded = dict(params)
    for name in ("wte", "lm_head"):
        if name in params:
            table_VD = params[name]["embedding"][: config.vocab_size]
            padding = config.padded_vocab_size - config.vocab_size
            padded[name] = {"embedding": np.pad(table_VD, ((0, padding), (0, 0)))}
    return padded


def _probes(settings: TrainSettings) -> list[Probe]:
    """What the settings ask to measure beside the validation loss."""
    probes = []
    samples, hellaswag = settings.samples, settings.hellaswag
    if samples.every:
        _check_vocabulary(settings.model, "samples.every")
        prompt = tokenizer.encode(samples.prompt).tolist()
        check_prompt(prompt, settings.model)
        probes.append(
            Probe(
                "samples",
                samples.every,
                lambda model, layout: _make_samples(samples, prompt, settings.seed, model, layout),
            )
        )
    if hellaswag.every and agree(Path(hellaswag.path).exists()):
        _check_vocabulary(settings.model, "hellaswag.every")
        items = read_items(Path(hellaswag.path), hellaswag.items, fields=FIELDS["build-nanogpt"])

        def make(model: GPT2, layout: Layout) -> Measure:
            score = make_hellaswag(model, items, layout.rows, layout.put_rows, layout.replicated)

            def measure(params: Params | AdaptedParams) -> dict[str, Any]:
                result = score(params).score
                return {"hellaswag_acc": result.acc, "hellaswag_acc_norm": result.acc_norm}

            return measure

        probes.append(Probe("hellaswag_acc", hellaswag.every, make))
    return probes


def _check_vocabulary(config: GPT2Config, setting: str) -> None:
    if config.vocab_size < tokenizer.VOCAB_SIZE:
        raise UserError(
            f"{setting} needs GPT-2's {tokenizer.VOCAB_SIZE} tokens, but "
            f"model.vocab_size={config.vocab_size}; set {setting} to 0"
        )


def _make_samples(
    settings: SampleSettings, prompt: list[int], seed: int, model: GPT2, layout: Layout
) -> Measure:
    """Texts from a prompt, the same in all processes."""
    sampling = Sampling(top_k=50)
    # Each process writes them all by itself, on one device with a copy of the parameters.
    gather = jax.jit(_merged, out_shardings=layout.replicated)

    def measure(params: Params | AdaptedParams) -> dict[str, Any]:
        local = jax.tree.map(lambda leaf: leaf.addressable_data(0), gather(params))
        texts = generate(
            local,
            model.config,
            [prompt] * settings.count,
            max_new_tokens=settings.max_new_tokens,
            sampling=sampling,
            seed=seed,
            precision="bf16" if model.dtype == jnp.bfloat16 else "f32",
        )
        return {"samples": [tokenizer.decode(prompt + text) for text in texts]}

    return measure


def _merged(params: Params | AdaptedParams) -> Params:
    return merged(params) if isinstance(params, AdaptedParams) else params

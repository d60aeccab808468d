"""LoRA fine-tuning: the base stays what it was, and a run is a run like any other."""

import dataclasses
import functools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from doors import SCRIPTS, Door

from gpt2_jax import experiment
from gpt2_jax.config import GPT2Config
from gpt2_jax.errors import UserError
from gpt2_jax.finetuning import Adapter, describe, finetune
from gpt2_jax.interop.export import export_model
from gpt2_jax.interop.peft import load_adapter
from gpt2_jax.lora import adapt, init_lora, lora_shapes, merge
from gpt2_jax.lora_settings import TARGETS, LoraSettings
from gpt2_jax.model import GPT2, apply, init_params
from gpt2_jax.sources import load_source
from gpt2_jax.training.checkpoint import Checkpoints
from gpt2_jax.training.engine import make_engine
from gpt2_jax.training.mesh import make_layout
from gpt2_jax.training.metrics import read_metrics
from gpt2_jax.training.settings import (
    DataSettings,
    MeshSettings,
    OptimizerSettings,
    TrainSettings,
    ValidationSettings,
)
from gpt2_jax.training.step import batch_loss, eval_step

CONFIG = GPT2Config(n_positions=16, n_embd=8, n_layer=2, n_head=2)
WORDS = "the quick brown fox jumps over the lazy dog and runs away from it all "


@pytest.fixture(scope="module")
def base():
    return jax.device_get(init_params(CONFIG, jax.random.key(5)))


@pytest.fixture(scope="module")
def place(tmp_path_factory, base):
    """A Hugging Face directory of the base, and a text."""
    folder = tmp_path_factory.mktemp("place")
    export_model(folder / "base", base, CONFIG)
    (folder / "text.txt").write_text(WORDS * 60)
    return folder


@pytest.fixture
def settings(place, tmp_path):
    return TrainSettings(
        run_dir=str(tmp_path / "run"),
        steps=6,
        model=dataclasses.replace(CONFIG, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0),
        data=DataSettings(str(place / "text.txt"), 16, 8, 2),
        optimizer=OptimizerSettings(1e-2, 1e-3, warmup_steps=1, weight_decay=0.0),
        mesh=MeshSettings(data=1),
        validation=ValidationSettings(every=2, windows=4),
        init_from=str(place / "base"),
        lora=LoraSettings(TARGETS, rank=2, alpha=6.0, dropout=0.2),
        checkpoint_every=2,
        dtype="float32",
    )


def records(settings):
    """All records, but for the speed."""
    return [
        {name: value for name, value in record.items() if name != "tokens_per_second"}
        for record in read_metrics(Path(settings.run_dir) / "metrics.jsonl")
    ]


def losses(settings, name="val_loss"):
    return [record[name] for record in records(settings) if name in record]


@pytest.mark.slow
def test_only_the_adapter_is_trained_and_it_begins_as_the_base(settings, base):
    adapter = finetune(settings, (base, CONFIG))
    assert adapter is not None
    text = np.random.default_rng(0).integers(0, 50257, (2, 17))
    lora, found = load_adapter(adapter.directory, CONFIG)
    model = GPT2(CONFIG)
    plain_B, adapted_B = (
        eval_step(params, jnp.asarray(text), model=model)
        for params in (base, adapt(base, lora, found))
    )
    assert (plain_B != adapted_B).all()
    # What was trained and what lies in the optimizer's state has the adapter's shapes alone.
    state = experiment.run(dataclasses.replace(settings, run_dir=settings.run_dir + "2"))
    shapes = lora_shapes(CONFIG, settings.lora)
    assert jax.tree.map(jnp.shape, state.params) == jax.tree.map(lambda x: x.shape, shapes)
    moments = [leaf.shape for leaf in jax.tree.leaves(state.opt_state) if leaf.shape]
    assert sorted(moments) == sorted([leaf.shape for leaf in jax.tree.leaves(shapes)] * 2)
    # Whole or not, a base that is given and one that is loaded make the same run.
    assert records(settings) == records(
        dataclasses.replace(settings, run_dir=settings.run_dir + "2")
    )
    assert losses(settings)[0] > losses(settings)[-1]
    assert adapter.step == 6
    assert describe(adapter).startswith(f"validation loss {losses(settings)[-1]:.4f} (perplexity ")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_before_the_first_step_logits_are_the_bases_to_the_last_bit(settings, base, dtype):
    settings = dataclasses.replace(settings, dtype=dtype)
    engine = make_engine(settings, make_layout(settings), base)
    state = engine.first_state(jax.random.key(0))
    tokens_BT = jnp.arange(32).reshape(2, 16)
    forward = jax.jit(functools.partial(apply, engine.model))
    logits_BTV = forward(engine.complete(state.params), tokens_BT)
    np.testing.assert_array_equal(logits_BTV, forward(base, tokens_BT))


@pytest.mark.slow
def test_the_frozen_weights_stay_as_they_were(settings, base):
    engine = make_engine(settings, make_layout(settings), base)
    state = engine.first_state(jax.random.key(0))
    tokens_NBT = jnp.ones((4, 2, 17), jnp.int32)
    for _ in range(2):
        state, _ = engine.step(state, tokens_NBT, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, engine.frozen, base)


@pytest.mark.slow
def test_gradients_are_those_of_weights_that_the_adapter_was_merged_into(settings, base):
    settings = dataclasses.replace(settings, lora=dataclasses.replace(settings.lora, dropout=0.0))
    rng, key = np.random.default_rng(3), jax.random.key(1)
    lora = init_lora(CONFIG, settings.lora, key)
    lora = jax.tree.map(lambda x: x + rng.normal(0, 0.1, x.shape).astype(np.float32), lora)
    tokens_BT = jnp.asarray(rng.integers(0, 50257, (2, 17)))
    model = GPT2(settings.model)
    beside, merged = (
        jax.grad(
            lambda lora, put=put: batch_loss(
                put(base, lora, settings.lora), tokens_BT, key, model=model
            )
        )(lora)
        for put in (adapt, merge)
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), beside, merged)


def test_dropout_hides_inputs_from_the_adapter_alone(base):
    """Without A B there is nothing to hide; with it, masks differ from key to key."""
    settings = LoraSettings(TARGETS, rank=2)
    rng = np.random.default_rng(0)
    lora = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32),
        lora_shapes(CONFIG, settings),
    )
    config = dataclasses.replace(CONFIG, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    model = GPT2(config, lora_dropout=0.5)
    tokens_BT = jnp.arange(16)[None]

    def logits(lora, key=None):
        params = adapt(base, lora, settings).params, lora
        variables = dict(zip(("params", "lora"), params, strict=True))
        rngs = None if key is None else {"dropout": jax.random.key(key)}
        return model.apply(variables, tokens_BT, deterministic=key is None, rngs=rngs)

    zero = jax.tree.map(jnp.zeros_like, lora)
    np.testing.assert_array_equal(logits(zero, 1), logits(zero))
    assert jnp.abs(logits(lora, 1) - logits(lora, 2)).max() > 0.01
    np.testing.assert_array_equal(logits(lora, 1), logits(lora, 1))


@pytest.mark.slow
def test_devices_share_the_base_and_change_nothing(settings, base):
    settings = dataclasses.replace(settings, lora=dataclasses.replace(settings.lora, dropout=0.0))
    experiment.run(settings)
    mesh = MeshSettings(data=2, fsdp=2, tensor=2)
    many = dataclasses.replace(settings, mesh=mesh, run_dir=settings.run_dir + "-many")
    experiment.run(many)
    # float32 sums in another order.
    np.testing.assert_allclose(losses(many), losses(settings), rtol=1e-5)
    engine = make_engine(many, make_layout(many), base)
    kernel = engine.frozen["h_0"]["mlp"]["c_fc"]["kernel"]
    assert kernel.addressable_data(0).size == kernel.size // 4
    state = engine.first_state(jax.random.key(0))
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.params))


@pytest.mark.slow
def test_a_run_that_no_longer_improves_stops_and_stays_so(settings, base, capsys):
    optimizer = dataclasses.replace(settings.optimizer, learning_rate=0.0, final_learning_rate=0.0)
    settings = dataclasses.replace(
        settings,
        steps=50,
        optimizer=optimizer,
        validation=dataclasses.replace(settings.validation, patience=2),
    )
    adapter = finetune(settings, (base, CONFIG))
    said = capsys.readouterr().out
    assert "stopped early after 4 steps: the validation loss has not been below" in said
    assert adapter is not None
    assert "no better, so the adapter is of no use" in describe(adapter)
    before = records(settings)
    again = finetune(settings, (base, CONFIG))
    assert again == adapter
    assert records(settings) == before
    # More patience, and it goes on.
    patient = dataclasses.replace(settings.validation, patience=3)
    finetune(dataclasses.replace(settings, validation=patient), (base, CONFIG))
    assert records(settings)[-1]["step"] == 6


def test_the_adapter_is_the_best_one_not_the_last(settings, base, monkeypatch):
    monkeypatch.setattr(Checkpoints, "best", lambda _: 2)
    adapter = finetune(settings, (base, CONFIG))
    assert adapter is not None
    assert adapter.step == 2
    lora, found = load_adapter(adapter.directory, CONFIG)
    second, last = (
        Checkpoints(Path(settings.run_dir)).restore_params(lora_shapes(CONFIG, settings.lora), step)
        for step in (2, 6)
    )
    jax.tree.map(np.testing.assert_array_equal, lora, second)
    assert (
        lora["h_0"]["attn"]["c_attn"]["lora_b"] != last["h_0"]["attn"]["c_attn"]["lora_b"]
    ).any()
    assert dataclasses.replace(found, targets=TARGETS) == settings.lora


def test_another_base_is_noticed_when_a_run_goes_on(settings, base):
    experiment.run(settings)
    other = jax.tree.map(lambda x: np.copy(x), base)
    other["h_1"]["mlp"]["c_fc"]["bias"][0] += 1e-3
    for allow_changes in (False, True):
        with pytest.raises(UserError, match="the frozen weights have changed since checkpoint 6"):
            experiment.run(settings, (other, CONFIG), allow_changes=allow_changes)
    # The same weights may lie elsewhere.
    experiment.run(dataclasses.replace(settings, init_from="moved"), (base, CONFIG))


def test_a_run_never_replaces_the_weights_it_starts_from(settings, place, base):
    held = dataclasses.replace(settings, run_dir=str(place))
    for run_dir in (place, place / "base"):
        held = dataclasses.replace(settings, run_dir=str(run_dir))
        with pytest.raises(UserError, match=r"holds the weights that the run is to start from"):
            experiment.run(held, (base, CONFIG), overwrite=True)
    assert (place / "base" / "model.safetensors").exists()


def test_what_lies_beside_an_adapter_is_told_before_the_training(settings, base):
    adapter = Path(settings.run_dir) / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "README.md").write_text("mine")
    with pytest.raises(UserError, match=r"it holds README\.md; move it away"):
        finetune(settings, (base, CONFIG))
    assert not (adapter.parent / "metrics.jsonl").exists()


@pytest.mark.slow
def test_of_checkpoints_for_other_data_none_is_the_best(settings, base, tmp_path):
    finetune(settings, (base, CONFIG))
    (tmp_path / "numbers.txt").write_text("1 2 3 4 5 6 7 8 9 " * 99)
    other = dataclasses.replace(settings.data, path=str(tmp_path / "numbers.txt"))
    optimizer = dataclasses.replace(settings.optimizer, learning_rate=3.0)
    moved = dataclasses.replace(settings, data=other, steps=8, optimizer=optimizer)
    adapter = finetune(moved, (base, CONFIG), allow_changes=True)
    assert adapter is not None
    assert adapter.step == 8


def test_a_run_of_an_adapter_is_no_source(settings):
    experiment.run(settings)
    with pytest.raises(UserError, match=r"trained an adapter; give its base, \S+/base"):
        load_source(settings.run_dir)


def test_an_adapter_needs_weights_to_lie_beside(settings):
    with pytest.raises(UserError, match="lora needs init_from"):
        dataclasses.replace(settings, init_from=None)


def test_what_became_of_the_loss_is_told_as_evaluations_tell_it(tmp_path):
    told = describe(Adapter(tmp_path, 4, {0: 10.8184, 4: 3.0}, 0))
    assert told == (
        "validation loss 3.0000 (perplexity 20.0855) at step 4, the base's 10.8184 (49,931.13)"
    )


# The script.


def flags(place, run_dir, *more):
    return [
        *("--text", place / "text.txt", "--source", place / "base", "--run_dir", run_dir),
        *("--data.batch_size", 4, "--mesh.data", 1, "--validation.every", 8, "--steps", 64),
        *("--rank", 2, "--dropout", 0.1, "--optimizer.learning_rate", 0.01, *more),
    ]


@pytest.fixture
def door(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return Door(capsys)


@pytest.mark.slow
def test_from_a_text_to_an_adapter_that_generates_also_when_killed(door, place, tmp_path):
    """Killed with -9 in the middle, a run ends with the same adapter, bit for bit."""
    code, out, _ = door("finetune_lora", *flags(place, "still"))
    assert code == 0
    assert "training 128 parameters beside the 403,944 frozen ones of " in out
    assert "peft.PeftModel.from_pretrained" in out
    [advised] = [line for line in out.splitlines() if "scripts/generate.py" in line]
    python, script, *advised_flags = shlex.split(advised)
    assert (python, script) == ("python", "scripts/generate.py")
    assert advised_flags[:4] == ["--source", str(place / "base"), "--lora", "still/adapter"]
    code, text, err = door("generate", *advised_flags, "--max_new_tokens", 3)
    assert (code, text.startswith("Once"), err) == (0, True, "")
    command = [sys.executable, SCRIPTS / "finetune_lora.py", *flags(place, "killed")]
    with subprocess.Popen([*map(str, command)], cwd=tmp_path) as process:
        checkpoint = tmp_path / "killed" / "checkpoints" / "8" / "manifest.json"
        deadline = time.monotonic() + 120
        while not checkpoint.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    assert not (tmp_path / "killed" / "adapter").exists()
    code, out, _ = door("finetune_lora", *flags(place, "killed"))
    assert (code, "resuming after step " in out) == (0, True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        killed, still = (tmp_path / run / "adapter" / name for run in ("killed", "still"))
        assert killed.read_bytes() == still.read_bytes()
    runs = [
        [
            {name: value for name, value in record.items() if name != "tokens_per_second"}
            for record in read_metrics(tmp_path / run / "metrics.jsonl")
        ]
        for run in ("killed", "still")
    ]
    assert runs[0] == runs[1]
    stored = json.loads((tmp_path / "still" / "config.json").read_text())
    assert stored["lora"]["rank"] == 2


@pytest.mark.parametrize(
    ("more", "rule"),
    [
        (["--rank", 0], "rank=0 must be"),
        (["--alpha", 0], "alpha=0.0 must be a finite number above 0"),
        (["--dropout", 1], "dropout=1.0 must be in [0, 1)"),
        (["--targets", "attn.c_atn"], "target 'attn.c_atn' is no linear layer of the model"),
        (["--targets"], "targets is empty"),
        (
            ["--rank_pattern", "c_atn", 4],
            "rank_pattern names 'c_atn', which is none of the adapted",
        ),
        (["--data.sequence_length", 17], "data.sequence_length=17 is more than the context of"),
        (["--data.sequence_length", 0], "data.sequence_length=0 must be"),
        (["--data.batch_size", 999], "fewer than one batch of 999"),
        (["--data.batch_size", 4, "--data.micro_batch_size", 3], "not a multiple"),
        (["--steps", 0], "steps=0 must be"),
        (["--validation.patience", -1], "validation.patience=-1 must be"),
        (["--source", "nowhere"], "source 'nowhere' is no directory"),
        (["--text", "nowhere"], "text nowhere is no file"),
        (["--data", "."], "give --data DIR"),
        (["--model", "gpt2"], "--model gpt2 goes with --source pretrained"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_what_it_refuses(door, place, more, rule):
    assert rule in door.refuses("finetune_lora", *flags(place, "run", *more))
    assert not Path("run", "config.json").exists()


def test_a_text_too_short_for_a_window_is_told(door, place):
    Path("short.txt").write_text("Hello there.")
    line = door.refuses("finetune_lora", *flags(place, "run", "--text", "short.txt"))
    assert "the training data have no window of 17 tokens, only pieces of up to 3" in line

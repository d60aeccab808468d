"""A small GPT-2 on Python's own documentation: the five-minute proof that everything works."""

from gpt2_jax.config import GPT2Config
from gpt2_jax.training.settings import (
    DataSettings,
    OptimizerSettings,
    TrainSettings,
    ValidationSettings,
)

config = TrainSettings(
    run_dir="runs/demo",
    steps=300,
    model=GPT2Config(
        n_positions=128, n_embd=128, n_layer=4, n_head=4,
        embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
    ),
    data=DataSettings(
        path="pydoc_data.topics", sequence_length=128, batch_size=16, micro_batch_size=16
    ),
    optimizer=OptimizerSettings(
        learning_rate=3e-3, final_learning_rate=3e-4, warmup_steps=30
    ),
    validation=ValidationSettings(every=50, windows=64),
)

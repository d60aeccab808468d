"""gpt2-xl, 1558M parameters (1600 wide, 48 layers, 25 heads), on 10 billion FineWeb-Edu tokens.

    python scripts/prepare_fineweb.py
    python scripts/train.py --config configs/1558m.py

The recipe of configs/124m.py with the learning rate and the batch, 1M tokens, that the GPT-3
paper (Brown et al., 2020, table 2.1) gives for its 1.3B model.
Hardware and memory: the CPU compiler (docs/train.md has its flags, jax 0.10.2) plans 33 GB for
one device, 19 of them parameters and moments; 16 GB for each of eight that share them out, by

    python scripts/train.py --config configs/1558m.py --mesh.fsdp 8 --data.micro_batch_size 1

A GPU's was not measured.
Time, an estimate: 10.3 GFLOP a token x 10e9 tokens = 1.03e20. Blocks are computed twice going
forward, which counts for nothing: at 30 % of an H100's 989 TFLOP/s 347,000 s, 96 hours on one and
12 on eight, if they share it out without loss.
Loss: not measured.
"""

from gpt2_jax.config import GPT2Config
from gpt2_jax.training.settings import (
    DataSettings,
    HellaSwagSettings,
    OptimizerSettings,
    SampleSettings,
    TrainSettings,
    ValidationSettings,
)

config = TrainSettings(
    run_dir="runs/1558m",
    steps=9_536,  # 10e9 / 1,048,576
    model=GPT2Config(
        n_embd=1600,
        n_layer=48,
        n_head=25,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        pad_vocab_size_multiple=64,  # 50,257 -> 50,304 rows
    ),
    data=DataSettings(
        path="data/edu_fineweb10B",
        sequence_length=1024,
        batch_size=1024,  # 1024 x 1024 = 1,048,576 tokens a step
        micro_batch_size=8,
    ),
    optimizer=OptimizerSettings(
        learning_rate=2e-4,
        final_learning_rate=2e-5,  # 10 %
        warmup_steps=358,  # 375e6 / 1,048,576
    ),
    validation=ValidationSettings(every=250, windows=10_240),
    samples=SampleSettings(every=250),
    hellaswag=HellaSwagSettings(every=250),  # if data/hellaswag_val.jsonl is there
    checkpoint_every=1000,
    remat="block",
)

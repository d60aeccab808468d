"""gpt2-medium, 355M parameters (1024 wide, 24 layers, 16 heads), on 10 billion FineWeb-Edu tokens.

    python scripts/prepare_fineweb.py
    python scripts/train.py --config configs/350m.py

The recipe of configs/124m.py with the learning rate and the batch, 0.5M tokens, that the GPT-3
paper (Brown et al., 2020, table 2.1) gives for its 350M model.
Hardware: all GPUs at hand; lower data.micro_batch_size until it fits, the result stays the same.
Memory: the CPU compiler plans 61 GB a device for 32 sequences a pass (55 on eight devices), 34
for 16 (scripts/benchmark.py memory, jax 0.10.2); 4.3 are parameters and moments. A GPU's was not
measured.
Time, an estimate: 2.42 GFLOP a token x 10e9 tokens = 2.42e19; at 40 % of an H100's 989 TFLOP/s
61,300 s, 17 hours on one and 2.1 on eight, if they share it out without loss.
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
    run_dir="runs/350m",
    steps=19_073,  # 10e9 / 524,288
    model=GPT2Config(
        n_embd=1024,
        n_layer=24,
        n_head=16,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        pad_vocab_size_multiple=64,  # 50,257 -> 50,304 rows
    ),
    data=DataSettings(
        path="data/edu_fineweb10B",
        sequence_length=1024,
        batch_size=512,  # 512 x 1024 = 524,288 tokens a step
        micro_batch_size=32,
    ),
    optimizer=OptimizerSettings(
        learning_rate=3e-4,
        final_learning_rate=3e-5,  # 10 %
        warmup_steps=715,  # 375e6 / 524,288
    ),
    validation=ValidationSettings(every=250, windows=10_240),
    samples=SampleSettings(every=250),
    hellaswag=HellaSwagSettings(every=250),  # if data/hellaswag_val.jsonl is there
    checkpoint_every=1000,
)

"""gpt2-large, 774M parameters (1280 wide, 36 layers, 20 heads), on 10 billion FineWeb-Edu tokens.

    python scripts/prepare_fineweb.py
    python scripts/train.py --config configs/774m.py

The recipe of configs/124m.py with the learning rate and the batch, 0.5M tokens, that the GPT-3
paper (Brown et al., 2020, table 2.1) gives for its 760M model.
Hardware: all GPUs at hand; lower data.micro_batch_size until it fits, the result stays the same.
Memory: the CPU compiler plans 66 GB a device for 16 sequences a pass (60 on eight devices), 41
for 8 (scripts/benchmark.py memory, jax 0.10.2); 9.3 are parameters and moments. A GPU's was not
measured.
Time, an estimate: 5.20 GFLOP a token x 10e9 tokens = 5.20e19; at 40 % of an H100's 989 TFLOP/s
131,500 s, 37 hours on one and 4.6 on eight, if they share it out without loss.
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
    run_dir="runs/774m",
    steps=19_073,  # 10e9 / 524,288
    model=GPT2Config(
        n_embd=1280,
        n_layer=36,
        n_head=20,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        pad_vocab_size_multiple=64,  # 50,257 -> 50,304 rows
    ),
    data=DataSettings(
        path="data/edu_fineweb10B",
        sequence_length=1024,
        batch_size=512,  # 512 x 1024 = 524,288 tokens a step
        micro_batch_size=16,
    ),
    optimizer=OptimizerSettings(
        learning_rate=2.5e-4,
        final_learning_rate=2.5e-5,  # 10 %
        warmup_steps=715,  # 375e6 / 524,288
    ),
    validation=ValidationSettings(every=250, windows=10_240),
    samples=SampleSettings(every=250),
    hellaswag=HellaSwagSettings(every=250),  # if data/hellaswag_val.jsonl is there
    checkpoint_every=1000,
)

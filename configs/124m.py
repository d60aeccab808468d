"""GPT-2 124M on 10 billion tokens of FineWeb-Edu: the recipe of karpathy/build-nanogpt.

    python scripts/prepare_fineweb.py
    python scripts/train.py --config configs/124m.py

524,288 tokens a step for 19,073 steps is one epoch of 10 billion tokens. docs/train.md goes
through it from end to end.
Hardware: all GPUs at hand, by the same command; eight take a step in one pass of 8 x 64
sequences, one in eight passes. Lower data.micro_batch_size until it fits, the result stays the
same.
Memory: the CPU compiler plans 45 GB a device for 64 sequences a pass (39 on eight devices), 24
for 32, 13 for 16, 8 for 8 (scripts/benchmark.py memory, jax 0.10.2); 1.5 are parameters and
moments. A GPU's compiler plans otherwise, which was not measured: ask it by the same command.
Time, an estimate: 0.855 GFLOP a token x 10e9 tokens = 8.55e18; at 40 % of an H100's 989 TFLOP/s
21,600 s, 6.0 hours on one and 45 minutes on eight, if they share it out without loss.
Expected validation loss, not measured here: near 3.2924, which build-nanogpt gives for OpenAI's
own 124M weights on its validation shard; docs/train.md has what others reached.
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
    run_dir="runs/124m",
    steps=19_073,  # 10e9 / 524,288
    model=GPT2Config(
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        pad_vocab_size_multiple=64,  # 50,257 -> 50,304 rows
    ),
    data=DataSettings(
        path="data/edu_fineweb10B",
        sequence_length=1024,
        batch_size=512,  # 512 x 1024 = 524,288 tokens a step
        micro_batch_size=64,
    ),
    optimizer=OptimizerSettings(
        learning_rate=6e-4,
        final_learning_rate=6e-5,  # 10 %
        warmup_steps=715,  # 375e6 / 524,288
        beta1=0.9,
        beta2=0.95,
        weight_decay=0.1,
        clip_norm=1.0,
    ),
    validation=ValidationSettings(
        every=250,
        windows=10_240,  # 20 x 512, 10.5 million tokens
        reference_loss=3.2924,  # OpenAI's 124M weights on this data, by build-nanogpt
    ),
    samples=SampleSettings(every=250),
    hellaswag=HellaSwagSettings(every=250),  # if data/hellaswag_val.jsonl is there
    checkpoint_every=1000,
)

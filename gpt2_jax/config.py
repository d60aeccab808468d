"""What a GPT-2 is made of: the hyperparameters of the architecture and the four published sizes.

Section 2.3 and table 2 of the GPT-2 paper (Radford et al., 2019, "Language Models are Unsupervised
Multitask Learners"). It changes GPT-1 (Radford et al., 2018) in few places: more layers and width,
a context of 1,024 tokens instead of 512, a vocabulary of 50,257, norms before the branches,
smaller first weights at their ends. Table 2 prints 117M to 1542M parameters; the published weights
have 124M to 1558M, which is what `parameter_count` gives.

Field names and defaults are those of Hugging Face's `GPT2Config`, so that a `config.json`
means the same to both. Next: attention.py.
"""

import dataclasses
import math

from gpt2_jax.errors import UserError

ACTIVATION_FUNCTIONS = ("gelu_new", "gelu_pytorch_tanh", "gelu", "relu", "silu", "tanh")
"""Names that `GPT2Config.activation_function` takes, Hugging Face's. gelu_new and
gelu_pytorch_tanh are the same tanh approximation; gelu is exact."""


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """Hyperparameters of one GPT-2; the defaults make the smallest published one, 124M.

    What the GPT-2 paper leaves as it was in GPT-1 is from Radford et al., 2018, section 4.1: heads
    of width 64, the width of the MLP, GELU, dropout, the standard deviation of the weights.

    Raises:
      UserError: if a value is out of its range, or `n_embd` is not a multiple of `n_head`.
    """

    vocab_size: int = 50257
    """V, number of tokens: 256 bytes + 50,000 BPE merges + <|endoftext|> (GPT-2 paper, 2.3)"""
    n_positions: int = 1024
    """context length in tokens, the number of learned position embeddings (GPT-2 paper, 2.3)"""
    n_embd: int = 768
    """width D of the residual stream, a multiple of n_head (GPT-2 paper, table 2)"""
    n_layer: int = 12
    """number of blocks L (GPT-2 paper, table 2)"""
    n_head: int = 12
    """attention heads H in each block, each of width K = n_embd / n_head: 64 in every published
    size"""
    n_inner: int | None = None
    """hidden width F of the MLP; None means 4 * n_embd, as GPT-1"""
    activation_function: str = "gelu_new"
    """nonlinearity of the MLP: gelu_new, gelu_pytorch_tanh, gelu, relu, silu or tanh; gelu_new is
    GPT-2's tanh approximation of the GELU"""
    layer_norm_epsilon: float = 1e-5
    """added to the variance in every layer norm, above 0"""
    initializer_range: float = 0.02
    """standard deviation of the initial weights; those that end a residual branch have this
    divided by sqrt(2 n_layer) (GPT-2 paper, 2.3)"""
    embd_pdrop: float = 0.1
    """dropout probability after the embeddings, in [0, 1); only while training"""
    attn_pdrop: float = 0.1
    """dropout probability on the attention probabilities, in [0, 1)"""
    resid_pdrop: float = 0.1
    """dropout probability at the end of each residual branch, in [0, 1)"""
    tie_word_embeddings: bool = True
    """whether the output head is the token embedding itself, as in every published size"""
    eos_token_id: int | None = 50256
    """id of the token that ends a text, <|endoftext|>; None if the vocabulary has none"""
    pad_vocab_size_multiple: int = 1
    """round the embedding's rows up to this multiple for speed (64 makes 50257 into 50304)"""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            check_positive_int(name, getattr(self, name))
        check_positive_int("pad_vocab_size_multiple", self.pad_vocab_size_multiple)
        if self.n_inner is not None:
            check_positive_int("n_inner", self.n_inner)
        if self.n_embd % self.n_head:
            raise UserError(
                f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}; "
                f"choose sizes that divide"
            )
        if self.activation_function not in ACTIVATION_FUNCTIONS:
            raise UserError(
                f"activation_function={self.activation_function!r} is not supported; "
                f"use one of {', '.join(ACTIVATION_FUNCTIONS)}"
            )
        for name in ("layer_norm_epsilon", "initializer_range"):
            value = getattr(self, name)
            if not is_number(value) or not 0 < value < math.inf:
                raise UserError(f"{name}={value!r} must be a finite number above 0")
        for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value < 1:
                raise UserError(f"{name}={value!r} must be a probability in [0, 1)")
        if not isinstance(self.tie_word_embeddings, bool):
            raise UserError(
                f"tie_word_embeddings={self.tie_word_embeddings!r} must be true or false"
            )
        if self.eos_token_id is not None and not _is_int(self.eos_token_id):
            raise UserError(f"eos_token_id={self.eos_token_id!r} must be a token id or null")

    @property
    def head_width(self) -> int:
        """K, the width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def mlp_width(self) -> int:
        """F, the hidden width of the MLP."""
        return self.n_inner if self.n_inner is not None else 4 * self.n_embd

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: `vocab_size` rounded up to `pad_vocab_size_multiple`."""
        return -(-self.vocab_size // self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple

    @property
    def parameter_count(self) -> int:
        """Number of trainable parameters, vocabulary padding not counted."""
        width, hidden = self.n_embd, self.mlp_width
        # A block has 4 D^2 in attention, 3 to make q, k and v, 1 to put heads together, and 8 D^2
        # in its MLP: 12 L D^2 in all, 68 % of the 124M model and 95 % of the largest.
        layer_norm = 2 * width
        attention = (width + 1) * 3 * width + (width + 1) * width
        mlp = (width + 1) * hidden + (hidden + 1) * width
        tables = self.vocab_size * (1 if self.tie_word_embeddings else 2) + self.n_positions
        return tables * width + self.n_layer * (2 * layer_norm + attention + mlp) + layer_norm


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a value is an int or a float; bool, a kind of int in Python, is not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_positive_int(name: str, value: object) -> None:
    """Raises UserError, naming the field, unless the value is a whole number of at least 1."""
    if not _is_int(value) or value < 1:  # type: ignore[operator]
        raise UserError(f"{name}={value!r} must be a whole number of at least 1")


SIZES = {
    "gpt2": GPT2Config(),
    "gpt2-medium": GPT2Config(n_embd=1024, n_layer=24, n_head=16),
    "gpt2-large": GPT2Config(n_embd=1280, n_layer=36, n_head=20),
    "gpt2-xl": GPT2Config(n_embd=1600, n_layer=48, n_head=25),
}
"""The four published sizes by Hugging Face's names: 124M, 355M, 774M and 1558M parameters (table 2
of the paper; its own counts are smaller). All have 64-wide heads and a context of 1,024 tokens."""


def config_for_size(name: str) -> GPT2Config:
    """Returns the configuration of a published size.

    Raises:
      UserError: if `name` is not one of `SIZES`.
    """
    if name not in SIZES:
        raise UserError(f"unknown model size {name!r}; the sizes are {', '.join(SIZES)}")
    return SIZES[name]

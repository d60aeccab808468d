"""GPT-2 in plain PyTorch, in one file: the twin of `gpt2_jax/{attention,block,model}.py`.

Read the two side by side. Modules, names and order of operations are the same; so are the
state dict's keys and shapes and those of Hugging Face's `GPT2LMHeadModel`, which is why
`load_state_dict(strict=True)` takes its weights as they are.

Shapes: B batch, T sequence, D width, H heads, K head width, F MLP width, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from gpt2_jax.config import GPT2Config

ACTIVATIONS = {
    "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu": functional.gelu,
    "relu": functional.relu,
    "silu": functional.silu,
    "tanh": torch.tanh,
}


class Conv1D(nn.Module):
    """y = x W + b with W stored (in, out), as OpenAI's TensorFlow code had it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Maps [B, T, in] to [B, T, out]."""
        return x_BTD @ self.weight + self.bias


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which position t sees positions 0..t."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.attn_dropout = nn.Dropout(config.attn_pdrop)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(K)) v, projected: [B, T, D] to [B, T, D]."""
        B, T, D = x_BTD.shape
        heads = (B, T, self.config.n_head, self.config.head_width)
        q_BHTK, k_BHTK, v_BHTK = (
            part_BTD.reshape(heads).transpose(1, 2)
            for part_BTD in self.c_attn(x_BTD).split(D, dim=-1)
        )
        scores_BHTT = q_BHTK @ k_BHTK.transpose(-1, -2) * self.config.head_width**-0.5
        visible_TT = torch.ones(T, T, dtype=torch.bool, device=x_BTD.device).tril()
        att_BHTT = scores_BHTT.masked_fill(~visible_TT, float("-inf")).softmax(dim=-1)
        y_BHTK = self.attn_dropout(att_BHTT) @ v_BHTK
        y_BTD = self.c_proj(y_BHTK.transpose(1, 2).reshape(B, T, D))
        return self.resid_dropout(y_BTD)


class MLP(nn.Module):
    """Two linear layers with a nonlinearity between."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.c_fc = Conv1D(config.n_embd, config.mlp_width)
        self.c_proj = Conv1D(config.mlp_width, config.n_embd)
        self.activation = ACTIVATIONS[config.activation_function]
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Maps [B, T, D] to [B, T, D]."""
        return self.dropout(self.c_proj(self.activation(self.c_fc(x_BTD))))


class Block(nn.Module):
    """x + attention(ln_1(x)), then x + mlp(ln_2(x))."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Maps the residual stream [B, T, D] to the next."""
        x_BTD = x_BTD + self.attn(self.ln_1(x_BTD))
        return x_BTD + self.mlp(self.ln_2(x_BTD))


class Transformer(nn.Module):
    """Embeddings, blocks and the final norm."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Maps token ids [B, T] to features [B, T, D]."""
        x_BTD = self.drop(self.wte(tokens_BT) + self.wpe.weight[: tokens_BT.shape[1]])
        for block in self.h:
            x_BTD = block(x_BTD)
        return self.ln_f(x_BTD)


class ReferenceGPT2(nn.Module):
    """GPT-2 with its output head, tied to the embedding or not."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight
        self._initialise(config)

    def _initialise(self, config: GPT2Config) -> None:
        """Normal weights; those that end a residual branch smaller by sqrt(2L)."""
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2:
                ends_branch = name.endswith("c_proj.weight")
                scale = (2 * config.n_layer) ** -0.5 if ends_branch else 1.0
                nn.init.normal_(parameter, std=config.initializer_range * scale)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Maps token ids [B, T] to logits [B, T, V]."""
        return self.lm_head(self.transformer(tokens_BT))

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean cross-entropy of the targets, nats per token."""
        return functional.cross_entropy(self(tokens_BT).flatten(0, 1), targets_BT.flatten())

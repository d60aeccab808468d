"""llama.cpp, through llama-cpp-python's bindings of its C functions."""

import ctypes
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from gpt2_jax.benchmarks.engines import ModelFiles
from gpt2_jax.benchmarks.worker import cpu_cores
from gpt2_jax.errors import UserError
from gpt2_jax.interop.weight_files import SAFETENSORS

# What its parts of a block are called by Hugging Face.
_NORMS = {"attn_norm": "ln_1", "ffn_norm": "ln_2"}
_MATRICES = {
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}


class Engine:
    """With its defaults; the rows of a batch are decoded side by side."""

    def __init__(self, model: ModelFiles, precision: str) -> None:
        import llama_cpp

        if model.config.activation_function not in ("gelu_new", "gelu_pytorch_tanh"):
            raise UserError(f"its GPT-2 has no activation {model.config.activation_function}")
        file = model.directory / f"{precision}.gguf"
        _convert(model, file, precision)
        self._silence = llama_cpp.llama_log_callback(lambda *_: None)  # C does not keep it alive
        llama_cpp.llama_log_set(self._silence, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            str(file).encode(), llama_cpp.llama_model_default_params()
        )
        self.device = "gpu" if llama_cpp.llama_supports_gpu_offload() else "cpu"
        self._vocab_size = model.config.vocab_size
        self._context: Any = None
        self._batch: Any = None
        self._room = (0, 0)

    def generate(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """See `engines.Engine`."""
        length = len(prompts[0])
        self._make_room(len(prompts), length, length + max_new_tokens)
        last = length - 1
        token_B = self._decode(
            (token, position, row, position == last)
            for row, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        )
        new_TB = [token_B]
        while len(new_TB) < max_new_tokens:
            position = last + len(new_TB)
            token_B = self._decode(
                (token, position, row, True) for row, token in enumerate(token_B)
            )
            new_TB.append(token_B)
        return np.stack(new_TB, axis=1).tolist()

    def _make_room(self, rows: int, prompt_length: int, length: int) -> None:
        """Empties the cache, and makes one for these sizes first if there is none."""
        import llama_cpp

        if self._room != (rows, length):
            params = llama_cpp.llama_context_default_params()
            params.n_ctx, params.n_seq_max = rows * -(-length // 256) * 256, rows
            params.n_batch = max(params.n_batch, rows * prompt_length)
            params.n_threads = params.n_threads_batch = cpu_cores()
            if self._context is not None:
                llama_cpp.llama_batch_free(self._batch)
                llama_cpp.llama_free(self._context)
            self._context = llama_cpp.llama_init_from_model(self._model, params)
            self._batch = llama_cpp.llama_batch_init(rows * prompt_length, 0, 1)
            self._room = (rows, length)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)

    def _decode(self, tokens: Iterable[tuple[int, int, int, bool]]) -> np.ndarray:
        """Reads (token, position, row, whether to tell what follows) and tells what follows."""
        import llama_cpp

        batch = self._batch
        count = asked = 0
        for token, position, row, asks in tokens:
            batch.token[count], batch.pos[count] = token, position
            batch.n_seq_id[count], batch.seq_id[count][0] = 1, row
            batch.logits[count] = asks
            count, asked = count + 1, asked + asks
        batch.n_tokens = count
        status = llama_cpp.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        logits = llama_cpp.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, (asked, self._vocab_size)).argmax(axis=1)


def _convert(model: ModelFiles, file: Path, precision: str) -> None:
    """Writes the weights as a GGUF file without a tokenizer."""
    import gguf

    config = model.config
    kind = gguf.GGMLQuantizationType[precision.upper()]
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GPT2])
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.mlp_width)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)

    state = load_file(model.directory / SAFETENSORS)

    def matrix(name: str, weight_FD: np.ndarray) -> None:
        writer.add_tensor(name, gguf.quants.quantize(weight_FD, kind), raw_dtype=kind)

    def vectors(name: str, source: str, *leaves: str) -> None:
        for leaf in leaves:
            writer.add_tensor(f"{name}.{leaf}", state[f"transformer.{source}.{leaf}"])

    matrix("token_embd.weight", state["transformer.wte.weight"])
    vectors("position_embd", "wpe", "weight")
    for i in range(config.n_layer):
        for name, source in _NORMS.items():
            vectors(f"blk.{i}.{name}", f"h.{i}.{source}", "weight", "bias")
        for name, source in _MATRICES.items():
            weight_DF = state[f"transformer.h.{i}.{source}.weight"]
            matrix(f"blk.{i}.{name}.weight", np.ascontiguousarray(weight_DF.T))
            vectors(f"blk.{i}.{name}", f"h.{i}.{source}", "bias")
    vectors("output_norm", "ln_f", "weight", "bias")
    if not config.tie_word_embeddings:
        matrix("output.weight", state["lm_head.weight"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

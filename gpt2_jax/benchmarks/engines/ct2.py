"""CTranslate2: `ctranslate2.Generator`."""

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from gpt2_jax.benchmarks.engines import ModelFiles
from gpt2_jax.benchmarks.worker import cpu_cores
from gpt2_jax.interop.weight_files import SAFETENSORS

_ACTIVATIONS = {
    "gelu_new": "GELUTanh",
    "gelu_pytorch_tanh": "GELUTanh",
    "gelu": "GELU",
    "relu": "RELU",
    "silu": "SWISH",
    "tanh": "Tanh",
}


class Engine:
    """With the weights converted by its own classes; on a GPU if it was built for one."""

    def __init__(self, model: ModelFiles, precision: str) -> None:
        import ctranslate2

        directory = model.directory / f"ctranslate2-{precision}"
        directory.mkdir()
        _convert(model, directory, None if precision == "f32" else precision)
        self._generator = ctranslate2.Generator(
            str(directory),
            device="auto",
            compute_type={"f32": "float32", "int8": "int8"}[precision],
            intra_threads=cpu_cores(),
            inter_threads=1,
        )
        self.device = {"cpu": "cpu", "cuda": "gpu"}[self._generator.device]
        # It must have a token that ends a text; this one no model can choose.
        self._end = model.config.vocab_size

    def generate(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """See `engines.Engine`."""
        results = self._generator.generate_batch(
            [[str(token) for token in prompt] for prompt in prompts],
            max_length=max_new_tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
            end_token=[self._end],
        )
        return [result.sequences_ids[0] for result in results]


def _convert(model: ModelFiles, directory: Path, quantization: str | None) -> None:
    """Writes the weights as CTranslate2 reads them; its words are the tokens' numbers."""
    from ctranslate2.specs import common_spec, transformer_spec

    config = model.config
    state = load_file(model.directory / SAFETENSORS)

    def norm(spec: object, name: str) -> None:
        spec.gamma, spec.beta = state[f"{name}.weight"], state[f"{name}.bias"]  # type: ignore[attr-defined]

    def linear(spec: object, name: str) -> None:
        spec.weight = np.ascontiguousarray(state[f"{name}.weight"].T)  # type: ignore[attr-defined]
        spec.bias = state[f"{name}.bias"]  # type: ignore[attr-defined]

    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        config.n_layer,
        config.n_head,
        activation=getattr(common_spec.Activation, _ACTIVATIONS[config.activation_function]),
    )
    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = state["transformer.wte.weight"]
    decoder.position_encodings.encodings = state["transformer.wpe.weight"]
    for i, layer in enumerate(decoder.layer):
        block = f"transformer.h.{i}"
        norm(layer.self_attention.layer_norm, f"{block}.ln_1")
        linear(layer.self_attention.linear[0], f"{block}.attn.c_attn")
        linear(layer.self_attention.linear[1], f"{block}.attn.c_proj")
        norm(layer.ffn.layer_norm, f"{block}.ln_2")
        linear(layer.ffn.linear_0, f"{block}.mlp.c_fc")
        linear(layer.ffn.linear_1, f"{block}.mlp.c_proj")
    norm(decoder.layer_norm, "transformer.ln_f")
    decoder.projection.weight = state.get("lm_head.weight", state["transformer.wte.weight"])
    spec.register_vocabulary([str(token) for token in range(config.vocab_size)])
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "0"
    spec.config.layer_norm_epsilon = config.layer_norm_epsilon
    spec.validate()
    spec.optimize(quantization=quantization)
    spec.save(str(directory))

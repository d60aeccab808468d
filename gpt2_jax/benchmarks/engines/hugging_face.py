"""Hugging Face transformers, on PyTorch: `GPT2LMHeadModel.generate`."""

from gpt2_jax.benchmarks.engines import ModelFiles
from gpt2_jax.benchmarks.worker import cpu_cores


class Engine:
    """As its documentation shows it; on a GPU if PyTorch has one."""

    def __init__(self, model: ModelFiles, precision: str) -> None:
        import torch
        import transformers

        torch.set_num_threads(cpu_cores())
        transformers.utils.logging.disable_progress_bar()
        dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[precision]
        network = transformers.GPT2LMHeadModel.from_pretrained(model.directory, dtype=dtype)
        self.device = "gpu" if torch.cuda.is_available() else "cpu"
        self._network = network.eval().to("cuda" if self.device == "gpu" else "cpu")

    def generate(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """See `engines.Engine`."""
        import torch

        tokens_BT = torch.tensor(prompts, device=self._network.device)
        with torch.inference_mode():
            out_BT = self._network.generate(
                tokens_BT,
                attention_mask=torch.ones_like(tokens_BT),
                do_sample=False,
                max_new_tokens=max_new_tokens,
                pad_token_id=0,  # it is never used, but asked for in a warning
            )
        return out_BT[:, tokens_BT.shape[1] :].tolist()

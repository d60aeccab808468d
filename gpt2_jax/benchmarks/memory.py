"""What the compiled training step asks of each device, before any of it is allocated."""

from gpt2_jax.errors import UserError
from gpt2_jax.training.engine import make_engine
from gpt2_jax.training.mesh import make_layout
from gpt2_jax.training.settings import TrainSettings


def step_memory(settings: TrainSettings) -> dict[str, int]:
    """Compiles the step of a run and reads the compiler's own analysis.

    XLA:CPU undoes rematerialisation, unless XLA_FLAGS has
    --xla_disable_hlo_passes=cse,optimization-barrier-expander,cse_barrier_expander.

    Returns:
      Bytes of each device: "parameters and moments" (with a batch), "temporary", "in all".
    """
    engine = make_engine(settings, make_layout(settings))
    analysis = engine.lower_step(settings.data.sequence_length).compile().memory_analysis()
    if analysis is None:
        raise UserError("this platform's compiler does not tell what memory it needs")
    arguments, temporary = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
    return {
        "parameters and moments": arguments,
        "temporary": temporary,
        "in all": arguments + temporary,
    }

"""The thin loop around the pure step: batches in, metrics and checkpoints out."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import grain
import jax
import numpy as np

from gpt2_jax.errors import UserError
from gpt2_jax.model import AdaptedParams, Params
from gpt2_jax.training import run_dir as run_directory
from gpt2_jax.training.checkpoint import Checkpoints
from gpt2_jax.training.config_files import to_json
from gpt2_jax.training.distributed import agree, check_same, is_primary
from gpt2_jax.training.engine import Engine, make_engine
from gpt2_jax.training.mesh import make_layout
from gpt2_jax.training.plot import LossPlot
from gpt2_jax.training.profiling import Trace
from gpt2_jax.training.recorder import Recorder, open_recorder
from gpt2_jax.training.resume import first_step
from gpt2_jax.training.settings import TrainSettings
from gpt2_jax.training.step import TrainState
from gpt2_jax.training.stopping import StopRequest
from gpt2_jax.training.trackers import check_trackers
from gpt2_jax.training.validation import Measure, Probe, out_of_patience, validation_probe

Batches = Callable[..., np.ndarray]

# Batches read ahead of the step that needs them.
PREFETCH = 4

NO_FINGERPRINTS: Mapping[str, str] = MappingProxyType({})


def train(
    settings: TrainSettings,
    batches: Batches,
    validation_NT: np.ndarray,
    *,
    probes: Sequence[Probe] = (),
    initial_params: Params | None = None,
    base: Params | None = None,
    fingerprints: Mapping[str, str] = NO_FINGERPRINTS,
    resume: bool = False,
    overwrite: bool = False,
    allow_changes: bool = False,
    profile: bool = False,
) -> TrainState:
    """Trains a model and fills `settings.run_dir`; goes on with the run that is there.

    Args:
      settings: the run.
      batches: batch(step, rows), int32 [len(rows), T + 1], a pure function of both.
      validation_NT: held-out windows, int32 [N, T + 1].
      probes: what else to measure while it trains.
      initial_params: host arrays to start from; None draws new parameters.
      base: with `settings.lora`, the frozen parameters, host arrays.
      fingerprints: of "data" and "base", to notice on resuming that they have changed.
      resume: insist on a run to go on with.
      overwrite: replace the run that is there.
      allow_changes: go on even if settings or data have changed.
      profile: write a trace of a few steps to run_dir/profile.

    Returns:
      The state after the last step, or after the one that a signal or a validation loss that no
      longer fell stopped the run at.

    Raises:
      UserError: before anything is written, if settings, devices and run directory don't go
        together; later, if the run diverges or the disk fails. Checkpoints stay intact.
    """
    layout = make_layout(settings)
    run_dir = Path(settings.run_dir)
    resuming = run_directory.check_run(
        settings, resume=resume, overwrite=overwrite, allow_changes=allow_changes
    )
    check_same("settings or data", to_json(settings) + str(dict(fingerprints)))
    probes = [validation_probe(validation_NT, settings.validation.every), *probes]
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(run_dir, settings.keep_checkpoints))
        stack.enter_context(_explained_errors(checkpoints))
        if is_primary():
            stack.enter_context(run_directory.locked(run_dir))
            if not resuming:
                check_trackers(settings)
                run_directory.clear(run_dir)
        stop = stack.enter_context(StopRequest(layout.mesh))
        fixed = [name for name in fingerprints if name != "data" or not allow_changes]
        first = first_step(checkpoints, {name: fingerprints[name] for name in fixed})
        if first > settings.steps:
            raise UserError(
                f"steps={settings.steps} is less than the {first} that {run_dir} has behind it; "
                f"raise it or give another --run_dir"
            )
        engine = make_engine(settings, layout, base)
        key = jax.random.key(settings.seed)
        if first:
            state = checkpoints.restore(first, engine.abstract_state)
        else:
            state = engine.first_state(key, initial_params)
        if is_primary():
            run_directory.store_settings(settings)
        recorder = stack.enter_context(open_recorder(settings, engine, first, state.opt_state))
        if first and checkpoints.facts(first).get("data") != fingerprints.get("data"):
            recorder.val_losses.clear()  # they speak of other data
        trace = stack.enter_context(Trace(run_dir / "profile" if profile else None, first))
        plot = stack.enter_context(LossPlot(settings))
        loop = _Loop(
            settings, engine, batches, key, fingerprints, recorder, checkpoints, stop, trace, plot
        )
        return loop.run(state, first, {probe: probe.make(engine.model, layout) for probe in probes})


@dataclasses.dataclass(frozen=True)
class _Loop:
    """All that the loop holds on to, so that it can be read in one piece."""

    settings: TrainSettings
    engine: Engine
    batches: Batches
    key: jax.Array
    fingerprints: Mapping[str, str]
    recorder: Recorder
    checkpoints: Checkpoints
    stop: StopRequest
    trace: Trace
    plot: LossPlot

    def run(self, state: TrainState, first: int, probes: dict[Probe, Measure]) -> TrainState:
        """Takes the state after `first` updates to the last one, or to where a signal stops it."""
        steps, stopwatch = self.settings.steps, self.recorder.stopwatch
        batches = self._prefetch(first)
        for step in range(first, steps + 1):  # `step` updates are done here
            ending = self.stop.describe(step) if self.stop.agreed() else None
            if ending is None:
                self._measure(step, state.params, probes, step == first)
                ending = self._out_of_patience(step)
            stopping = ending is not None
            if step > first and (stopping or self._is_checkpoint_due(step)):
                self._save(step, state)
            if stopping or step == steps:
                break
            with stopwatch.block("data"):
                tokens_NBT = next(batches)
            self.trace.before(step)
            with stopwatch.block("compile") if step == first else contextlib.nullcontext():
                state, metrics = self.engine.step(state, tokens_NBT, self.key)
            self.recorder.push(step, metrics)
            self.checkpoints.check()
        with stopwatch.block("checkpoint"):
            self.checkpoints.wait()
        self.recorder.finish(ending)
        return state

    def _prefetch(self, first: int) -> Iterator[jax.Array]:
        """The batches from `first` on, read and put on the devices ahead of time."""
        steps = grain.MapDataset.range(first, max(self.settings.steps, first + 1))
        load = functools.partial(self.engine.layout.load_batch, self.batches)
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCH)
        return iter(steps.map(load).to_iter_dataset(options))

    def _measure(
        self,
        step: int,
        trained: Params,
        probes: dict[Probe, Measure],
        first: bool,
    ) -> None:
        """Measures what is due after `step` updates; the first time, all is compiled for it."""
        params: Params | AdaptedParams | None = None
        for probe, measure in probes.items():
            # Only where a resumed run begins can it have been measured; all must know it alike.
            known = first and agree(self.recorder.has(step, probe.name))
            if probe.is_due(step, self.settings.steps) and not known:
                self.recorder.flush()  # or the time of a probe would count as a step's
                params = self.engine.complete(trained) if params is None else params
                with self.recorder.stopwatch.block("compile" if first else "eval"):
                    values = measure(params)
                self.recorder.push(step, values)

    def _out_of_patience(self, step: int) -> str | None:
        """Why the run ends here, if the validation loss has not fallen for too long."""
        patience, every = self.settings.validation.patience, self.settings.validation.every
        if not patience or step % every or step == self.settings.steps:
            return None
        self.recorder.flush()
        losses = self.recorder.val_losses
        if not agree(out_of_patience(losses, patience)):
            return None
        best = min(losses, key=losses.__getitem__)
        return (
            f"stopped early after {step} steps: the validation loss has not been below "
            f"{losses[best]:.4f}, that of step {best}, in {patience} measurement(s); "
            f"a higher --validation.patience goes on"
        )

    def _is_checkpoint_due(self, step: int) -> bool:
        return step == self.settings.steps or step % self.settings.checkpoint_every == 0

    def _save(self, step: int, state: TrainState) -> None:
        # First the records, so that a run resumed here has no gap in them.
        self.recorder.sync()
        facts = {"val_loss": self.recorder.val_losses.get(step), **self.fingerprints}
        with self.recorder.stopwatch.block("checkpoint"):
            self.checkpoints.save(state, facts)
            self.plot.draw_now_and_then()


@contextlib.contextmanager
def _explained_errors(checkpoints: Checkpoints) -> Iterator[None]:
    """Tells in one line of a full disk, a directory that cannot be written, too little memory."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            "the devices have too little memory; halve --data.micro_batch_size, then try "
            "--remat block, then --mesh.fsdp -1 --mesh.data 1"
        ) from error
    except OSError as error:
        place = error.filename or checkpoints.directory.parent
        raise UserError(
            f"cannot write {place}: {error.strerror or error}; "
            f"{checkpoints.describe_last_good()}; free space or permissions, then run the same "
            f"command to go on"
        ) from None

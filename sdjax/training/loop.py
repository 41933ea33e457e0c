"""The training loop: settings in, a trained model out, resumed where it was stopped."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax import parallel
from sdjax.model import Params
from sdjax.training import folder, optimizer
from sdjax.training.checkpoints import Checkpoints
from sdjax.training.job import Job, job
from sdjax.training.log import Log
from sdjax.training.settings import Run
from sdjax.training.step import State, start, stepper
from sdjax.training.stopping import Stopping

Note = Callable[[str], None]


def train(run: Run, *, note: Note = lambda line: None, resume: bool = True) -> Path:
    """Train as the settings say, and give the path of what was saved.

    Everything that a step depends on is in a checkpoint: params, averages, the optimiser's moments,
    the key, the place in the data. A run that was killed goes on from its newest one, and gives the
    weights, bit for bit, that it would have given without a break. SIGTERM, Ctrl-C and a pod's
    preemption save first.

    Args:
        run: see `settings.read`.
        note: told in sentences of what happens.
        resume: go on from a checkpoint in `run.run.out` if there is one.

    Returns:
        The trained model's folder (its average, where there is one), or that of the checkpoints
        when it was asked to stop.

    Raises:
        InputError: what the settings name cannot be loaded or does not fit; the loss is not finite;
            another process trains in the folder.
    """
    parallel.start_processes()
    out = Path(run.run.out)
    with folder.held(out) if parallel.process()[0] == 0 else contextlib.nullcontext():
        return _train(run, note, resume, out)


def _train(run: Run, note: Note, resume: bool, out: Path) -> Path:
    process = parallel.process()
    mesh = parallel.mesh(run.mesh.fsdp)
    parallel.check_batch(run.run.batch_size, mesh)
    work = job(run, note, process)
    updates = optimizer.build(run.optimizer, run.run.steps)
    averaged = run.ema.decay > 0

    def begin(params: Params | None) -> State:
        return start(work.stage, updates, jax.random.key(run.run.seed), averaged, params)

    shapes = jax.eval_shape(begin, work.params)
    layout = parallel.shardings(shapes, mesh)
    like = jax.tree.map(_shaped, shapes, layout)
    say = [note]  # the log's own, once there is a bar to be kept whole
    checkpoints = Checkpoints(out / folder.CHECKPOINTS, run.run.keep, lambda line: say[-1](line))
    found = checkpoints.restore_latest(like) if resume else None
    if found is None:
        done, carried = 0, None
        state = jax.jit(begin, out_shardings=layout)(work.params)
    else:
        done, state, extra = found
        work.batches.restore(extra["data"])
        carried = extra["log"]
        note(f"going on from step {done}")
    frozen = jax.device_put(work.frozen, parallel.shardings(work.frozen, mesh))
    work = work._replace(params=None, frozen={})  # they have their places: not a second time
    program = jax.jit(
        stepper(
            work.stage,
            updates,
            accumulate=run.run.accumulate,
            decay=run.ema.decay,
            warmup=run.ema.warmup,
        ),
        donate_argnums=0,
        out_shardings=(layout, parallel.whole(mesh)),
    )
    log = Log(
        out,
        steps=run.run.steps,
        batch_size=run.run.batch_size,
        every=run.run.log_every,
        step=done,
        carried=carried,
        note=note,
        writes=process[0] == 0,
    )
    say.append(log.note)
    with log, Stopping() as stopping, work.batches:
        asked: str | None = None
        saved = done
        while done < run.run.steps and not asked:
            try:
                given = next(work.batches)
            except Exception:
                # A signal to a whole group ends the data's processes too: nothing is lost by it.
                asked = stopping.asked(done)
                if not asked:
                    raise
            else:
                batch = parallel.distribute(given, mesh)
                state, metrics = program(state, frozen, batch)
                done += 1
                log.step(done, metrics, {"skipped": len(work.batches.skipped)})
                asked = stopping.asked(done)
            last = done == run.run.steps
            if done > saved and (last or asked or done % run.run.save_every == 0):
                extra = {"data": work.batches.state(), "log": log.state()}
                checkpoints.save(done, state, extra)
                saved = done
            if run.run.sample_every and (last or done % run.run.sample_every == 0) and not asked:
                with log.paused():
                    _show(work, state, out, done, log, process[0] == 0)
            checkpoints.poll()
        checkpoints.wait()
        if work.batches.skipped:
            count = len(work.batches.skipped)
            log.note(f"examples that could not be read and were skipped: {count}, see the warnings")
        if asked:
            log.note(f"stopped by {asked} at step {done} of {run.run.steps}")
            checkpoints.close()
            return out / folder.CHECKPOINTS
        path = _save(work, state, out, process[0] == 0)
        log.finish()
    checkpoints.close()
    return path


def _shaped(shape: Any, sharding: Any) -> Any:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def _best(state: State) -> Params:
    """The averages where there are any, else the params; whole, in every process."""
    return parallel.gather(state.params | state.average)


def _show(work: Job, state: State, out: Path, step: int, log: Log, writes: bool) -> None:
    params, extra = _best(state), parallel.gather(state.extra)
    pixels = work.picture(_placed(params), extra) if writes else None
    if pixels is None:
        return
    from PIL import Image

    samples = out / "samples"
    samples.mkdir(exist_ok=True)
    Image.fromarray(np.asarray(pixels)).save(samples / f"{step:08}.png")
    log.image("samples", step, np.asarray(pixels))


def _save(work: Job, state: State, out: Path, writes: bool) -> Path:
    """Write the averages and, beside them, the last weights; only the weights without averages."""
    extra = parallel.gather(state.extra)
    best, last = _best(state), parallel.gather(state.params)
    if not writes:
        return out
    path = work.save(out, _placed(best), extra, True)
    if state.average:
        work.save(out, _placed(last), extra, False)
    return path


def _placed(params: Params) -> Params:
    """Arrays of this process alone."""
    return jax.tree.map(jnp.asarray, params)

"""When will the run end? A point and an interval, or honestly nothing.

losses = [(10, 5.2), (20, 4.1), (30, 3.0), (40, 2.2)]
steps_to_target(losses, 0.099, Circumstances(floor=0.036))    # Eta(steps, low, high), or a NoEta

A run ends when a full pass verifies the target. docs/explanation/eta.md: how good this is on recorded runs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from math import exp, log

import numpy as np

from nanogpt.optim.recipe import ADAMW
from nanogpt.plan.reference_runs import ReferenceRun

MIN_POINTS = 3  # epoch means; a curve of any shape goes through fewer
MAX_POINTS = 200  # longer histories are averaged further, so that an answer takes milliseconds
POWERS = (0.5, 0.75, 1.0, 1.25)  # of the distance to the asymptote in the speed; 1: an exponential
REACHABLE = (0.0, 0.2, 0.4, 0.6)  # asymptotes, from the floor (0) to the highest level (1)
UNREACHABLE = (0.0, 0.25, 0.5, 0.75, 0.95)  # asymptotes, from the highest level (0) to the lowest loss so far (1)
HALF_LIFE = 0.2  # of the steps so far, after which a point weighs half
EVIDENCE = 4.0  # points' worth: neighbours err alike, so many of them say little more than a few
ERROR = 0.03  # of a mean loss, relative; a fit that is better than this is luck
BEYOND_DOUBT = 4.0  # log-likelihood by which the unreachable asymptotes must fit better
FIRST_PLATEAU = 0.25  # of the first loss: a plateau above this is that of single tokens, which the loss leaves again
DOUBT = 0.2  # log-likelihood, likewise, that makes a bend above FIRST_PLATEAU a reason to say nothing
FARTHEST = 15.0  # x the steps so far: nothing is said of what is farther off
FITTED_BELOW = 4.0  # x the target: above it reference runs are nearer the truth than the fits
SHORTEST = 10.0  # steps that the loss is averaged over which is sought in reference runs, and at least an epoch
WIDER = 1.4  # factor on the interval that reference runs span: another run may be like none of them
LIKENESS = log(2)  # of the logarithms of two widths: a run of such another one weighs exp(-1/2) as much
UNLIKE = 2.0  # x the step at which the slowest reference run had this loss: a run that has it later is like none
QUANTILES = (0.1, 0.5, 0.9)  # of the ensemble: low, point, high


@dataclass(frozen=True)
class Eta:
    """Steps still to go: the best guess, and the ends of the interval that should hold the truth 4 times in 5."""

    steps: float
    low: float
    high: float
    by_reference: bool = False  # read off reference runs instead of the run's own losses


class NoEta(Enum):
    """Why there is none, as a person reads it."""

    NOT_YET = "no ETA yet"
    BELOW_PLATEAU = "target below the plateau"
    RECALL = "target loss reached, recall awaited"


@dataclass(frozen=True)
class Circumstances:
    """What is known of a run beside its losses."""

    floor: float = 0.0  # nats/token that no model can be below
    epoch_steps: float = 1.0  # in which each window is seen once; may be less than a step
    slows_below: float = 0.0  # nats/token below which the rate falls with the square root of the loss; 0: nowhere
    levels: tuple[float, ...] = ADAMW.levels  # of its Recipe
    lag_steps: float = 0.0  # by which the judged weights, an average, are older than the trained ones
    wait_steps: float = 1.0  # before which no full pass can be made
    averages_below: float = 0.0  # nats/token at which an average begins that is still to begin; 0: none is
    ripe_steps: float = 0.0  # for which it is not judged once it has begun
    judged_step: float = 0.0  # the newest of a full pass, or of one that was possible and not thought worth making
    n_embd: int = 1  # its width
    references: tuple[ReferenceRun, ...] = ()  # finished runs that it may be like


def steps_to_target(history: Sequence[tuple[int, float]], target: float, known: Circumstances) -> Eta | NoEta:
    """When the run that has logged these (step, mean loss since the one before), oldest first, will end.

    By the reference runs while the loss is above FITTED_BELOW times the target, then by a fit to its own losses.
    """
    fitted = steps_by_fit(history, target, known)
    if fitted is NoEta.BELOW_PLATEAU:
        return fitted
    return steps_by_reference(history, target, known) or fitted


def steps_by_reference(history: Sequence[tuple[int, float]], target: float, known: Circumstances) -> Eta | None:
    """The median of the reference runs: as many steps more, for each so far, as they took from the same loss on.

    Models of another width leave the plateau of single tokens at another share of their steps, and weigh less. None
    where not even one run's weight is together, the loss is not yet, or no longer, one to compare, or rows are so long
    that it is of long ago.
    """
    shortest = max(SHORTEST, known.epoch_steps)
    loss, steps = _newest_mean(history, shortest)
    if not shortest <= steps <= 2 * shortest or loss <= FITTED_BELOW * target:
        return None
    compared = [(run, at) for run in known.references if (at := run.step_below(loss)) and at < run.steps]
    weights = [exp(-((log(run.n_embd / known.n_embd) / LIKENESS) ** 2) / 2) for run, _ in compared]
    now = history[-1][0]
    if sum(weights) < 1 or now > UNLIKE * max(at for _, at in compared):
        return None
    ratios = [run.steps / at - 1 for run, at in compared]
    low, middle, high = _quantiles([(now * ratio, weight) for ratio, weight in zip(ratios, weights, strict=True)])
    middle, low, high = (max(end, known.wait_steps) for end in (middle, low / WIDER, high * WIDER))
    return Eta(middle, low, high, by_reference=True)


def steps_by_fit(history: Sequence[tuple[int, float]], target: float, known: Circumstances) -> Eta | NoEta:
    """The same from the run's own losses.

    An ensemble: each fit says how the speed -d(loss)/d(step) depends on the loss, k (loss - asymptote)^power, and where
    the trained loss is when a full pass verifies the target. Fits weigh as their likelihood. One that says the
    run would have ended at judged_step or before is wrong and is left out.
    """
    if known.floor >= target:
        return NoEta.BELOW_PLATEAU
    steps, losses, weights = _epoch_means(history, known.epoch_steps)
    if len(steps) < MIN_POINTS:
        return NoEta.NOT_YET
    now, top = history[-1][0], known.levels[-1] * target
    weights = weights * 0.5 ** ((now - steps) / (HALF_LIFE * now))
    points = steps, losses, weights / weights.sum()
    reachable = [known.floor + share * (top - known.floor) for share in REACHABLE]
    unreachable = [top + share * (losses.min() - top) for share in UNREACHABLE if losses.min() > top]
    fits = list(_fits(points, reachable, target, known))
    plateaus = [fit.error for fit in _fits(points, unreachable, target, known)]
    if not fits:
        return NoEta.NOT_YET
    best = min(fit.error for fit in fits)
    unit = 2 / EVIDENCE * (min([best, *plateaus]) + ERROR**2)
    evidence = (best - min(plateaus)) / unit if plateaus else 0.0
    if losses.min() > FIRST_PLATEAU * losses.max():
        if evidence > DOUBT:
            return NoEta.NOT_YET
    elif evidence > BEYOND_DOUBT:
        return NoEta.BELOW_PLATEAU
    ends = [
        (_end(fit, level * target, known), exp((best - fit.error) / unit))
        for fit in fits
        for level in known.levels
        if level * target > fit.asymptote
    ]
    soonest = now + known.wait_steps
    ahead = [(max(end, soonest) - now, weight) for end, weight in ends if end > known.judged_step]
    low, middle, high = _quantiles(ahead or [(known.wait_steps, 1.0)])
    return NoEta.NOT_YET if middle > FARTHEST * now else Eta(middle, low, min(high, FARTHEST * now))


@dataclass(frozen=True)
class Fit:
    """A straight line through z(loss) = the integral of d(loss) / speed, for one shape of the speed."""

    asymptote: float
    losses: np.ndarray  # (G,), ascending: where z is tabulated
    z: np.ndarray  # (G,)
    slope: float  # of z against the step, negative
    origin: float  # z at step 0
    error: float  # weighted mean square of the points' relative errors

    def step_of(self, loss: float) -> float:
        """Where the curve has fallen to a loss."""
        return (float(np.interp(loss, self.losses, self.z)) - self.origin) / self.slope


def fit_curve(
    points: tuple[np.ndarray, ...], power: float, asymptote: float, lowest: float, known: Circumstances
) -> Fit | None:
    """The curve of one power and asymptote through points; None if it does not fall.

    points: steps, losses and weights that sum to 1, each (N,). lowest: the lowest loss that step_of will be asked for.
    """
    steps, losses, weights = points
    nearest = asymptote + 1e-3 * max(lowest, asymptote)  # z is infinite at the asymptote; points below count as here
    grid = np.geomspace(max(nearest, min(lowest, losses.min())), max(losses.max(), nearest * 1.001), 400)
    slowness = (grid - asymptote) ** -power
    if known.slows_below:
        slowness /= np.minimum(1.0, np.sqrt(grid / known.slows_below))
    z = np.concatenate([[0.0], np.cumsum(np.diff(grid) * (slowness[1:] + slowness[:-1]) / 2)])
    seen = np.interp(losses, grid, z)
    from_mean = steps - weights @ steps
    slope = float(weights @ (from_mean * seen) / (weights @ from_mean**2))
    if slope >= 0:
        return None
    line = weights @ seen + slope * from_mean
    error = float(weights @ np.log(np.interp(line, z, grid) / losses) ** 2)
    return Fit(asymptote, grid, z, slope, float(line[0] - slope * steps[0]), error)


def _fits(
    points: tuple[np.ndarray, ...], asymptotes: Sequence[float], target: float, known: Circumstances
) -> Iterator[Fit]:
    for asymptote in asymptotes:
        for power in POWERS:
            fitted = fit_curve(points, power, asymptote, known.levels[0] * target, known)
            if fitted is not None:
                yield fitted


def _end(fit: Fit, loss: float, known: Circumstances) -> float:
    """The step of the pass that verifies the target if the trained loss is then, but for the lag, that one."""
    there = fit.step_of(loss) + known.lag_steps
    return max(there, fit.step_of(known.averages_below) + known.ripe_steps) if known.averages_below else there


def _epoch_means(history: Sequence[tuple[int, float]], epoch_steps: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Middle step, mean loss and length, each (N,), of the stretches of whole rows that last an epoch or longer.

    Within an epoch the windows differ, and a fall may be luck. What is left over at the end is not complete, and is not
    returned.
    """
    if not history:
        return (np.zeros(0),) * 3
    shortest = max(epoch_steps, history[-1][0] / MAX_POINTS)
    means, begin, before, total = [], 0, 0, 0.0
    for step, loss in history:
        total += loss * (step - before)
        before = step
        if step > begin and step - begin >= shortest:
            means.append(((begin + step) / 2, total / (step - begin), step - begin))
            begin, total = step, 0.0
    steps, losses, lengths = np.array(means).reshape(-1, 3).T
    return steps, np.maximum(losses, 1e-9), lengths


def _newest_mean(history: Sequence[tuple[int, float]], shortest: float) -> tuple[float, int]:
    """Mean loss of the newest rows that are together at least as many steps long, or of all, and how long they are."""
    total, steps = 0.0, 0
    for i in range(len(history) - 1, -1, -1):
        length = history[i][0] - (history[i - 1][0] if i else 0)
        total, steps = total + history[i][1] * length, steps + length
        if steps >= shortest:
            break
    return total / max(1, steps), steps


def _quantiles(weighted: Sequence[tuple[float, float]]) -> list[float]:
    """QUANTILES of (positive value, weight), interpolated on the logarithm of the value."""
    values, weights = np.array(sorted(weighted)).T
    shares = (np.cumsum(weights) - weights / 2) / weights.sum()
    found: list[float] = np.exp(np.interp(QUANTILES, shares, np.log(values))).tolist()
    return found

"""Buying gold labels: budget, batches, retries, checks of what comes back, and the replay of a ledger."""

import math
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm

from ..judges import judges
from ..judges.judges import IndexedVerdict, JudgeError
from ..training.seeds import derive_seed
from .labellers import Labeller, LabellerError
from .ledger import Ledger
from .window import Pair


logger = get_logger(__name__)

# After so many equal answers in a row something is wrong: with the order of the two randomised, an honest labeller says
# "the first" 30 times in a row once in 10^9.
STREAK = 30


def normalize_verdict(value: Any, labeller: str) -> float | None:
    """A verdict as the probability that the first completion is better, 0.5 for a tie; `None` stays `None`."""
    try:
        return judges.normalize_verdict(value)
    except ValueError as error:
        raise LabellerError(f"The labeller {labeller} {error} The labels before it were kept.") from None


class GoldLabels:
    """
    The gold labels of a run: bought from a labeller, kept in a [`Ledger`], none of them bought twice.

    A run *uses* labels in a definite order. What is in the ledger and not used yet was bought by an earlier run, or by
    this one before it was interrupted: it is used, without being asked for again, when the same comparison comes up
    again, and at the latest in the window after the one it was bought in, for the discriminator's replay. The choice of
    what to buy depends on the labels used so far and on nothing else in the ledger, so that a resumed run repeats
    what an uninterrupted one does.

    Args:
        labeller ([`Labeller`], *optional*):
            Whom to ask; `None` if nothing is ever bought.
        path (`str` or `Path`):
            The ledger's file.
        budget (`int`, *optional*):
            Labels at most, over all processes and resumptions, those in the ledger included.
        batch_size (`int`):
            Comparisons in a call of the labeller.
        retries (`int`), retry_delay (`float`):
            How often a call that raised is repeated, and the seconds before the first time; doubled at each.
        timeout (`float`, *optional*):
            Seconds to wait for the next verdict.
        seed (`int`):
            Of the order in which the two completions are shown.
        accelerator ([`~accelerate.Accelerator`]):
            The main process buys and writes; all have the same labels.
        show_progress (`bool`):
            Whether to show a bar where labelling takes more than two seconds.
    """

    def __init__(
        self,
        labeller: Labeller | None,
        path,
        budget: int | None,
        batch_size: int,
        retries: int,
        retry_delay: float,
        timeout: float | None,
        seed: int,
        accelerator: Accelerator,
        show_progress: bool = True,
    ):
        self.labeller = labeller
        self.path = path
        self.budget = budget
        self.batch_size = batch_size
        self.retries = retries
        self.retry_delay = retry_delay
        self.timeout = timeout
        self.seed = seed
        self.accelerator = accelerator
        self.show_progress = show_progress
        self.entries: list[dict] = []  # the ledger's, on every process
        self.used: list[int] = []  # indices into them, in order of use
        self._by_key: dict[str, int] = {}
        self._ledger: Ledger | None = None  # the main process's

    # ---- Beginning and resuming ------------------------------------------------------------------------------------

    def begin(self, used: list[int] | None = None) -> None:
        """Opens the ledger; `used` is what [`state_dict`] gave when the run was saved."""
        error = None
        if self.accelerator.is_main_process and self._ledger is None:
            try:
                self._ledger = Ledger(self.path)
            except (ValueError, RuntimeError, OSError) as raised:
                error = raised
        entries = self._ledger.entries if self._ledger is not None else []
        error, entries = self._broadcast((error, entries))
        if error is not None:
            raise error
        self.entries = list(entries)
        self.used = list(used or [])
        if self.used and max(self.used) >= len(self.entries):
            raise ValueError(
                f"The checkpoint was made after {max(self.used) + 1} gold labels, but the ledger `{self.path}` holds "
                f"{len(self.entries)}. Put the ledger back that belongs to the checkpoint, or set `ledger_file` to where "
                "it is now."
            )
        self._by_key = {self.entries[i]["key"]: i for i in self.used}
        waiting = len(self.entries) - len(self.used)
        if waiting and self.accelerator.is_main_process:
            logger.info(
                f"{waiting} gold labels of `{self.path}` were bought before; they are used before any is bought."
            )

    def close(self) -> None:
        if self._ledger is not None:
            self._ledger.close()
            self._ledger = None

    def state_dict(self) -> dict:
        return {"used": self.used}

    def _broadcast(self, value):
        if self.accelerator.num_processes == 1:
            return value
        holder = [value]
        broadcast_object_list(holder, from_process=0)
        return holder[0]

    # ---- What is known ---------------------------------------------------------------------------------------------

    @property
    def remaining(self) -> float:
        """Labels left in the budget."""
        return math.inf if self.budget is None else max(0, self.budget - len(self.used))

    def known(self, pair: Pair) -> dict | None:
        """The label of the same comparison, if this run has used it."""
        index = self._by_key.get(pair.key)
        return None if index is None else self.entries[index]

    def used_entries(self) -> list[dict]:
        return [self.entries[i] for i in self.used]

    def counts(self) -> dict[str, int]:
        """Labels by labeller, the whole ledger's."""
        return dict(Counter(entry["labeller"] for entry in self.entries))

    def absorb_unclaimed(self, window: int) -> None:
        """
        Uses the labels of earlier windows that nobody asked for again: those of another run, or of this one on a device
        that does not repeat itself. They train the discriminator.
        """
        claimed = set(self.used)
        for index, entry in enumerate(self.entries):
            if index not in claimed and entry["window"] < window:
                self._use(index)

    def _use(self, index: int) -> None:
        self.used.append(index)
        self._by_key[self.entries[index]["key"]] = index

    # ---- Buying ----------------------------------------------------------------------------------------------------

    def label(self, pairs: list[Pair], window: int, step: int) -> list[dict | None]:
        """
        The labels of pairs that were chosen, from the ledger where it has them, bought where it has not.

        Returns:
            `list[dict]`: An entry of the ledger for each pair; `None` where the budget, counting every label in the
            ledger, had none left.

        Raises:
            [`LabellerError`]: If the labeller failed, on every process. What was bought before is in the ledger.
        """
        used = set(self.used)
        waiting = {entry["key"]: i for i, entry in enumerate(self.entries) if i not in used}
        keys = [pair.key for pair in pairs]
        to_buy = [pair for pair, key in zip(pairs, keys, strict=True) if key not in waiting]
        if self.budget is not None:
            to_buy = to_buy[: max(0, self.budget - len(self.entries))]
        before, message = len(self.entries), None
        if to_buy and self.accelerator.is_main_process:
            try:
                self._buy(to_buy, window, step)
            except LabellerError as error:
                message = f"{error} {self._where_it_stands()}"
        new = self._ledger.entries[before:] if self.accelerator.is_main_process else []
        new, message = self._broadcast((new, message)) if to_buy else ([], None)
        self.entries += new
        if message is not None:
            raise LabellerError(message)
        waiting.update({entry["key"]: before + i for i, entry in enumerate(new)})
        labels = []
        for key in keys:
            index = waiting.get(key)
            if index is not None:
                self._use(index)
            labels.append(None if index is None else self.entries[index])
        return labels

    def _where_it_stands(self) -> str:
        return (
            f"{len(self._ledger)} gold labels are in `{self.path}`. When the labeller works again, continue with "
            "`trainer.train(resume_from_checkpoint=True)`: none of them is bought again."
        )

    def _buy(self, pairs: list[Pair], window: int, step: int) -> None:
        bar = tqdm(total=len(pairs), desc=f"Labels by {self.labeller.name}", delay=2, disable=not self.show_progress)
        with bar:
            for start in range(0, len(pairs), self.batch_size):
                self._buy_batch(pairs[start : start + self.batch_size], window, step, bar)
        self._check_streak()

    def _buy_batch(self, pairs: list[Pair], window: int, step: int, bar) -> None:
        missing = [self._request(pair, window, step) for pair in pairs]
        attempt = 0
        while missing:
            given: set[int] = set()
            try:
                for answers in self._ask(missing):
                    bought = []
                    try:
                        for index, verdict in answers:
                            verdict = normalize_verdict(verdict, self.labeller.name)
                            bought.append({**missing[index], "verdict": verdict})
                            given.add(index)
                    finally:
                        # On disk before anything is done with it, and before anything is said of the next.
                        self._ledger.append(bought)
                        bar.update(len(bought))
                if len(given) < len(missing):
                    raise LabellerError(
                        f"The labeller {self.labeller.name} gave no more verdicts after {len(given)} of {len(missing)}."
                    )
            except LabellerError:
                raise
            except JudgeError as error:  # it has tried what there was to try
                raise LabellerError(str(error)) from None
            except Exception as error:
                if attempt == self.retries:
                    raise LabellerError(
                        f"The labeller {self.labeller.name} failed {attempt + 1} times, at last with "
                        f"{type(error).__name__}: {error}."
                    ) from error
                logger.warning(
                    f"The labeller {self.labeller.name} failed ({type(error).__name__}: {error}); asking again."
                )
                time.sleep(self.retry_delay * 2**attempt)
                attempt += 1
            missing = [request for index, request in enumerate(missing) if index not in given]

    def _request(self, pair: Pair, window: int, step: int) -> dict:
        """An entry of the ledger but for the verdict, its completions in the order in which they are shown."""
        key = pair.key
        a, b = 0, 1
        if derive_seed(self.seed, "shown first", key) % 2:
            a, b = b, a
        sides = (pair.first, pair.second)
        return {
            "key": key,
            "window": window,
            "step": step,
            "prompt": pair.prompt,
            "completion_a": sides[a].as_reply(pair.prompt),
            "completion_b": sides[b].as_reply(pair.prompt),
            "prompt_ids": pair.prompt_ids,
            "completion_a_ids": sides[a].ids,
            "completion_b_ids": sides[b].ids,
            "scores": None if pair.scores is None else [pair.scores[a], pair.scores[b]],
            "labeller": self.labeller.name,
            "cost": self.labeller.cost,
            "columns": pair.columns,
        }

    def _ask(self, requests: list[dict]) -> Iterator[list]:
        """Verdicts of one call with their indices, as they come: at once from a list, one by one from an iterator."""
        names = requests[0]["columns"]
        arguments = [[request[name] for request in requests] for name in ("prompt", "completion_a", "completion_b")]
        columns = {name: [request["columns"][name] for request in requests] for name in names}
        if self.timeout is None:
            yield from self._verdicts(arguments, columns, len(requests))
            return
        # In a thread, since a call that hangs cannot be ended from outside; a daemon, so that it does not keep the process.
        answers: queue.Queue = queue.Queue()

        def ask():
            try:
                for verdicts in self._verdicts(arguments, columns, len(requests)):
                    answers.put((verdicts, None))
                answers.put((None, None))
            except BaseException as error:
                answers.put((None, error))

        threading.Thread(target=ask, daemon=True).start()
        while True:
            try:
                verdicts, error = answers.get(timeout=self.timeout)
            except queue.Empty:
                raise TimeoutError(f"no verdict within `label_timeout={self.timeout:g}` seconds") from None
            if error is not None:
                raise error
            if verdicts is None:
                return
            yield verdicts

    def _verdicts(self, arguments: list, columns: dict, count: int) -> Iterator[list[tuple[int, Any]]]:
        answer = self.labeller(*arguments, **columns)
        name = self.labeller.name
        if isinstance(answer, (str, bytes, dict)) or not hasattr(answer, "__iter__"):
            raise LabellerError(
                f"The labeller {name} gave a `{type(answer).__name__}`, not a list of {count} verdicts. Nothing was kept."
            )
        if hasattr(answer, "__len__"):
            if len(answer) != count:
                raise LabellerError(
                    f"The labeller {name} gave {len(answer)} verdicts for {count} pairs, so it is not known which belongs to "
                    "which. Nothing was kept. Give one a pair, in their order, and None where there is none."
                )
            yield list(enumerate(answer))
            return
        given = set()
        for number, verdict in enumerate(answer):
            index, value = verdict if isinstance(verdict, IndexedVerdict) else (number, verdict)
            if not 0 <= index < count or index in given:
                raise LabellerError(
                    f"The labeller {name} gave more than {count} verdicts for {count} pairs, or two for one."
                )
            given.add(index)
            yield [(index, value)]

    def _check_streak(self) -> None:
        """Stops on a labeller that always names the same position, warns of one that sees nothing but ties."""
        entries = [entry for entry in self._ledger.entries if entry["labeller"] == self.labeller.name]
        verdicts = [entry["verdict"] for entry in entries[-STREAK:]]
        if len(verdicts) < STREAK:
            return
        if all(verdict is None or verdict == 0.5 for verdict in verdicts):
            logger.warning(
                f"The last {STREAK} verdicts of the labeller {self.labeller.name} were all ties or none at all. They cost "
                "labels and order nothing. Look at some of them in the ledger; if they are right, sample more varied "
                "completions (`temperature`, `num_completions`)."
            )
        for position, sign in (("first", 1), ("second", -1)):
            if all(verdict is not None and sign * (verdict - 0.5) > 0 for verdict in verdicts):
                raise LabellerError(
                    f"The labeller {self.labeller.name} preferred the {position} completion {STREAK} times in a row, though "
                    "their order is random: it does not compare them."
                )

"""Buying gold labels: budget, batches, retries, checks of what comes back, and the replay of a ledger."""

import math
import queue
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm

from ..judges import verdicts
from ..judges.verdicts import JudgeError
from ..training.seeds import derive_seed
from .calls import Answers, Call
from .labellers import Labeller, LabellerError
from .ledger import Ledger, LedgerError, format_entry
from .window import Pair


logger = get_logger(__name__)

# This many equal answers in a row are an error: the order of the two is random, so an honest labeler prefers the first
# 30 times in a row with probability 10^-9.
STREAK = 30


def normalize_verdict(value: Any, labeller: str) -> float | None:
    """Returns a verdict as the probability that the first completion is better, 0.5 for a tie; `None` stays `None`."""
    try:
        return verdicts.normalize_verdict(value)
    except ValueError as error:
        raise LabellerError(f"The labeler {labeller} {error} The labels before it were kept.") from None


class GoldLabels:
    """
    The gold labels of a run: bought from a labeler, kept in a [`Ledger`], none of them bought twice.

    A run *uses* labels in a definite order. A label that is in the ledger and not used yet was bought by an earlier
    run, or by this one before it was interrupted. It is used, without being asked for again, when the same comparison
    comes up again, and at the latest in the window after the one it was bought in, for the discriminator's replay. The
    choice of what to buy depends on the labels used so far and on nothing else in the ledger, so that a resumed run
    repeats what an uninterrupted one does.

    Before the labeler is called, the ledger is opened, locked, validated and checked for disk space. A failed write
    stops the run at once; labels that could not be written to the ledger are written elsewhere ([`Ledger.append`]).

    Args:
        labeller ([`Labeller`], *optional*):
            The labeler; `None` if no labels are bought.
        path (`str` or `Path`):
            The ledger's file.
        budget (`int`, *optional*):
            Maximum number of labels, over all processes and resumptions, including those in the ledger.
        batch_size (`int`):
            Comparisons in a call of the labeler.
        retries (`int`), retry_delay (`float`):
            How often a call that raised is repeated, and the delay before the first repetition in seconds, doubled
            each time.
        timeout (`float`, *optional*):
            Seconds to wait for the next verdict. A late call is not repeated, since both calls would be paid for;
            instead the wait is repeated, `retries` times. Late answers are kept.
        seed (`int`):
            Seed of the order in which the two completions are shown.
        accelerator ([`~accelerate.Accelerator`]):
            The main process buys and writes; all have the same labels.
        show_progress (`bool`):
            Whether to show a bar where labeling takes more than two seconds.
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
        self._by_key: dict[str, int] = {}  # of the labels used
        self._index: dict[str, int] = {}  # of all labels, the first copy of each
        self._call: Call | None = None  # a call that is under way in its thread
        self._ledger: Ledger | None = None  # the main process's

    # ---- Beginning and resuming ------------------------------------------------------------------------------------

    def begin(self, used: list[int] | None = None) -> None:
        """
        Opens the ledger; `used` is what [`state_dict`] gave when the run was saved.

        Raises:
            `ValueError`: If a line of the ledger is not a gold label, or the ledger does not belong to the checkpoint.
            [`LedgerError`]: If it cannot be written, or another run writes to it.
        """
        error = None
        if self.accelerator.is_main_process and self._ledger is None:
            try:
                self._ledger = Ledger(self.path)
                if self.labeller is not None and self.budget != 0:
                    self._ledger.open()
            except (ValueError, LedgerError, OSError) as raised:
                error = raised
                self.close()
        entries = self._ledger.entries if self._ledger is not None else []
        error, entries = self._broadcast((error, entries))
        if error is not None:
            raise error
        self.entries, self._index = [], {}
        self._add(entries)
        if len(self._index) < len(entries):
            logger.warning(
                f"{len(entries) - len(self._index)} lines of the ledger `{self.path}` are of comparisons that stand "
                "in it before. The first line of each counts, the others are ignored."
            )
        self.used = list(used or [])
        if self.used and max(self.used) >= len(self.entries):
            raise ValueError(
                f"The checkpoint was made after {max(self.used) + 1} gold labels, but the ledger `{self.path}` holds "
                f"{len(self.entries)}. Put the ledger back that belongs to the checkpoint, or set `ledger_file` to "
                "where it is now."
            )
        self._by_key = {self.entries[i]["key"]: i for i in self.used}
        waiting = len(self._index) - len(self._by_key)
        if waiting and self.used:
            logger.info(
                f"{waiting} gold labels of `{self.path}` were bought before; they are used before any is bought."
            )
        elif waiting:
            logger.warning(
                f"`{self.path}` holds {waiting} gold labels that were bought before ({self.describe()}). This run "
                "uses them, and they count in `label_budget`. To begin without them, set `ledger_file` or "
                "`output_dir` to another place."
            )

    def _add(self, entries: list[dict]) -> None:
        for entry in entries:
            self._index.setdefault(entry["key"], len(self.entries))
            self.entries.append(entry)

    def close(self) -> None:
        """Writes the answers that have arrived meanwhile, then closes the ledger."""
        if self._ledger is not None:
            try:
                self._keep_late_answers()
            finally:
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
        """Labels by labeler, the whole ledger's."""
        return dict(Counter(entry["labeller"] for entry in self._unique_entries()))

    def describe(self) -> str:
        """The whole ledger in words: how many labels, by whom, at what cost."""
        cost = sum(entry.get("cost") or 0 for entry in self._unique_entries())
        who = ", ".join(f"{count:,} by {name}" for name, count in self.counts().items())
        return f"{who} (cost {cost:g})" if who else "none"

    def _unique_entries(self) -> list[dict]:
        entries = self.entries
        if not entries:  # before the run begins, too, a card tells what the ledger holds
            try:
                entries = Ledger(self.path, read_only=True).entries
            except (ValueError, OSError):
                return []
        return list({entry["key"]: entry for entry in reversed(entries)}.values())[::-1]

    def absorb_unclaimed(self, window: int) -> None:
        """
        Uses labels of earlier windows that were not requested again: those of another run, or of this run on a device
        that is not deterministic. They train the discriminator.
        """
        for key, index in self._index.items():
            if key not in self._by_key and self.entries[index]["window"] < window:
                self._use(index)

    def _use(self, index: int) -> None:
        key = self.entries[index]["key"]
        if key not in self._by_key:
            self.used.append(index)
            self._by_key[key] = index

    # ---- Buying ----------------------------------------------------------------------------------------------------

    def label(self, pairs: list[Pair], window: int, step: int) -> list[dict | None]:
        """
        Returns the labels of the chosen pairs, from the ledger if they are there, otherwise bought.

        Returns:
            `list[dict]`: An entry of the ledger for each pair; `None` where the budget, counting every label in the
            ledger, had none left.

        Raises:
            [`LabellerError`]: If the labeler failed, on every process. What was bought before is in the ledger.
        """
        keys = [pair.key for pair in pairs]
        # Each comparison once, however often it stands among the pairs.
        to_buy = list({key: pair for key, pair in zip(keys, pairs, strict=True) if key not in self._index}.values())
        if self.budget is not None:
            to_buy = to_buy[: max(0, self.budget - len(self._index))]
        before, message = len(self.entries), None
        if to_buy and self.accelerator.is_main_process:
            try:
                self._buy(to_buy, window, step)
            except (LabellerError, LedgerError) as error:
                message = f"{error} {self._where_it_stands()}"
        new = self._ledger.entries[before:] if self.accelerator.is_main_process and self._ledger is not None else []
        new, message = self._broadcast((new, message)) if to_buy else ([], None)
        self._add(new)
        if message is not None:
            raise LabellerError(message)
        labels = []
        for key in keys:
            index = self._index.get(key)
            if index is not None:
                self._use(index)
            labels.append(None if index is None else self.entries[index])
        return labels

    @property
    def _asked(self) -> Labeller:
        """The labeler, which whoever buys labels has."""
        assert self.labeller is not None
        return self.labeller

    @property
    def _open_ledger(self) -> Ledger:
        """The ledger, which the main process has opened before labels are bought."""
        assert self._ledger is not None
        return self._ledger

    def _where_it_stands(self) -> str:
        return (
            f"{len(self._open_ledger)} gold labels are in `{self.path}`. To continue, call "
            "`trainer.train(resume_from_checkpoint=True)`, or give `--resume_from_checkpoint true` on the command "
            "line: none of them is bought again."
        )

    def _buy(self, pairs: list[Pair], window: int, step: int) -> None:
        bar = tqdm(total=len(pairs), desc=f"Labels by {self._asked.name}", delay=2, disable=not self.show_progress)
        with bar:
            self._finish_call()
            bought = {entry["key"] for entry in self._open_ledger.entries}
            pairs = [pair for pair in pairs if pair.key not in bought]
            for start in range(0, len(pairs), self.batch_size):
                self._buy_batch(pairs[start : start + self.batch_size], window, step, bar)
        self._check_streak()

    def _buy_batch(self, pairs: list[Pair], window: int, step: int, bar) -> None:
        missing = [self._request(pair, window, step) for pair in pairs]
        attempt = 0
        while missing:
            # A request is an entry without its verdict.
            self._open_ledger.reserve(sum(len(format_entry(request)) + 40 for request in missing))
            given: set[int] = set()
            answers = Answers(self._asked, missing)
            arriving: Iterator[list] = answers
            if self.timeout is not None:
                self._call = Call(missing, answers)
                arriving = self._receive(self._call)
            while True:
                try:
                    received = next(arriving, None)
                except LabellerError:
                    raise
                except KeyboardInterrupt:
                    self._keep_under_way(answers, missing, given)
                    raise
                except JudgeError as error:  # it has tried what there was to try
                    raise LabellerError(str(error)) from None
                except Exception as error:
                    if attempt == self.retries:
                        raise LabellerError(
                            f"The labeler {self._asked.name} failed {attempt + 1} times, at last with "
                            f"{type(error).__name__}: {error}."
                        ) from error
                    logger.warning(
                        f"The labeler {self._asked.name} failed ({type(error).__name__}: {error}); asking again."
                    )
                    time.sleep(self.retry_delay * 2**attempt)
                    attempt += 1
                    break
                if received is None:
                    if len(given) < len(missing):
                        raise LabellerError(
                            f"The labeler {self._asked.name} gave no more verdicts after {len(given)} of "
                            f"{len(missing)}."
                        )
                    break
                # Outside of `try`: what fails from here on is not the labeler.
                try:
                    self._keep(received, missing, given, bar)
                except BaseException as error:  # a verdict that is none, a disk that is full, Ctrl-C
                    try:
                        self._keep_under_way(answers, missing, given)
                    except LedgerError as another:
                        raise LedgerError(f"{error} {another}") from error
                    raise
            missing = [request for index, request in enumerate(missing) if index not in given]

    def _keep(self, answers: list, requests: list[dict], given: set[int], bar=None) -> None:
        """Writes answers to the ledger before they are used, including valid ones that precede an invalid verdict."""
        bought = []
        try:
            for index, verdict in answers:
                verdict = normalize_verdict(verdict, self._asked.name)
                bought.append({**requests[index], "verdict": verdict})
                given.add(index)
        finally:
            self._open_ledger.append(bought)
            if bar is not None:
                bar.update(len(bought))

    def _keep_under_way(self, answers: Answers, requests: list[dict], given: set[int]) -> None:
        """
        Has the labeler send no more questions, and keeps the answers to those under way, which are paid for.

        Raises:
            [`LedgerError`]: If they cannot be written. The message says where they were written instead.
        """
        call = self._call
        if not (answers.call_off() if call is None else call.call_off()):
            return
        logger.info("Waiting for the gold labels that were asked for and have not come yet.")
        received: list[tuple[int, Any]] = []
        try:
            for some in answers if call is None else self._receive(call):
                received += [(index, normalize_verdict(verdict, self._asked.name)) for index, verdict in some]
        except Exception as error:  # why the run stops is known already
            logger.warning(f"The labeler {self._asked.name} failed ({type(error).__name__}: {error}).")
        finally:
            self._keep(received, requests, given)

    # ---- Calls that are late ---------------------------------------------------------------------------------------

    def _receive(self, call: Call) -> Iterator[list]:
        """
        Yields a call's answers as they arrive. Waits up to `timeout` seconds for each, and repeats the wait `retries`
        times.
        """
        waited = 0
        while True:
            try:
                answers = call.receive(self.timeout)
            except queue.Empty:
                waited += 1
                message = (
                    f"The labeler {self._asked.name} gave no verdict within `label_timeout={self.timeout:g}` seconds"
                )
                if waited > self.retries:
                    call.call_off()
                    raise LabellerError(f"{message}, waited for {waited} time(s).") from None
                logger.warning(f"{message}; waiting again. Its call is not repeated, as both would be paid for.")
                continue
            except KeyboardInterrupt:
                raise  # this thread's; the call goes on in its own
            except BaseException:
                self._call = None
                raise
            waited = 0
            if answers is None:
                self._call = None
                return
            yield answers

    def _finish_call(self) -> None:
        """Waits for the call that was late when the run last stopped, instead of repeating it while it still runs."""
        call = self._call
        if call is None:
            return
        try:
            for answers in self._receive(call):
                self._keep(answers, call.requests, call.given)
        except (LabellerError, LedgerError):
            raise
        except Exception as error:
            logger.warning(f"The labeler {self._asked.name} failed ({type(error).__name__}: {error}); asking again.")

    def _keep_late_answers(self) -> None:
        """Keeps the answers that a late call has returned so far."""
        call = self._call
        while call is not None:
            try:
                answers = call.receive(None)
            except BaseException:  # nothing has come, or the call has failed
                return
            if answers is None:
                self._call = None
                return
            self._keep(answers, call.requests, call.given)

    def _request(self, pair: Pair, window: int, step: int) -> dict:
        """An entry of the ledger without its verdict, the completions in the order in which they are shown."""
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
            "labeller": self._asked.name,
            "cost": self._asked.cost,
            "columns": pair.columns,
        }

    def _check_streak(self) -> None:
        """Raises if a labeler always prefers the same position, and warns if it returns only ties."""
        entries = [entry for entry in self._open_ledger.entries if entry["labeller"] == self._asked.name]
        verdicts = [entry["verdict"] for entry in entries[-STREAK:]]
        if len(verdicts) < STREAK:
            return
        if all(verdict is None or verdict == 0.5 for verdict in verdicts):
            logger.warning(
                f"The last {STREAK} verdicts of the labeler {self._asked.name} were all ties or none at all. They "
                "cost labels and order nothing. Look at some of them in the ledger; if they are right, sample more "
                "varied completions (`temperature`, `num_completions`)."
            )
        for position, sign in (("first", 1), ("second", -1)):
            if all(verdict is not None and sign * (verdict - 0.5) > 0 for verdict in verdicts):
                raise LabellerError(
                    f"The labeler {self._asked.name} preferred the {position} completion {STREAK} times in a row, "
                    "though their order is random: it does not compare them."
                )

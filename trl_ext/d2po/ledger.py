"""Record of all gold labels that were bought, written to disk before they are used."""

import hashlib
import io
import json
import logging
import math
import os
import stat
import tempfile
from pathlib import Path

from datasets import Dataset


try:
    import fcntl
except ImportError:  # Windows has no advisory locks of this kind
    fcntl = None  # type: ignore[assignment]  # which is asked before it is used

logger = logging.getLogger(__name__)  # not accelerate's: a ledger can be read without a run


class LedgerError(RuntimeError):
    """The ledger could not be opened, locked or written to."""


def request_key(prompt_ids: list[int], first_ids: list[int], second_ids: list[int], columns: dict) -> str:
    """
    Identity of a comparison, whichever of the two completions comes first: the same prompt, completions and columns
    that the labeler sees give the same key, in any process and any run.
    """
    request = [list(prompt_ids), sorted([list(first_ids), list(second_ids)]), columns]
    return hashlib.sha256(json.dumps(request, sort_keys=True, default=str).encode()).hexdigest()[:32]


class Ledger:
    """
    Append-only record of gold labels: one JSON object a line, flushed and fsynced before [`append`] returns.

    A process that dies while it writes leaves at most one unfinished line, which was never used as a label and is cut
    off when the file is opened for writing again. Nothing else is ever changed or removed. A last line that is whole
    but for its line end, as editors leave it, is a label.

    Each entry has:
        - `key`: identity of the comparison ([`request_key`]).
        - `window`, `step`: when it was asked for: number of the window and of the optimizer steps taken.
        - `prompt`, `completion_a`, `completion_b`: what the labeler saw, in its order: text, or messages.
        - `prompt_ids`, `completion_a_ids`, `completion_b_ids`: the sampled tokens.
        - `scores`: the discriminator's scores of both completions when they were chosen, or `null` without one.
        - `verdict`: probability that `completion_a` is better; 0.5 is a tie, `null` no verdict.
        - `labeller`, `cost`: who gave it, and what it cost, in the labeler's unit.
        - `columns`: the further columns of the row that the labeler saw.

    Args:
        path (`str` or `Path`):
            File, made by [`open`] or when the first label is appended.
        read_only (`bool`, *optional*, defaults to `False`):
            Only read: an unfinished line stays where it is, and another process may be writing.

    Raises:
        `ValueError`: If a line other than an unfinished last one is not a gold label, naming the line.
        [`LedgerError`]: If the file cannot be opened for writing, or another process is writing to it.
    """

    def __init__(self, path: str | Path, read_only: bool = False):
        self.path = Path(path)
        self.entries: list[dict] = []
        self._read_only = read_only
        self._file: io.FileIO | None = None
        self._size = 0  # bytes of the file after the last line that was read or written
        if self.path.exists():
            if read_only:
                self._read(self.path.read_bytes())
            else:
                self.open()

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def _handle(self) -> io.FileIO:
        """The file, which is open."""
        assert self._file is not None
        return self._file

    # ---- Opening and reading ---------------------------------------------------------------------------------------

    def open(self) -> None:
        """Opens the file for writing, made if it is not there, locks it, and reads what it holds."""
        if self._file is not None:
            return
        is_new = not self.path.exists()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not is_new and not stat.S_ISREG(self.path.stat().st_mode):
                raise LedgerError(f"The ledger `{self.path}` is not a file. Set `ledger_file` to the path of one.")
            self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115 - stays open, so that the lock is held
            self._lock()
            self._handle.seek(0)
            self._read(self._handle.read())
            self._handle.write(b"")
            if is_new:
                self._sync_folder()
        except OSError as error:
            self.close()
            raise LedgerError(self._reason(error)) from error
        except BaseException:
            self.close()
            raise

    def _reason(self, error: OSError) -> str:
        return (
            f"The ledger `{self.path}` cannot be written ({type(error).__name__}: {error.strerror or error}). Make "
            "room on the disk or give write access, or set `ledger_file` to another place."
        )

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LedgerError(
                f"The ledger `{self.path}` is being written by another process. Let that run end, or give this one a "
                "`ledger_file` or an `output_dir` of its own."
            ) from error
        except OSError as error:  # some network file systems have no locks
            logger.warning(
                f"The ledger `{self.path}` cannot be locked ({error}). Make sure that no other run writes to it."
            )

    def _sync_folder(self) -> None:
        """Syncs the folder, so that a new file's name is on disk."""
        try:
            folder = os.open(self.path.parent, os.O_RDONLY)
        except OSError:
            return
        try:
            os.fsync(folder)
        except OSError:
            pass  # some network file systems refuse
        finally:
            os.close(folder)

    def _read(self, content: bytes) -> None:
        lines = content.splitlines(
            keepends=True
        )  # of bytes: at LF, CR LF and CR only, none of which JSON leaves in a text
        if lines and not lines[-1].endswith((b"\n", b"\r")):
            if self._is_unfinished(lines[-1]):
                cut = lines.pop()
                if not self._read_only:
                    logger.warning(
                        f"The last line of the ledger `{self.path}` is unfinished: the process that wrote it died. It "
                        "was never used as a label, and is cut off."
                    )
                    self._handle.truncate(len(content) - len(cut))
                    content = content[: -len(cut)]
            elif not self._read_only:
                self._handle.write(b"\n")
                content += b"\n"
        self._size = len(content)
        self.entries = []
        for number, line in enumerate(lines, start=1):
            try:
                self.entries.append(parse_entry(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line))
            except ValueError as error:
                raise ValueError(
                    f"Line {number} of the ledger `{self.path}` is not a gold label: {error}. The file was changed by "
                    "something else. Restore it or remove the line, or move the file away to start without its labels."
                ) from error

    @staticmethod
    def _is_unfinished(line: bytes) -> bool:
        """Whether a last line without its end is what a process that died has written of an entry."""
        if not line.strip(b"\0"):  # a disk that lost power
            return True
        try:
            json.loads(line)
        except (ValueError, RecursionError):
            return line.startswith(b"{")
        return False

    # ---- Writing ---------------------------------------------------------------------------------------------------

    def reserve(self, size: int) -> None:
        """
        Checks, before the labeler is called, that `size` more bytes can be written to the opened file.

        Raises:
            [`LedgerError`]: If the disk has no room, or the file was removed, replaced or changed since.
        """
        if self._file is None:
            self.open()
        self._check_is_ours()
        try:
            with tempfile.TemporaryFile(dir=self.path.parent, prefix=f".{self.path.name}.") as file:
                file.write(b"\0" * size)
                file.flush()
        except OSError as error:
            raise LedgerError(self._reason(error)) from error

    def _check_is_ours(self) -> None:
        """
        Raises `LedgerError` if the file at the path was replaced or modified since this process last wrote to it.
        """
        ours = os.fstat(self._handle.fileno())
        try:
            there = self.path.stat()
        except OSError:
            there = None
        if there is None or (there.st_ino, there.st_dev) != (ours.st_ino, ours.st_dev):
            what = "removed" if there is None else "replaced"
        elif there.st_size != self._size:
            what = "changed"
        else:
            return
        raise LedgerError(f"The ledger `{self.path}` was {what} by something else while the run goes on.")

    def append(self, entries: list[dict]) -> None:
        """
        Writes entries and returns when they are on disk.

        Raises:
            [`LedgerError`]: If that fails. The message says where the entries were written instead.
        """
        if not entries:
            return
        if self._read_only:
            raise ValueError(f"The ledger `{self.path}` was opened with `read_only=True`.")
        lines = [format_entry(entry) for entry in entries]
        written = 0
        try:
            self.open()
            self._check_is_ours()
            for line in lines:
                self._write(line)
                # Kept in the form in which it will be read again, so that a resumed run uses the same entries.
                self.entries.append(json.loads(line))
                written += 1
            os.fsync(self._handle.fileno())
        except (OSError, LedgerError) as error:
            reason = str(error) if isinstance(error, LedgerError) else self._reason(error)
            raise LedgerError(f"{reason} {self._rescue(lines[written:])}") from error

    def _write(self, line: bytes) -> None:
        """Writes a line in full, or leaves the file as it was."""
        done = 0
        try:
            while done < len(line):
                done += self._handle.write(line[done:])
        except OSError:
            if done:
                self._handle.truncate(self._size)
            raise
        self._size += len(line)

    def _rescue(self, lines: list[bytes]) -> str:
        """
        Writes labels that could not be written to the ledger to the first writable fallback, and returns where they
        are.
        """
        try:
            there = self.path.read_bytes()
        except OSError:
            there = b""
        # A ledger that was removed or replaced lacks what was written to it before, too.
        missing = [line for entry in self.entries if (line := format_entry(entry)).strip() not in there]
        missing += [line for line in lines if line not in missing and line.strip() not in there]
        if not missing:
            return "Every label that was bought is in it."
        for folder in (self.path.parent, Path(tempfile.gettempdir()), Path.cwd()):
            try:
                descriptor, name = tempfile.mkstemp(".jsonl", f"{self.path.stem}-rescued-", folder)
            except OSError:
                continue
            try:
                with open(descriptor, "wb") as file:
                    file.write(b"".join(missing))
                    file.flush()
                    os.fsync(file.fileno())
            except OSError:
                os.unlink(name)
                continue
            return (
                f"The {len(missing)} gold labels that are not in it are in `{name}`: append that file to the ledger."
            )
        for line in missing:
            logger.error(
                f"A gold label that no disk takes; append it to the ledger as a line: {line.decode().strip()}"
            )
        return f"The {len(missing)} gold labels that are not in it were logged: append these lines to the ledger."

    def close(self) -> None:
        """Closes the file and releases the lock."""
        if self._file is not None:
            try:
                self._file.close()
            finally:
                self._file = None

    def to_dataset(self, tokenized: bool = False) -> Dataset:
        """
        Returns the labels as a preference dataset: one row for each decisive verdict, in the order of purchase.

        Args:
            tokenized (`bool`, *optional*, defaults to `False`):
                Give the sampled tokens, as `prompt_ids`, `chosen_ids` and `rejected_ids`, which every trainer of this
                project takes. Otherwise `prompt`, `chosen` and `rejected`, text or messages, which any DPO trainer
                takes; such trainers append an end-of-sequence token, to truncated completions too.

        Returns:
            [`~datasets.Dataset`], whose column `confidence` is the probability that `chosen` is better.
        """
        rows, seen = [], set()
        for entry in self.entries:
            verdict, line = entry["verdict"], format_entry(entry)
            if verdict is None or verdict == 0.5 or line in seen:  # a line that stands twice is one label
                continue
            seen.add(line)
            chosen, rejected = ("a", "b") if verdict > 0.5 else ("b", "a")
            if tokenized:
                row = {"prompt_ids": entry["prompt_ids"]}
                row["chosen_ids"] = entry[f"completion_{chosen}_ids"]
                row["rejected_ids"] = entry[f"completion_{rejected}_ids"]
            else:
                row = {"prompt": entry["prompt"]}
                row["chosen"], row["rejected"] = entry[f"completion_{chosen}"], entry[f"completion_{rejected}"]
            rows.append({**row, "confidence": max(verdict, 1 - verdict)})
        return Dataset.from_list(rows)


def ledger_to_dataset(path: str | Path, tokenized: bool = False) -> Dataset:
    """Reads a ledger as a preference dataset; see [`Ledger.to_dataset`]."""
    if not Path(path).exists():
        raise FileNotFoundError(f"There is no ledger at `{path}`.")
    return Ledger(path, read_only=True).to_dataset(tokenized)


def format_entry(entry: dict) -> bytes:
    """An entry as a line of the ledger: readable, except where a text has a line separator or is not Unicode."""
    line = json.dumps(entry, ensure_ascii=False, default=str)
    if len(line.splitlines()) > 1 or any("\ud800" <= character <= "\udfff" for character in line):
        line = json.dumps(entry, default=str)
    return line.encode() + b"\n"


# Field -> what it must be. Others are optional, as 0.1.0 and ledgers made by hand may lack them.
_TEXT = (str, list)
_REQUIRED: dict[str, type | tuple[type, ...]] = {
    "key": str,
    "window": int,
    "prompt": _TEXT,
    "completion_a": _TEXT,
    "completion_b": _TEXT,
    "prompt_ids": list,
    "completion_a_ids": list,
    "completion_b_ids": list,
    "labeller": str,
}


def parse_entry(line: bytes) -> dict:
    """
    Returns the gold label of a line.

    Raises:
        `ValueError`: If it is not one, saying what is wrong.
    """
    try:
        entry = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"it is not JSON ({type(error).__name__})") from None
    if not isinstance(entry, dict):
        raise ValueError(f"it is a `{type(entry).__name__}`, not an object")
    verdict = entry.get("verdict")
    if verdict is not None and (type(verdict) not in (int, float) or not 0 <= verdict <= 1):  # false for NaN too
        raise ValueError(f"its 'verdict' is {verdict!r}, not a probability or null")
    for name in ("verdict", *_REQUIRED):
        if name not in entry:
            raise ValueError(f"it has no {name!r}")
    for name, kind in _REQUIRED.items():
        if not isinstance(entry[name], kind) or isinstance(entry[name], bool):
            raise ValueError(f"its {name!r} is {entry[name]!r}")
        if name.endswith("_ids") and not all(type(token) is int and token >= 0 for token in entry[name]):
            raise ValueError(f"its {name!r} are not token ids")
    if entry["window"] < 0:
        raise ValueError(f"its 'window' is {entry['window']!r}")
    cost = entry.get("cost")
    if cost is not None and (type(cost) not in (int, float) or not math.isfinite(cost)):
        raise ValueError(f"its 'cost' is {cost!r}, not a number")
    return entry

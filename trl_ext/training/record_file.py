"""Append-only files of JSON lines, for what was paid for: each entry is on disk before it is used."""

import io
import json
import logging
import os
import stat
import tempfile
from pathlib import Path


try:
    import fcntl
except ImportError:  # Windows has no advisory locks of this kind
    fcntl = None  # type: ignore[assignment]  # which is asked before it is used

logger = logging.getLogger(__name__)  # not accelerate's: a record can be read without a run


class RecordError(RuntimeError):
    """A record could not be opened, locked or written to."""


class RecordFile:
    """
    Append-only record: one JSON object a line, flushed and fsynced before [`append`] returns. A subclass names the
    record and its entries in messages and checks each line.

    A process that dies while it writes leaves at most one unfinished line, which was never used and is cut off when
    the file is opened for writing again. Nothing else is ever changed or removed. A last line that is whole but for
    its line end, as editors leave it, is an entry.

    Args:
        path (`str` or `Path`):
            File, made by [`open`] or when the first entry is appended.
        read_only (`bool`, *optional*, defaults to `False`):
            Only read: an unfinished line stays where it is, and another process may be writing.

    Raises:
        `ValueError`: If a line other than an unfinished last one is not an entry, naming the line.
        [`RecordError`]: If the file cannot be opened for writing, or another process is writing to it.
    """

    _error: type[RecordError] = RecordError
    _name: str = "record"
    _entry: str = "entry"
    _place: str = ""  # how to use another file, for messages

    def __init__(self, path: str | Path, read_only: bool = False):
        self.path = Path(path).expanduser()
        self.entries: list[dict] = []
        self._read_only = read_only
        self._file: io.FileIO | None = None
        self._size = 0  # bytes of the file after the last line that was read or written
        if self.path.exists():
            if read_only:
                self._read(self.path.read_bytes())
            else:
                self.open()

    def _parse(self, line: bytes) -> dict:
        """Returns the entry of a line, or raises a `ValueError` that says what is wrong with it."""
        return parse_object(line)

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
                raise self._error(f"The {self._name} `{self.path}` is not a file. {self._place}")
            self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115 - stays open, so that the lock is held
            self._lock()
            self._handle.seek(0)
            self._read(self._handle.read())
            self._handle.write(b"")
            if is_new:
                self._sync_folder()
        except OSError as error:
            self.close()
            raise self._error(self._reason(error)) from error
        except BaseException:
            self.close()
            raise

    def _reason(self, error: OSError) -> str:
        return (
            f"The {self._name} `{self.path}` cannot be written ({type(error).__name__}: {error.strerror or error}). "
            f"Make room on the disk or give write access. {self._place}"
        )

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise self._error(
                f"The {self._name} `{self.path}` is being written by another process. Let that run end. {self._place}"
            ) from error
        except OSError as error:  # some network file systems have no locks
            logger.warning(
                f"The {self._name} `{self.path}` cannot be locked ({error}). Make sure that no other run writes to it."
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
                        f"The last line of the {self._name} `{self.path}` is unfinished: the process that wrote it "
                        "died. It was never used, and is cut off."
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
                self.entries.append(self._parse(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line))
            except ValueError as error:
                raise ValueError(
                    f"Line {number} of the {self._name} `{self.path}` is not a {self._entry}: {error}. The file was "
                    "changed by something else. Restore it or remove the line, or move the file away to start without "
                    f"its {self._entry}s."
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
        Checks, before anybody is asked, that `size` more bytes can be written to the opened file.

        Raises:
            [`RecordError`]: If the disk has no room, or the file was removed, replaced or changed since.
        """
        if self._file is None:
            self.open()
        self._check_is_ours()
        try:
            with tempfile.TemporaryFile(dir=self.path.parent, prefix=f".{self.path.name}.") as file:
                file.write(b"\0" * size)
                file.flush()
        except OSError as error:
            raise self._error(self._reason(error)) from error

    def _check_is_ours(self) -> None:
        """
        Raises `RecordError` if the file at the path was replaced or modified since this process last wrote to it.
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
        raise self._error(f"The {self._name} `{self.path}` was {what} by something else while the run goes on.")

    def append(self, entries: list[dict]) -> None:
        """
        Writes entries and returns when they are on disk.

        Raises:
            [`RecordError`]: If that fails. The message says where the entries were written instead.
        """
        if not entries:
            return
        if self._read_only:
            raise ValueError(f"The {self._name} `{self.path}` was opened with `read_only=True`.")
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
        except (OSError, RecordError) as error:
            reason = str(error) if isinstance(error, RecordError) else self._reason(error)
            raise self._error(f"{reason} {self._rescue(lines[written:])}") from error

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
        Writes entries that could not be appended to the first writable fallback, and returns where they are.
        """
        try:
            there = self.path.read_bytes()
        except OSError:
            there = b""
        # A file that was removed or replaced lacks what was written to it before, too.
        missing = [line for entry in self.entries if (line := format_entry(entry)).strip() not in there]
        missing += [line for line in lines if line not in missing and line.strip() not in there]
        if not missing:
            return f"Every {self._entry} so far is in it."
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
                f"The {len(missing)} {self._entry}s that are not in it are in `{name}`: append that file to the "
                f"{self._name}."
            )
        for line in missing:
            logger.error(
                f"A {self._entry} that no disk takes; append it to the {self._name} as a line: {line.decode().strip()}"
            )
        return f"The {len(missing)} {self._entry}s that are not in it were logged: append these lines to the {self._name}."

    def close(self) -> None:
        """Closes the file and releases the lock."""
        if self._file is not None:
            try:
                self._file.close()
            finally:
                self._file = None


def format_entry(entry: dict) -> bytes:
    """An entry as a line of a record: readable, except where a text has a line separator or is not Unicode."""
    line = json.dumps(entry, ensure_ascii=False, default=str)
    if len(line.splitlines()) > 1 or any("\ud800" <= character <= "\udfff" for character in line):
        line = json.dumps(entry, default=str)
    return line.encode() + b"\n"


def parse_object(line: bytes) -> dict:
    """
    Returns the JSON object of a line.

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
    return entry


def check_probability(entry: dict, name: str) -> None:
    """Raises `ValueError` if a field that is there is neither a probability nor null."""
    value = entry.get(name)
    if value is not None and (type(value) not in (int, float) or not 0 <= value <= 1):  # false for NaN too
        raise ValueError(f"its {name!r} is {value!r}, not a probability or null")

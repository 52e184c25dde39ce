"""The folder of an evaluation's report. What took hours to measure is not lost to a full disk."""

import json
import sys
import tempfile
from pathlib import Path

from ..training.output_folder import check_writable
from .report import REPORT_FILES, numbers_as_json, write_numbers, write_page


class ReportFolder:
    """
    Writes the report of an evaluation after each model, and at the end somewhere else if its folder cannot be written.

    Args:
        folder (`str` or `Path`):
            Where to.
        added (`dict`):
            Entries of the report beside those of [`evaluate_models`].
    """

    def __init__(self, folder: str | Path, added: dict):
        self.folder, self.added = Path(folder).expanduser(), added
        # The files of the newest report, and that report if it is not in them.
        self.written: list[Path] = []
        self._unsaved: dict | None = None

    def prepare(self) -> None:
        """Raises `ValueError` if the folder cannot be written, before anything is measured."""
        check_writable(self.folder, REPORT_FILES)

    def save(self, report: dict) -> None:
        """Writes the report so far: its numbers, then its page."""
        self._unsaved = {**report, **self.added}
        numbers = write_numbers(self._unsaved, self.folder)
        self.written = [numbers]
        self.written.append(write_page(self._unsaved, self.folder))
        self._unsaved = None

    def finish(self) -> str | None:
        """
        Writes what [`save`] could not: in the folder, else in a temporary one, else on standard output.

        Returns:
            `str`: What went wrong and where the numbers are; `None` if all is written.
        """
        report = self._unsaved
        if report is None:
            return None
        try:
            numbers = write_numbers(report, self.folder)
        except OSError as error:
            return f"`{self.folder}` cannot be written: {error}. {self._written_elsewhere(report)}"
        self.written = [numbers]
        try:
            self.written.append(write_page(report, self.folder))
        except Exception as error:
            return (
                f"the page cannot be made ({type(error).__name__}: {error}). The numbers are in {numbers}; "
                "`trl_ext.evaluation.render_report` makes a page of them."
            )
        self._unsaved = None
        return None

    def _written_elsewhere(self, report: dict) -> str:
        try:
            self.written = [write_numbers(report, tempfile.mkdtemp(prefix="trl-ext-evaluation-"))]
            return f"The numbers are in {self.written[0]}."
        except OSError:
            self.written = []
            sys.stdout.write(json.dumps(json.loads(numbers_as_json(report))) + "\n")  # as ASCII
            return "The numbers are on standard output, as JSON."

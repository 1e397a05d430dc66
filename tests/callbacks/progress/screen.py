"""A terminal without a window: what is written to it ends up on a screen that can be read."""

from __future__ import annotations

import io
import re

_PART = re.compile(r"\x1b\[(?P<args>[?\d;]*)(?P<command>[A-Za-z])|(?P<control>[\r\n\b])|(?P<text>[^\x1b\r\n\b]+)")


class Terminal(io.StringIO):
    """A text file that claims to be a terminal, of endless width and height.

    It understands what the bars use: carriage return and line feed, the cursor's movements up, down, left and right,
    erasing lines and what is below; colors are left out.
    """

    def isatty(self) -> bool:
        return True

    @property
    def screen(self) -> list[str]:
        """The lines that can be seen, without empty ones."""
        return [line for line in (line.rstrip() for line in self._lines()) if line]

    def _lines(self) -> list[str]:
        lines: list[str] = [""]
        row = column = position = 0
        written = self.getvalue()
        while position < len(written):
            part = _PART.match(written, position)
            assert part is not None, f"a terminal would not understand {written[position : position + 20]!r}"
            position = part.end()
            if part["text"] is not None:
                before = lines[row][:column].ljust(column)
                column += len(part["text"])
                lines[row] = before + part["text"] + lines[row][column:]
            elif part["control"] is not None:
                column = max(0, column - 1) if part["control"] == "\b" else 0
                row += part["control"] == "\n"
            else:
                count = int(part["args"]) if part["args"].isdigit() else 0
                row, column = self._control(lines, row, column, part["command"], count)
            lines += [""] * (row + 1 - len(lines))
        return lines

    @staticmethod
    def _control(lines: list[str], row: int, column: int, command: str, count: int) -> tuple[int, int]:
        """Do what an escape sequence says; returns the new row and column."""
        if command == "A":
            return max(0, row - max(1, count)), column
        if command == "B":
            return row + max(1, count), column
        if command == "C":
            return row, column + max(1, count)
        if command == "D":
            return row, max(0, column - max(1, count))
        if command == "G":
            return row, max(1, count) - 1
        if command == "K":
            lines[row] = {0: lines[row][:column], 1: " " * column + lines[row][column:], 2: ""}[count]
        elif command == "J":
            assert count == 0, "only what is below the cursor is erased"
            lines[row] = lines[row][:column]
            del lines[row + 1 :]
        else:
            assert command in "mhl", f"a terminal would do something at the sequence {command!r}"
        return row, column

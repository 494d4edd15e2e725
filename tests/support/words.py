"""Report words that the code and docs of this project do not use, and docstrings that open with a question word.

python tests/support/words.py
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Private vocabulary and metaphors of people; use the field's words instead.
_WORDS = re.compile(r"\b(told|refuse[ds]?|anew|beside|nobody|somebody|whoever|culprit|remedies)\b", re.IGNORECASE)
_QUESTION = re.compile(r'^\s*r?"""(What|How|Where|Whether|Who|Why|Which)\b')


def main() -> int:
    """Print every finding and return the exit status."""
    listed = subprocess.run(
        ["git", "ls-files", "*.py", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    count = 0
    for name in listed:
        path = ROOT / name
        if path.is_symlink() or path == Path(__file__).resolve() or not path.is_file():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            found = _WORDS.search(line) or (None if name.startswith("tests/") else _QUESTION.search(line))
            if found:
                count += 1
                print(f"{name}:{number}: {found[0].strip()}: {line.strip()[:100]}")
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main())
